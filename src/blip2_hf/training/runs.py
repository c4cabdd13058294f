"""What all runs share: arguments with the recipe's values, the model to start from, the data, the run itself."""

from __future__ import annotations

import functools
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import HfArgumentParser, set_seed
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from ..checkpoints import resolve_checkpoint
from ..configuration import Blip2Config
from ..data.pairs import EpochDataset, ImageTextPairs
from ..data.records import existing_file, existing_folder
from ..data.samples import Entry
from ..data.sources import image_folder
from ..data.streaming import ExampleStream
from ..data.training_sets import training_set
from ..image_processing import Blip2ImageProcessor
from ..modeling.base import Blip2PreTrainedModel
from ..processing import Blip2Processor
from ..stage1_processing import image_side
from .arguments import Blip2TrainingArguments
from .checkpoints import last_complete_checkpoint
from .precision import HALF_PRECISIONS
from .recipes import Recipe, recipe_fields, recipe_named
from .trainer import Blip2Trainer

logger = logging.get_logger(__name__)

# The starting point in `output_dir` that connector-only checkpoints refer to.
START_FOLDER = "start"
# From here on a decoder-only LLM, and up to here a tower, is nearer to the other one of the paper's two.
_OPT_6B_WIDTH, _VIT_L_WIDTH = 4096, 1024


