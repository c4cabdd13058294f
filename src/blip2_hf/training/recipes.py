"""Named settings of representation learning (stage 1), and the arguments that they give.

Sources: "paper", Li et al. 2023, sec. 3.4 (batch sizes, steps, optimiser, schedule); "lavis", the released
configuration of the original code (`pretrain_stage1`), where it differs from the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .arguments import Blip2TrainingArguments

TOWERS = ("vit_g", "vit_l")


@dataclass(frozen=True)
class Stage1Recipe:
    """Every hyper-parameter of a stage-1 run.

    Attributes:
        batch_size: pairs per optimiser step, by vision tower.
        processes: GPUs it was run on.
        steps: optimiser steps; or `epochs`.
        learning_rate: the peak of a cosine that ends at `min_learning_rate`, after `warmup_steps` of linear rise from
            `warmup_learning_rate`.
        beta1, beta2, weight_decay: of AdamW; no decay for biases, norms and temperature.
        max_grad_norm: 0: gradients are not clipped.
        image_size: side in pixels; None: as the tower takes it.
        crop_scale: least and greatest share of the picture that a random resized crop takes.
        flip: probability of a horizontal flip.
        max_length: most tokens of a caption, [CLS] and [SEP] included.
        fp16: float16 autocast with scaled gradients.
        frozen_vision_dtype: precision of the frozen tower.
        seed: of everything random.
        use_cpu: whether to leave a GPU alone.
    """

    batch_size: Mapping[str, int]
    processes: int
    learning_rate: float
    steps: int | None = None
    epochs: float | None = None
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    warmup_learning_rate: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.05
    max_grad_norm: float = 0.0
    image_size: int | None = 224
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5
    max_length: int = 32
    fp16: bool = True
    frozen_vision_dtype: str | None = "float16"
    seed: int = 42
    logging_steps: int = 50
    save_steps: int = 5000
    workers: int = 4
    use_cpu: bool = False


RECIPES: dict[str, Stage1Recipe] = {
    # The paper names no minimum learning rate for this stage: the cosine ends at 0.
    "paper": Stage1Recipe(
        batch_size={"vit_g": 1680, "vit_l": 2320},
        processes=16,
        steps=250_000,
        learning_rate=1e-4,
        warmup_steps=2000,
    ),
    # In the original code the rate changes from epoch to epoch; here it follows the same cosine from step to step. The
    # original code also distorts the images of Visual Genome (RandAugment), but not those of COCO.
    "lavis": Stage1Recipe(
        batch_size={"vit_g": 1600, "vit_l": 1600},
        processes=16,
        epochs=10,
        learning_rate=1e-4,
        min_learning_rate=1e-5,
        warmup_steps=5000,
        warmup_learning_rate=1e-6,
        beta2=0.999,
    ),
    # Shows that everything runs, on any machine.
    "smoke": Stage1Recipe(
        batch_size={"vit_g": 4, "vit_l": 4},
        processes=1,
        steps=20,
        learning_rate=1e-3,
        warmup_steps=2,
        image_size=None,
        fp16=False,
        frozen_vision_dtype=None,
        logging_steps=5,
        save_steps=10,
        workers=0,
        use_cpu=True,
    ),
}


def recipe_named(name: str) -> Stage1Recipe:
    """
    Raises:
        ValueError: for an unknown name, naming those that are known.
    """
    if name not in RECIPES:
        raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


def recipe_fields(
    name: str, *, tower: str = "vit_g", processes: int = 1, per_device_batch_size: int | None = None
) -> dict[str, Any]:
    """Fields of `Blip2TrainingArguments` that carry out a recipe.

    The recipe's batch is reached on any number of processes by accumulating gradients. ITM and ITG are then those of
    the whole batch, but ITC contrasts within `processes * per_device_batch_size` pairs; `chunk_size` keeps all
    negatives instead.

    Args:
        name: one of `RECIPES`.
        tower: "vit_g" or "vit_l", on which the batch size depends.
        processes: number of processes (GPUs).
        per_device_batch_size: pairs of a process at a time; default: as on the recipe's own number of GPUs.

    Raises:
        ValueError: unknown names; a batch that cannot be divided like this.
    """
    recipe = recipe_named(name)
    if tower not in TOWERS:
        raise ValueError(f"`tower` must be one of {', '.join(TOWERS)}, got {tower!r}")
    whole = recipe.batch_size[tower]
    each = whole // recipe.processes if per_device_batch_size is None else per_device_batch_size
    accumulated, rest = divmod(whole, each * processes) if min(each, processes) > 0 else (0, 1)
    if rest or not accumulated:
        raise ValueError(
            f"`per_device_batch_size` {each} on {processes} processes does not divide the batch of {whole} pairs of "
            f"recipe {name!r}: {processes} processes may have {_divisors(whole, processes)}"
        )
    minimum: dict[str, float] = {"min_lr": recipe.min_learning_rate}
    scheduler = "cosine_with_min_lr"
    if recipe.warmup_learning_rate:
        scheduler = "cosine_warmup_with_min_lr"
        minimum["warmup_lr_rate"] = recipe.warmup_learning_rate / recipe.learning_rate
    length = {"max_steps": recipe.steps} if recipe.steps is not None else {"num_train_epochs": recipe.epochs}
    return {
        **length,
        "per_device_train_batch_size": each,
        "per_device_eval_batch_size": each,
        "gradient_accumulation_steps": accumulated,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": scheduler,
        "lr_scheduler_kwargs": minimum,
        "warmup_steps": recipe.warmup_steps,
        "adam_beta1": recipe.beta1,
        "adam_beta2": recipe.beta2,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "fp16": recipe.fp16,
        "frozen_vision_dtype": recipe.frozen_vision_dtype,
        "seed": recipe.seed,
        "logging_steps": recipe.logging_steps,
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "dataloader_num_workers": recipe.workers,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": not recipe.use_cpu and torch.cuda.is_available(),
        "use_cpu": recipe.use_cpu,
    }


def recipe_arguments(
    name: str,
    output_dir: str,
    *,
    tower: str = "vit_g",
    processes: int = 1,
    per_device_batch_size: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Blip2TrainingArguments:
    """`Blip2TrainingArguments` of a recipe; `overrides` are fields to be other than the recipe's.

    Raises:
        ValueError: as `recipe_fields`, and for unknown fields in `overrides`.
    """
    fields = recipe_fields(name, tower=tower, processes=processes, per_device_batch_size=per_device_batch_size)
    if unknown := sorted(set(overrides or {}) - set(Blip2TrainingArguments.__dataclass_fields__)):
        raise ValueError(f"`overrides` has unknown fields {unknown}")
    return Blip2TrainingArguments(output_dir=output_dir, **{**fields, **(overrides or {})})


def _divisors(whole: int, processes: int) -> str:
    share, rest = divmod(whole, processes) if processes > 0 else (0, 1)
    if rest:
        return f"none, as {whole} is no multiple of {processes}"
    small = [n for n in range(1, math.isqrt(share) + 1) if share % n == 0]
    return ", ".join(map(str, sorted({*small, *(share // n for n in small)})))
