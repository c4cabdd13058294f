"""What a recipe is, the recipes of representation learning (stage 1), and the arguments that a recipe gives.

Sources: "paper", Li et al. 2023, sec. 3.4 (batch sizes, steps, optimiser, schedule); "lavis", the released
configuration of the original code (`pretrain_stage1`), where it differs from the paper. The recipes of the other tasks
are in `task_recipes`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_origin, get_type_hints

import torch

from ..data.records import existing_file
from .arguments import Blip2TrainingArguments

# The columns of the paper's tables: what a value may depend on.
TOWERS = ("vit_g", "vit_l")
LLMS = ("opt_2.7b", "opt_6.7b", "flan_t5")
PRECISIONS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter of a run.

    `batch_size`, `learning_rate`, `beta2` and `layer_decay` are one value, or one for each of `TOWERS` or
    `LLMS`.

    Attributes:
        batch_size: samples per optimiser step.
        processes: GPUs it was run on.
        steps: optimiser steps; or `epochs`.
        learning_rate: the peak of a cosine that ends at `min_learning_rate`, after `warmup_steps` of linear rise from
            `warmup_learning_rate`.
        beta1, beta2, weight_decay: of AdamW; no decay for biases, norms and temperature.
        layer_decay: of the learning rate in the tower, where it is trained (see `parameter_groups`).
        max_grad_norm: 0: gradients are not clipped.
        train_vision: whether the tower is trained; else it is frozen. The language model always is.
        image_size: side in pixels; None: as the tower takes it.
        crop_scale: least and greatest share of the picture that a random resized crop takes.
        flip: probability of a horizontal flip.
        max_length: most tokens of a caption or question, special ones included.
        each_caption: whether an epoch goes through all captions of an image, not through one drawn for each.
        prompt: what stands before a caption, or around a question ("{}").
        target: of an encoder-decoder, "prefix_lm" (a beginning of the caption to the encoder) or "whole".
        generate: options of the texts that an evaluation generates.
        generate_all: whether it generates one for every sample; else it computes the loss.
        sample_texts: how many images of the evaluation set are captioned or answered for the log.
        half_precision: autocast, and what is frozen in half precision; else float32.
        checkpointing: activations are computed again in the backward pass (the numbers are the same).
        seed: of everything random.
        use_cpu: whether to leave a GPU alone.
    """

    batch_size: int | Mapping[str, int]
    processes: int
    learning_rate: float | Mapping[str, float]
    steps: int | None = None
    epochs: float | None = None
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    warmup_learning_rate: float = 0.0
    beta1: float = 0.9
    beta2: float | Mapping[str, float] = 0.98
    weight_decay: float = 0.05
    layer_decay: float | Mapping[str, float] = 1.0
    max_grad_norm: float = 0.0
    train_vision: bool = False
    image_size: int | None = 224
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5
    max_length: int = 32
    each_caption: bool = False
    prompt: str | None = None
    target: str = "whole"
    generate: Mapping[str, Any] | None = None
    generate_all: bool = False
    sample_texts: int = 0
    half_precision: bool = True
    checkpointing: bool = False
    seed: int = 42
    logging_steps: int = 50
    save_steps: int = 5000
    workers: int = 4
    use_cpu: bool = False

    def column(self, tower: str = TOWERS[0], llm: str = LLMS[0]) -> Recipe:
        """The recipe for one tower and language model: one value for each attribute.

        Raises:
            ValueError: for names that are not in `TOWERS` or `LLMS`.
        """
        for argument, given, known in (
            ("tower", tower, TOWERS),
            ("llm", llm, LLMS),
        ):
            if given not in known:
                raise ValueError(f"`{argument}` must be one of {', '.join(known)}, got {given!r}")
        chosen = {}
        for name in ("batch_size", "learning_rate", "beta2", "layer_decay"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                chosen[name] = value[tower] if tower in value else value[llm]
        return replace(self, **chosen)


RECIPES: dict[str, Recipe] = {
    # The paper names no minimum learning rate for this stage: the cosine ends at 0.
    "paper": Recipe(
        batch_size={"vit_g": 1680, "vit_l": 2320},
        processes=16,
        steps=250_000,
        learning_rate=1e-4,
        warmup_steps=2000,
    ),
    # In the original code the rate changes from epoch to epoch; here it follows the same cosine from step to step. The
    # original code also distorts the images of Visual Genome (RandAugment), but not those of COCO.
    "lavis": Recipe(
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
    "smoke": Recipe(
        batch_size={"vit_g": 4, "vit_l": 4},
        processes=1,
        steps=20,
        learning_rate=1e-3,
        warmup_steps=2,
        image_size=None,
        half_precision=False,
        logging_steps=5,
        save_steps=10,
        workers=0,
        use_cpu=True,
    ),
}


def recipe_named(name: str, recipes: Mapping[str, Recipe] = RECIPES) -> Recipe:
    """A recipe of a table, or that of a JSON file (`read_recipe`).

    Raises:
        ValueError: for an unknown name, naming those that are known; as `read_recipe`.
    """
    if name.endswith(".json"):
        return read_recipe(name, recipes)
    if name not in recipes:
        raise ValueError(f"`recipe` must be one of {', '.join(recipes)} or a .json file, got {name!r}")
    return recipes[name]


def read_recipe(path: str | os.PathLike, recipes: Mapping[str, Recipe] = RECIPES) -> Recipe:
    """A recipe from a file: a JSON object with fields of `Recipe`, and "base", the name of the one in `recipes` that
    has all others.

    "steps" and "epochs" replace each other.

    Raises:
        ValueError: for a file that is no such object, an unknown field or base, values of another type.
    """
    path = existing_file(path, "recipe")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`recipe` {path} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"`recipe` {path} must be an object, got {type(given).__name__}")
    base = given.pop("base", None)
    if base not in recipes:
        raise ValueError(f"`recipe` {path} must have a `base` of {', '.join(recipes)}, got {base!r}")
    hints = get_type_hints(Recipe)
    if unknown := sorted(set(given) - set(hints)):
        raise ValueError(f"`recipe` {path} has unknown fields {unknown}; Recipe has {', '.join(hints)}")
    for name, value in given.items():
        if not _fits(value, hints[name]):
            kind = Recipe.__annotations__[name]
            raise ValueError(f"`{name}` of recipe {path} must be {kind}, got {value!r}")
    lengths = [name for name in ("steps", "epochs") if given.get(name) is not None]
    if len(lengths) > 1:
        raise ValueError(f"`recipe` {path} must have `steps` or `epochs`, got both")
    if lengths:
        given = {"steps": None, "epochs": None, **given}
    if "crop_scale" in given:
        given["crop_scale"] = tuple(given["crop_scale"])
    return replace(recipes[base], **given)


def recipe_fields(
    name: str,
    *,
    recipes: Mapping[str, Recipe] = RECIPES,
    tower: str = TOWERS[0],
    llm: str | None = None,
    precision: str | None = None,
    processes: int | None = None,
    per_device_batch_size: int | None = None,
) -> dict[str, Any]:
    """Fields of `Blip2TrainingArguments` that carry out a recipe.

    The recipe's batch is reached on any number of processes by accumulating gradients. ITM and the language modelling
    losses are then those of the whole batch, but ITC contrasts within `processes * per_device_batch_size` pairs;
    `chunk_size` keeps all negatives instead.

    Args:
        name: one of `recipes`, or a JSON file (`read_recipe`).
        recipes: of the task: `RECIPES`, or a table of `task_recipes`.
        tower: "vit_g" or "vit_l", for values that depend on it.
        llm: "opt_2.7b", "opt_6.7b" or "flan_t5", for values that depend on it; None: there is none, which only tables
            without such values allow (stage 1, retrieval).
        precision: of autocast and of what is frozen: "float16", "bfloat16" or "float32" (neither autocast nor a change
            of what is frozen); default: float16, but bfloat16 for "flan_t5", which diverges in float16, and float32 if
            the recipe has it.
        processes: number of processes (GPUs); default: `WORLD_SIZE`, which `accelerate launch` sets, else 1.
        per_device_batch_size: samples of a process at a time; default: as on the recipe's own number of GPUs, or the
            most below that which the number of processes allows.

    Raises:
        ValueError: unknown names; no `llm` where it is needed; a batch that cannot be divided like this.
    """
    if llm is None and _depends_on_llm(recipes):
        raise ValueError(f"`llm` must be one of {', '.join(LLMS)} for recipes with a language model, got None")
    processes = int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes
    recipe = recipe_named(name, recipes).column(tower, llm or LLMS[0])
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)} or None, got {precision!r}")
    if precision is None:
        precision = "float32" if not recipe.half_precision else "bfloat16" if llm == "flan_t5" else "float16"
    half = None if precision == "float32" else precision
    each, accumulated = _division(name, recipe, processes, per_device_batch_size)
    return {
        **_schedule(recipe),
        "per_device_train_batch_size": each,
        "per_device_eval_batch_size": each,
        "gradient_accumulation_steps": accumulated,
        "adam_beta1": recipe.beta1,
        "adam_beta2": recipe.beta2,
        "weight_decay": recipe.weight_decay,
        "layer_decay": recipe.layer_decay if recipe.train_vision else 1.0,
        "max_grad_norm": recipe.max_grad_norm,
        "fp16": half == "float16",
        "bf16": half == "bfloat16",
        "frozen_vision_dtype": None if recipe.train_vision else half,
        "frozen_language_dtype": None if llm is None else half,
        "predict_with_generate": recipe.generate_all,
        "generate_kwargs": None if recipe.generate is None else dict(recipe.generate),
        "sample_texts": recipe.sample_texts,
        **_checkpointing(recipe.checkpointing),
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
    recipes: Mapping[str, Recipe] = RECIPES,
    tower: str = TOWERS[0],
    llm: str | None = None,
    precision: str | None = None,
    processes: int | None = None,
    per_device_batch_size: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Blip2TrainingArguments:
    """`Blip2TrainingArguments` of a recipe; `overrides` are fields to be other than the recipe's.

    Raises:
        ValueError: as `recipe_fields`, and for unknown fields in `overrides`.
    """
    given = recipe_fields(
        name,
        recipes=recipes,
        tower=tower,
        llm=llm,
        precision=precision,
        processes=processes,
        per_device_batch_size=per_device_batch_size,
    )
    if unknown := sorted(set(overrides or {}) - {field.name for field in fields(Blip2TrainingArguments)}):
        raise ValueError(f"`overrides` has unknown fields {unknown}")
    return Blip2TrainingArguments(output_dir=output_dir, **{**given, **(overrides or {})})


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a JSON file is what the type of a field of `Recipe` says."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any or (hint is type(None) and value is None):
        return True
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is Mapping:
        columns = parts[1] is Any or (isinstance(value, dict) and set(value) in (set(TOWERS), set(LLMS)))
        return isinstance(value, dict) and columns and all(_fits(one, parts[1]) for one in value.values())
    if origin is not None:  # a union
        return any(_fits(value, part) for part in parts)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if hint is float else hint)


