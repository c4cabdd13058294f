"""A stage-1 run from the command line or from Python: arguments, model, data, training."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.utils import logging

from ..data.collator import ImageTextCollator, PairTransform
from ..data.pairs import EpochDataset, ImageTextPairs
from ..data.sources import image_folder
from ..data.streaming import ExampleStream
from ..data.training_sets import training_set
from ..modeling.retrieval import Blip2ForImageTextRetrieval
from ..processing import Blip2Processor
from ..stage1_processing import image_side, stage1_processor
from .arguments import Blip2TrainingArguments
from .recipes import recipe_fields, recipe_named
from .trainer import Blip2Trainer

logger = logging.get_logger(__name__)

# The starting point in `output_dir` that connector-only checkpoints refer to.
START_FOLDER = "start"


@dataclass
class Stage1Arguments:
    """What a stage-1 run needs besides `Blip2TrainingArguments`.

    Attributes:
        recipe: name in `RECIPES`, whose settings are the defaults of all other arguments.
        tower: "vit_g" or "vit_l": which of the recipe's batch sizes.
        model: folder or Hub id of a retrieval model to go on from, with its processor; or `vision` and `text`.
        vision: folder or Hub id of a vision tower.
        text: folder or Hub id of a BERT.
        train_folder: photos with `metadata.csv` or `metadata.jsonl` (columns file_name, caption).
        train_sets: instead of it, a JSON file that describes one or more sets (`blip2_hf.data.training_sets`).
        eval_folder, eval_sets: likewise, to evaluate on.
        resume: go on from the last complete checkpoint of `output_dir`, if there is one.
    """

    recipe: str = field(default="paper", metadata={"help": "paper, lavis or smoke."})
    tower: str = field(default="vit_g", metadata={"help": "vit_g or vit_l: which of the recipe's batch sizes."})
    model: str | None = field(default=None, metadata={"help": "Retrieval model to go on from."})
    vision: str | None = field(default=None, metadata={"help": "Vision tower to start from."})
    text: str = field(default="bert-base-uncased", metadata={"help": "BERT to start from."})
    train_folder: str | None = field(default=None, metadata={"help": "Photos with metadata.csv or metadata.jsonl."})
    train_sets: str | None = field(default=None, metadata={"help": "JSON file of sets to train on."})
    eval_folder: str | None = field(default=None, metadata={"help": "Photos to evaluate on."})
    eval_sets: str | None = field(default=None, metadata={"help": "JSON file of sets to evaluate on."})
    resume: bool = field(default=True, metadata={"help": "Go on from the last complete checkpoint, if there is one."})


def parse_stage1(argv: Sequence[str] | None = None) -> tuple[Stage1Arguments, Blip2TrainingArguments]:
    """Arguments of the command line; what is not given is as the recipe has it.

    Fields of both classes are options. `WORLD_SIZE` (which `accelerate launch` sets) is the number of processes that
    share the recipe's batch.

    Raises:
        ValueError: as `recipe_fields`.
    """
    parser = HfArgumentParser((Stage1Arguments, Blip2TrainingArguments))
    parser.set_defaults(per_device_train_batch_size=None, output_dir="stage1")
    first, *_ = parser.parse_known_args(argv)
    recipe_named(first.recipe)
    given = (
        {}
        if first.per_device_train_batch_size is None
        else {"per_device_batch_size": first.per_device_train_batch_size}
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    fields = recipe_fields(first.recipe, tower=first.tower, processes=processes, **given)
    parser.set_defaults(**fields)
    arguments, training = parser.parse_args_into_dataclasses(argv)
    return arguments, training


def build_stage1(
    arguments: Stage1Arguments, training: Blip2TrainingArguments
) -> tuple[Blip2ForImageTextRetrieval, Blip2Processor]:
    """The model to train, with a frozen tower, and its processor.

    With `save_connector_only`, a new model is first saved in full in `output_dir`/start, which its checkpoints refer
    to.

    Raises:
        ValueError: neither or both of `model` and `vision`.
    """
    if (arguments.model is None) == (arguments.vision is None):
        raise ValueError(
            f"exactly one of `model` and `vision` must be given, got {arguments.model!r} and {arguments.vision!r}"
        )
    if arguments.model is not None:
        processor = Blip2Processor.from_pretrained(arguments.model)
        return _loaded(arguments.model), processor
    processor = stage1_processor(arguments.vision, arguments.text)
    if not training.save_connector_only:
        return Blip2ForImageTextRetrieval.from_backbones(arguments.vision, arguments.text), processor
    start = Path(training.output_dir, START_FOLDER)
    with training.main_process_first(local=False, desc="starting point"):
        if not start.is_dir():
            unfinished = start.with_name(f"{START_FOLDER}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            Blip2ForImageTextRetrieval.from_backbones(arguments.vision, arguments.text).save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
            unfinished.rename(start)
    return _loaded(os.fspath(start)), processor


def _loaded(source: str) -> Blip2ForImageTextRetrieval:
    model = Blip2ForImageTextRetrieval.from_pretrained(source)
    model.freeze_vision()
    return model


def stage1_pairs(
    folder: str | None, sets: str | None, processor: Blip2Processor, recipe: str, *, training: bool, seed: int
) -> EpochDataset | ExampleStream | None:
    """Pairs of a folder of photos or of described sets, with the recipe's augmentation if they are for training.

    Returns:
        A map-style set or a stream; None if neither is given.

    Raises:
        ValueError: for both, and for what is wrong with one.
    """
    kind = "train" if training else "eval"
    if folder is not None and sets is not None:
        raise ValueError(f"`{kind}_folder` and `{kind}_sets` cannot both be given, got {folder!r} and {sets!r}")
    settings = recipe_named(recipe)
    if training:
        transform = PairTransform.for_training(
            processor, max_length=settings.max_length, scale=settings.crop_scale, flip=settings.flip
        )
    else:
        transform = PairTransform.for_evaluation(processor, max_length=settings.max_length)
    if sets is not None:
        return training_set(sets, transform, seed=seed)
    return None if folder is None else ImageTextPairs(image_folder(folder), transform, seed=seed, images="source")


def stage1_trainer(
    model: Blip2ForImageTextRetrieval,
    processor: Blip2Processor,
    arguments: Stage1Arguments,
    training: Blip2TrainingArguments,
) -> Blip2Trainer:
    """The trainer of a run.

    Raises:
        ValueError: without anything to train on, and for what is wrong with it.
    """
    recipe, seed = arguments.recipe, training.data_seed
    if arguments.train_folder is None and arguments.train_sets is None:
        raise ValueError(
            "`train_folder` must be a folder of photos with metadata.csv or metadata.jsonl, or `train_sets` a JSON "
            "file of sets, got neither"
        )
    size, expected = image_side(model.config.vision_config), recipe_named(recipe).image_size
    if expected not in (None, size):
        logger.warning(f"the tower takes images of {size} pixels, recipe {recipe!r} has {expected}")
    train = stage1_pairs(arguments.train_folder, arguments.train_sets, processor, recipe, training=True, seed=seed)
    evaluation = stage1_pairs(arguments.eval_folder, arguments.eval_sets, processor, recipe, training=False, seed=seed)
    tokenizer = getattr(processor, "qformer_tokenizer", None) or processor.tokenizer
    return Blip2Trainer(
        model,
        training,
        ImageTextCollator(tokenizer.pad_token_id),
        train,
        evaluation,
        processing_class=processor,
    )


def run_stage1(trainer: Blip2Trainer, *, resume: bool = True) -> dict[str, Any]:
    """Trains (from the last complete checkpoint, if there is one and `resume`), evaluates and saves.

    Returns:
        Metrics of training, and of evaluation if there is a set for it.
    """
    from .checkpoints import last_complete_checkpoint

    checkpoint = last_complete_checkpoint(trainer.args.output_dir) if resume else None
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    return metrics
