"""A stage-1 run from the command line or from Python: arguments, model, data, training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.collator import ImageTextCollator, PairTransform
from ..data.samples import one_sample_per_caption
from ..modeling.retrieval import Blip2ForImageTextRetrieval
from ..processing import Blip2Processor
from ..stage1_processing import stage1_processor
from .arguments import Blip2TrainingArguments
from .recipes import RECIPES, Recipe, recipe_named
from .runs import (
    RunArguments,
    config_overrides,
    load_model,
    parse_run,
    prepare_model,
    run,
    run_set,
    seeded,
    set_image_size,
    start_from,
)
from .trainer import Blip2Trainer


@dataclass
class Stage1Arguments(RunArguments):
    """What a stage-1 run needs besides `Blip2TrainingArguments`.

    Attributes:
        model: a retrieval model to go on from; or `vision` and `text`.
        tower: "vit_g" or "vit_l": which of the recipe's batch sizes.
        vision: folder or Hub id of a vision tower.
        text: folder or Hub id of a BERT.
        model_config: of a new model, fields of `Blip2Config` to be other than usual, such as
            {"num_query_tokens": 16}; as JSON on the command line.
    """

    tower: str = field(default="vit_g", metadata={"help": "vit_g or vit_l: which of the recipe's batch sizes."})
    vision: str | None = field(default=None, metadata={"help": "Vision tower to start from."})
    text: str = field(default="bert-base-uncased", metadata={"help": "BERT to start from."})
    model_config: dict | str | None = field(
        default=None, metadata={"help": "Fields of the new model's Blip2Config, as JSON."}
    )


def parse_stage1(argv: Sequence[str] | None = None) -> tuple[Stage1Arguments, Blip2TrainingArguments]:
    """As `parse_run`."""
    return parse_run(Stage1Arguments, RECIPES, lambda first: {"tower": first.tower}, "stage1", argv)


@seeded
def build_stage1(
    arguments: Stage1Arguments, training: Blip2TrainingArguments
) -> tuple[Blip2ForImageTextRetrieval, Blip2Processor]:
    """The model to train, with a frozen tower, and its processor.

    With `save_connector_only`, a new model is first saved in full (`start_from`).

    Raises:
        ValueError: neither or both of `model` and `vision`; `model` with `model_config`; as `from_backbones`.
    """
    if (arguments.model is None) == (arguments.vision is None):
        raise ValueError(
            f"exactly one of `model` and `vision` must be given, got {arguments.model!r} and {arguments.vision!r}"
        )
    kind, backbones = Blip2ForImageTextRetrieval, (arguments.vision, arguments.text)
    overrides = config_overrides(arguments.model_config)
    if arguments.model is not None:
        if overrides:
            raise ValueError(f"`model_config` cannot be given beside `model` {arguments.model!r}, got {overrides}")
        model, processor = load_model(kind, arguments.model, training)
    else:
        model, processor = start_from(
            kind, lambda: (kind.from_backbones(*backbones, **overrides), stage1_processor(*backbones)), training
        )
    prepare_model(model, train_vision=False)
    set_image_size(model, processor, arguments, recipe_named(arguments.recipe))
    return model, processor


def stage1_trainer(
    model: Blip2ForImageTextRetrieval,
    processor: Blip2Processor,
    arguments: RunArguments,
    training: Blip2TrainingArguments,
    recipe: Recipe | None = None,
) -> Blip2Trainer:
    """The trainer of a run with the objectives of stage 1.

    Args:
        recipe: whose data settings are used; default: that of stage 1 which `arguments` name.

    Raises:
        ValueError: without anything to train on, and for what is wrong with it.
    """
    recipe = recipe or recipe_named(arguments.recipe)
    seed, each = training.data_seed, one_sample_per_caption if recipe.each_caption else None
    augmented = PairTransform.for_training(
        processor, max_length=recipe.max_length, scale=recipe.crop_scale, flip=recipe.flip
    )
    plain = PairTransform.for_evaluation(processor, max_length=recipe.max_length)
    tokenizer = getattr(processor, "qformer_tokenizer", None) or processor.tokenizer
    return Blip2Trainer(
        model,
        training,
        ImageTextCollator(tokenizer.pad_token_id),
        run_set(arguments, augmented, training=True, seed=seed, prepare=each),
        run_set(arguments, plain, training=False, seed=seed),
        processing_class=processor,
    )


def run_stage1(trainer: Blip2Trainer, *, resume: bool = True) -> dict[str, Any]:
    """As `run`."""
    return run(trainer, resume=resume)