def _schedule(recipe: Recipe) -> dict[str, Any]:
    minimum: dict[str, float] = {"min_lr": recipe.min_learning_rate}
    scheduler = "cosine_with_min_lr"
    if recipe.warmup_learning_rate:
        scheduler = "cosine_warmup_with_min_lr"
        minimum["warmup_lr_rate"] = recipe.warmup_learning_rate / recipe.learning_rate
    length = {"max_steps": recipe.steps} if recipe.steps is not None else {"num_train_epochs": recipe.epochs}
    return {
        **length,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": scheduler,
        "lr_scheduler_kwargs": minimum,
        "warmup_steps": recipe.warmup_steps,
    }


def _checkpointing(on: bool) -> dict[str, bool]:
    """The field under the name that the installed transformers has for it (another one before 5.23)."""
    names = {field.name for field in fields(Blip2TrainingArguments)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": on}


def _depends_on_llm(recipes: Mapping[str, Recipe]) -> bool:
    """Whether a table of recipes has a column for each of `LLMS`."""
    values = [getattr(recipe, field.name) for recipe in recipes.values() for field in fields(Recipe)]
    return any(isinstance(value, Mapping) and set(LLMS) & set(value) for value in values)


def _division(name: str, recipe: Recipe, processes: int, per_device_batch_size: int | None) -> tuple[int, int]:
    """Samples of a process at a time, and how many such batches are accumulated."""
    whole = recipe.batch_size
    each = per_device_batch_size
    if each is None:  # the recipe's own share, or the most below it that divides
        each = most = whole // recipe.processes
        if processes > 0:
            each = next((n for n in range(most, 0, -1) if whole % (n * processes) == 0), most)
    accumulated, rest = divmod(whole, each * processes) if min(each, processes) > 0 else (0, 1)
    if rest or not accumulated:
        raise ValueError(
            f"`per_device_batch_size` {each} on {processes} processes does not divide the batch of {whole} samples of "
            f"recipe {name!r}: {processes} processes may have {_divisors(whole, processes)}"
        )
    return each, accumulated


def _divisors(whole: int, processes: int) -> str:
    share, rest = divmod(whole, processes) if processes > 0 else (0, 1)
    if rest:
        return f"none, as {whole} is no multiple of {processes}"
    small = [n for n in range(1, math.isqrt(share) + 1) if share % n == 0]
    return ", ".join(map(str, sorted({*small, *(share // n for n in small)})))
