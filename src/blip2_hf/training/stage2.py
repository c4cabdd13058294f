"""A stage-2 run (generative pre-training) from the command line or from Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..modeling.generation import Blip2ForConditionalGeneration
from ..processing import Blip2Processor
from ..stage2_processing import stage2_processor
from .arguments import Blip2TrainingArguments
from .language_runs import LanguageRunArguments, captions_trainer, language_columns, prepare_language_run
from .precision import HALF_PRECISIONS
from .recipes import recipe_named
from .runs import config_overrides, load_model, parse_run, seeded, start_from
from .task_recipes import STAGE2_RECIPES
from .trainer import Blip2Trainer


@dataclass
class Stage2Arguments(LanguageRunArguments):
    """What a stage-2 run needs besides `Blip2TrainingArguments`.

    Attributes:
        model: a generation model to go on from; or `language` with `stage1`, with `vision`, or with both.
        stage1: a retrieval model, whose tower and Q-Former are taken.
        vision: a vision tower without `stage1`, or another checkpoint of its tower.
        language: a causal or sequence-to-sequence language model.
        text: without `stage1`, a BERT that the Q-Former starts from.
        text_branch: keep the Q-Former's text branch, for questions.
        target: of an encoder-decoder, "prefix_lm" or "whole"; default: the recipe's.
        model_config: of a new model, fields of `Blip2Config` to be other than usual, such as
            {"num_query_tokens": 16} without `stage1`; as JSON on the command line.
    """

    stage1: str | None = field(default=None, metadata={"help": "Stage-1 checkpoint to start from."})
    vision: str | None = field(default=None, metadata={"help": "Vision tower to start from without stage 1."})
    language: str | None = field(default=None, metadata={"help": "Language model to start from."})
    text: str | None = field(default=None, metadata={"help": "BERT to start from without stage 1."})
    text_branch: bool = field(default=False, metadata={"help": "Keep the Q-Former's text branch, for questions."})
    target: str | None = field(default=None, metadata={"help": "prefix_lm or whole (encoder-decoders)."})
    model_config: dict | str | None = field(
        default=None, metadata={"help": "Fields of the new model's Blip2Config, as JSON."}
    )


def parse_stage2(argv: Sequence[str] | None = None) -> tuple[Stage2Arguments, Blip2TrainingArguments]:
    """As `parse_run`; the recipe's column and the precision are those for the language model."""
    return parse_run(Stage2Arguments, STAGE2_RECIPES, language_columns, "stage2", argv)


@seeded
def build_stage2(
    arguments: Stage2Arguments, training: Blip2TrainingArguments
) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """The model to train, with frozen tower and language model, and its processor.

    With `save_connector_only`, a new model is first saved in full (`start_from`).

    Raises:
        ValueError: neither or both of `model` and `language`; what does not go with `model`; as `from_backbones`.
    """
    recipe = recipe_named(arguments.recipe, STAGE2_RECIPES)
    if (arguments.model is None) == (arguments.language is None):
        raise ValueError(
            f"exactly one of `model` and `language` must be given, got {arguments.model!r} and {arguments.language!r}"
        )
    given = [name for name in ("stage1", "vision", "text", "text_branch", "model_config") if getattr(arguments, name)]
    if arguments.model is not None:
        if given:
            raise ValueError(f"`{'`, `'.join(given)}` cannot be given beside `model` {arguments.model!r}")
        model, processor = load_model(Blip2ForConditionalGeneration, arguments.model, training)
    else:
        model, processor = start_from(
            Blip2ForConditionalGeneration, lambda: _from_backbones(arguments, training), training
        )
    prepare_language_run(model, processor, arguments, recipe)
    return model, processor


def _from_backbones(
    arguments: Stage2Arguments, training: Blip2TrainingArguments
) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    options = {"stage1": arguments.stage1, "text": arguments.text, "text_branch": arguments.text_branch}
    overrides = config_overrides(arguments.model_config)
    half = training.frozen_language_dtype
    model = Blip2ForConditionalGeneration.from_backbones(
        arguments.vision,
        arguments.language,
        language_dtype=None if half is None else HALF_PRECISIONS[half],
        **options,
        **overrides,
    )
    queries = overrides.get("num_query_tokens")
    return model, stage2_processor(arguments.vision, arguments.language, num_query_tokens=queries, **options)


def stage2_trainer(
    model: Blip2ForConditionalGeneration,
    processor: Blip2Processor,
    arguments: Stage2Arguments,
    training: Blip2TrainingArguments,
) -> Blip2Trainer:
    """The trainer of a run; as `captions_trainer`.

    Raises:
        ValueError: for a `target` that the language model cannot have.
    """
    recipe = recipe_named(arguments.recipe, STAGE2_RECIPES)
    return captions_trainer(model, processor, arguments, training, recipe, target=arguments.target)