@dataclass
class RunArguments:
    """What every run needs besides `Blip2TrainingArguments`.

    Attributes:
        recipe: name in the task's table of recipes, or a JSON file of one (`read_recipe`), whose settings are the
            defaults of all other arguments.
        model: folder or Hub id of a model to go on from, with its processor.
        image_size: side of the images in pixels, for which the tower's positions are interpolated; default: the
            recipe's where the tower is trained, else as the tower takes them.
        precision: "float16", "bfloat16" or "float32", of autocast and of what is frozen; default: the recipe's, for
            the language model that there is.
        train_folder: photos with `metadata.csv` or `metadata.jsonl` (columns file_name, caption).
        train_sets: instead of it, a JSON file that describes one or more sets (`blip2_hf.data.training_sets`).
        eval_folder, eval_sets: likewise, to evaluate on.
        resume: go on from the last complete checkpoint of `output_dir`, if there is one.
    """

    recipe: str = field(default="paper", metadata={"help": "paper, lavis (where there is one), smoke, or a file."})
    model: str | None = field(default=None, metadata={"help": "Model to go on from."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the images in pixels."})
    precision: str | None = field(default=None, metadata={"help": "float16, bfloat16 or float32."})
    train_folder: str | None = field(default=None, metadata={"help": "Photos with metadata.csv or metadata.jsonl."})
    train_sets: str | None = field(default=None, metadata={"help": "JSON file of sets to train on."})
    eval_folder: str | None = field(default=None, metadata={"help": "Photos to evaluate on."})
    eval_sets: str | None = field(default=None, metadata={"help": "JSON file of sets to evaluate on."})
    resume: bool = field(default=True, metadata={"help": "Go on from the last complete checkpoint, if there is one."})


Arguments = TypeVar("Arguments", bound=RunArguments)
Model = TypeVar("Model", bound=Blip2PreTrainedModel)


# -- arguments -------------------------------------------------------------------------------------------------------


def parse_run(
    kind: type[Arguments],
    recipes: Mapping[str, Recipe],
    columns: Callable[[Namespace], Mapping[str, Any]],
    output_dir: str,
    argv: Sequence[str] | None = None,
) -> tuple[Arguments, Blip2TrainingArguments]:
    """Arguments of the command line; what is not given is as the recipe has it.

    Where there is a set to evaluate on, this is done whenever a checkpoint is written, and at the end. Fields of both
    classes are options. `WORLD_SIZE` (which `accelerate launch` sets) is the number of processes that share the
    recipe's batch.

    Args:
        kind: class of the task's own arguments.
        recipes: the task's.
        columns: what of the arguments decides on the recipe's column (`tower`, `llm`, `precision` of `recipe_fields`).
        output_dir: default of that argument.
        argv: default: the command line's.

    Raises:
        ValueError: as `recipe_fields`.
    """
    parser = HfArgumentParser((kind, Blip2TrainingArguments))
    parser.set_defaults(per_device_train_batch_size=None, save_steps=None, output_dir=output_dir)
    first, *_ = parser.parse_known_args(argv)
    recipe = recipe_named(first.recipe, recipes)
    chosen = {**columns(first)} if recipe.half_precision else {**columns(first), "precision": "float32"}
    if first.precision is not None:
        chosen["precision"] = first.precision
    fields = recipe_fields(
        first.recipe,
        recipes=recipes,
        per_device_batch_size=first.per_device_train_batch_size,
        **chosen,
    )
    # Without any data, an example makes a set for both, or there will be an error.
    if first.eval_folder or first.eval_sets or not (first.train_folder or first.train_sets):
        saved = getattr(first.save_strategy, "value", first.save_strategy)
        fields |= {"eval_strategy": saved if saved in ("steps", "epoch") else "no"}
        fields |= {"eval_steps": first.save_steps or recipe.save_steps}
    parser.set_defaults(**fields)
    arguments, training = parser.parse_args_into_dataclasses(argv)
    return arguments, training


def source_config(source: str, part: str) -> PreTrainedConfig:
    """The config of one part ("vision_config", "text_config") of a BLIP-2 checkpoint, or of a checkpoint of that part
    alone."""
    source = resolve_checkpoint(source)
    raw, _ = PreTrainedConfig.get_config_dict(source)
    if "qformer_config" in raw:
        return getattr(Blip2Config.from_pretrained(source), part)
    from transformers.models.auto.configuration_auto import AutoConfig

    return AutoConfig.from_pretrained(source)


def tower_column(vision_config: PreTrainedConfig) -> str:
    """The recipe's column for a tower: "vit_l" up to its width of 1024, else "vit_g"."""
    return "vit_l" if vision_config.hidden_size <= _VIT_L_WIDTH else "vit_g"


def language_column(text_config: PreTrainedConfig) -> dict[str, str]:
    """The recipe's column for a language model, and the precision for it.

    Encoder-decoders are taken like FlanT5, others like the OPT model that is nearer in width. OPT is run in float16
    as in the paper, all others in bfloat16: T5 diverges in float16, and most that are newer were made in bfloat16.

    Returns:
        `llm` and `precision`, for `recipe_fields`.
    """
    language = text_config.get_text_config()
    precision = "float16" if language.model_type == "opt" else "bfloat16"
    if text_config.is_encoder_decoder:
        return {"llm": "flan_t5", "precision": precision}
    return {"llm": "opt_6.7b" if language.hidden_size >= _OPT_6B_WIDTH else "opt_2.7b", "precision": precision}


# -- model -----------------------------------------------------------------------------------------------------------


def seeded(
    build: Callable[[Arguments, Blip2TrainingArguments], tuple[Model, Blip2Processor]],
) -> Callable[[Arguments, Blip2TrainingArguments], tuple[Model, Blip2Processor]]:
    """For the functions that build a run's model: what is new in it is drawn from the run's `seed`, on every process
    the same. (What training draws is `Trainer`'s to seed.)"""

    @functools.wraps(build)
    def build_seeded(arguments: Arguments, training: Blip2TrainingArguments) -> tuple[Model, Blip2Processor]:
        set_seed(training.seed)
        return build(arguments, training)

    return build_seeded


def written_once(folder: Path, write: Callable[[Path], object], training: Blip2TrainingArguments) -> str:
    """`folder` as a string, written by `write` unless it is there: by the first process alone, while the others wait.

    Raises:
        OSError: on another process, if it is not there afterwards.
    """
    with training.main_process_first(local=False, desc=f"writing {folder}"):
        if training.process_index > 0 and not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not there: the first process did not write it, or not to a file system that all see"
            )
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            unfinished.rename(folder)
    return os.fspath(folder)


def config_overrides(given: dict[str, Any] | str | None) -> dict[str, Any]:
    """Fields of `Blip2Config` that a new model is to have, of `model_config`: a dictionary, or one in JSON.

    Raises:
        ValueError: for anything else.
    """
    try:
        fields = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(f"`model_config` must be a JSON object, got {given!r}") from error
    if fields is not None and not isinstance(fields, dict):
        raise ValueError(f"`model_config` must be a JSON object, got {given!r}")
    return dict(fields or {})


def load_model(kind: type[Model], source: str, training: Blip2TrainingArguments) -> tuple[Model, Blip2Processor]:
    """A checkpoint (folder, Hub id or short name) and its processor.

    A language model is read in the precision that it will be frozen in, never in float32; all else is float32.
    """
    half = training.frozen_language_dtype
    options = {} if half is None else {"language_dtype": HALF_PRECISIONS[half]}
    return kind.from_pretrained(source, **options), Blip2Processor.from_pretrained(source)


def start_from(
    kind: type[Model], build: Callable[[], tuple[Model, Blip2Processor]], training: Blip2TrainingArguments
) -> tuple[Model, Blip2Processor]:
    """What `build` gives. With `save_connector_only` it is first saved in full in `output_dir`/start, unless it is
    there, and loaded from there: the checkpoint that those of the run refer to."""
    if not training.save_connector_only:
        return build()

    def write(folder: Path) -> None:
        for part in build():
            part.save_pretrained(folder)

    start = written_once(Path(training.output_dir, START_FOLDER), write, training)
    set_seed(training.seed)  # only the process that built has drawn numbers
    return load_model(kind, start, training)


def prepare_model(model: Blip2PreTrainedModel, *, train_vision: bool) -> None:
    """Freezes the language model, and the tower unless it is trained; what is trained becomes float32."""
    if train_vision:
        model.unfreeze_vision()
    else:
        model.freeze_vision()
    if "language_model" in model._backbones():
        model.freeze_language_model()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def set_image_size(
    model: Blip2PreTrainedModel, processor: Blip2Processor, arguments: RunArguments, recipe: Recipe
) -> None:
    """Makes tower and processor take images of the size asked for (`RunArguments.image_size`), in place.

    Raises:
        ValueError: as `resize_image_positions`.
    """
    own = image_side(model.config.vision_config)
    size = arguments.image_size or (recipe.image_size if recipe.train_vision else None) or own
    if arguments.image_size is None and recipe.image_size not in (None, size):
        logger.warning(f"the tower takes images of {own} pixels, recipe {arguments.recipe!r} has {recipe.image_size}")
    if size == own:
        return
    model.resize_image_positions(size)
    settings = processor.image_processor.to_dict()
    cut = {"crop_size": size} if settings.get("do_center_crop") else {}
    processor.image_processor = Blip2ImageProcessor.from_dict(settings, size=size, **cut)


# -- data and run ----------------------------------------------------------------------------------------------------


def run_set(
    arguments: RunArguments,
    transform: Callable,
    *,
    training: bool,
    seed: int,
    prepare: Callable[[Sequence[Entry]], Sequence[Entry]] | None = None,
    folder_source: Callable[[str], Sequence[Entry]] = image_folder,
) -> EpochDataset | ExampleStream | None:
    """The set to train or to evaluate on, of a folder of photos or of described sets.

    Args:
        arguments: of the run.
        transform: makes an example of a sample.
        training: whether `train_folder` and `train_sets` are meant, or those for evaluation.
        seed: of captions, augmentation and order.
        prepare: what is done to the samples, such as `one_sample_per_caption` (see `training_set`).
        folder_source: reads the folder.

    Returns:
        A map-style set or a stream, which is endless for training alone; None if there is nothing to evaluate on.

    Raises:
        ValueError: for both, for nothing to train on, and for what is wrong with one.
    """
    kind = "train" if training else "eval"
    folder, sets = getattr(arguments, f"{kind}_folder"), getattr(arguments, f"{kind}_sets")
    if folder is not None and sets is not None:
        raise ValueError(f"`{kind}_folder` and `{kind}_sets` cannot both be given, got {folder!r} and {sets!r}")
    if sets is not None:
        existing_file(sets, f"{kind}_sets")
        return training_set(sets, transform, seed=seed, prepare=prepare, repeat=training)
    if folder is not None:
        existing_folder(folder, f"{kind}_folder")
        samples = folder_source(folder)
        return ImageTextPairs(samples if prepare is None else prepare(samples), transform, seed=seed, images="source")
    if training:
        raise ValueError(
            "`train_folder` must be a folder of photos with metadata.csv or metadata.jsonl, or `train_sets` a JSON "
            "file of sets, got neither"
        )
    return None


def run(trainer: Blip2Trainer, *, resume: bool = True) -> dict[str, Any]:
    """Trains (from the last complete checkpoint, if there is one and `resume`), evaluates and saves.

    Returns:
        Metrics of training, and of evaluation if there is a set for it.
    """
    checkpoint = last_complete_checkpoint(trainer.args.output_dir) if resume else None
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if trainer.eval_dataset is not None:
        metrics |= _evaluated_last(trainer) or trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    return metrics


def _evaluated_last(trainer: Blip2Trainer) -> dict[str, Any] | None:
    """Metrics of an evaluation behind the last step, if there was one and the weights are still those."""
    if trainer.args.load_best_model_at_end:
        return None
    for entry in reversed(trainer.state.log_history):
        if entry["step"] == trainer.state.global_step and "eval_runtime" in entry:
            return {name: value for name, value in entry.items() if name != "step"}
    return None
