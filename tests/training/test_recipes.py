"""Recipes: the paper's numbers and the original code's, and the arguments they give."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import get_scheduler

from blip2_hf.training.recipes import RECIPES, Recipe, read_recipe, recipe_arguments, recipe_fields, recipe_named
from blip2_hf.training.task_recipes import RETRIEVAL_RECIPES, STAGE2_RECIPES

CPU = {"use_cpu": True, "fp16": False, "report_to": "none"}


def test_the_paper() -> None:
    """Li et al. 2023, sec. 3.4 and table of pre-training."""
    recipe = RECIPES["paper"]
    assert dict(recipe.batch_size) == {"vit_g": 1680, "vit_l": 2320}
    assert (recipe.steps, recipe.warmup_steps, recipe.learning_rate) == (250_000, 2000, 1e-4)
    assert (recipe.beta1, recipe.beta2, recipe.weight_decay) == (0.9, 0.98, 0.05)
    assert (recipe.image_size, recipe.crop_scale, recipe.flip) == (224, (0.5, 1.0), 0.5)


def test_the_original_code() -> None:
    recipe = RECIPES["lavis"]
    assert (recipe.epochs, recipe.warmup_steps, recipe.beta2) == (10, 5000, 0.999)
    assert (recipe.min_learning_rate, recipe.warmup_learning_rate) == (1e-5, 1e-6)
    assert recipe.batch_size["vit_g"] == 16 * 100


@pytest.mark.parametrize(
    ("tower", "processes", "given", "each", "accumulated"),
    [
        ("vit_g", 16, None, 105, 1),
        ("vit_g", 1, None, 105, 16),
        ("vit_g", 8, None, 105, 2),
        ("vit_g", 3, None, 80, 7),
        ("vit_g", 35, None, 48, 1),
        ("vit_g", 3, 56, 56, 10),
        ("vit_l", 16, None, 145, 1),
        ("vit_l", 4, 58, 58, 10),
    ],
)
def test_the_batch_is_reached(tower: str, processes: int, given, each: int, accumulated: int) -> None:
    fields = recipe_fields("paper", tower=tower, processes=processes, per_device_batch_size=given)
    assert (fields["per_device_train_batch_size"], fields["gradient_accumulation_steps"]) == (each, accumulated)
    assert each * processes * accumulated == RECIPES["paper"].batch_size[tower]


def rates(args, steps: list[int], total: int) -> list[float]:
    """What the arguments' scheduler gives at some steps of a run of `total`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(total),
        num_training_steps=total,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return [args.learning_rate * scheduler.lr_lambdas[0](step) for step in steps]


def test_the_papers_schedule(tmp_path) -> None:
    args = recipe_arguments("paper", str(tmp_path), overrides=CPU)
    middle = 2000 + (250_000 - 2000) // 2
    found = rates(args, [0, 1000, 2000, middle, 250_000], args.max_steps)
    assert found == pytest.approx([0.0, 5e-5, 1e-4, 5e-5, 0.0], abs=1e-12)
    assert args.max_grad_norm == 0 and args.adam_beta2 == 0.98 and args.frozen_vision_dtype == "float16"


def test_the_original_codes_schedule(tmp_path) -> None:
    args = recipe_arguments("lavis", str(tmp_path), overrides=CPU)
    total = 50_000
    found = rates(args, [0, 2500, 5000, total], total)
    expected = [1e-6, 1e-6 + 99e-6 * 2500 / 5000, 1e-4, 1e-5]
    assert found == pytest.approx(expected, rel=2e-3)
    quarter = 5000 + (total - 5000) // 4
    assert rates(args, [quarter], total)[0] == pytest.approx(1e-5 + 9e-5 * (1 + math.cos(math.pi / 4)) / 2, rel=1e-3)
    assert args.num_train_epochs == 10 and args.adam_beta2 == 0.999


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "papers"}, "`recipe` must be one of paper, lavis, smoke or a .json file, got 'papers'"),
        ({"name": "paper", "tower": "vit_h"}, "`tower` must be one of vit_g, vit_l, got 'vit_h'"),
        ({"name": "paper", "processes": 3, "per_device_batch_size": 105}, "3 processes may have 1, 2, 4, 5, 7, 8, 10"),
        ({"name": "paper", "processes": 9}, "none, as 1680 is no multiple of 9"),
        ({"name": "paper", "per_device_batch_size": 0}, "`per_device_batch_size` 0"),
        ({"name": "paper", "llm": "opt"}, "`llm` must be one of opt_2.7b, opt_6.7b, flan_t5, got 'opt'"),
        ({"name": "paper", "precision": "fp16"}, "`precision` must be one of float16, bfloat16, float32 or None"),
    ],
)
def test_what_does_not_go(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_fields(**arguments)


def test_more_processes_than_the_recipe_had(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    fields = recipe_fields("smoke")
    assert (fields["per_device_train_batch_size"], fields["gradient_accumulation_steps"]) == (2, 1)
    assert recipe_fields("smoke", processes=1)["per_device_train_batch_size"] == 4
    fields = recipe_fields("paper", recipes=STAGE2_RECIPES, llm="opt_2.7b", processes=32)
    assert (fields["per_device_train_batch_size"], fields["gradient_accumulation_steps"]) == (60, 1)
    with pytest.raises(ValueError, match="none, as 4 is no multiple of 8"):
        recipe_fields("smoke", processes=8)


@pytest.mark.parametrize("name", ["paper", "smoke"])
def test_the_language_model_must_be_said(name: str, tmp_path) -> None:
    """Not taken for OPT: neither its batch nor its precision would be right."""
    for call in (recipe_fields, lambda name, **kw: recipe_arguments(name, str(tmp_path), **kw)):
        with pytest.raises(ValueError, match="`llm` must be one of opt_2.7b, opt_6.7b, flan_t5 .* got None"):
            call(name, recipes=STAGE2_RECIPES)
    assert recipe_fields(name, recipes=RETRIEVAL_RECIPES)["frozen_language_dtype"] is None


def test_unknown_overrides(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"unknown fields \['learning_rat'\]"):
        recipe_arguments("smoke", str(tmp_path), overrides={"learning_rat": 1.0})


def test_columns() -> None:
    recipe = Recipe(
        batch_size={"opt_2.7b": 2, "opt_6.7b": 3, "flan_t5": 5},
        processes=1,
        learning_rate={"vit_g": 1.0, "vit_l": 2.0},
        layer_decay=0.5,
    )
    column = recipe.column("vit_l", "flan_t5")
    assert (column.batch_size, column.learning_rate, column.layer_decay, column.beta2) == (5, 2.0, 0.5, 0.98)
    assert recipe.column().batch_size == 2 and recipe.column().learning_rate == 1.0


@pytest.mark.parametrize(
    ("given", "fp16", "bf16", "vision", "language"),
    [
        ({}, True, False, "float16", None),
        ({"llm": "opt_6.7b"}, True, False, "float16", "float16"),
        ({"llm": "flan_t5"}, False, True, "bfloat16", "bfloat16"),
        ({"llm": "opt_2.7b", "precision": "bfloat16"}, False, True, "bfloat16", "bfloat16"),
        ({"llm": "opt_2.7b", "precision": "float32"}, False, False, None, None),
    ],
)
def test_precision(given: dict, fp16: bool, bf16: bool, vision: str | None, language: str | None) -> None:
    """T5 never in float16 (sec. 3.4), and what is frozen as autocast computes."""
    fields = recipe_fields("paper", **given)
    assert (fields["fp16"], fields["bf16"]) == (fp16, bf16)
    assert (fields["frozen_vision_dtype"], fields["frozen_language_dtype"]) == (vision, language)


def test_float32_recipes_stay_so_unless_told() -> None:
    fields = recipe_fields("smoke", llm="opt_2.7b")
    assert not fields["fp16"] and fields["frozen_vision_dtype"] is fields["frozen_language_dtype"] is None
    assert recipe_fields("smoke", llm="opt_2.7b", precision="bfloat16")["bf16"]


def written(folder, content) -> str:
    path = folder / "recipe.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_recipe_from_a_file(tmp_path) -> None:
    path = written(tmp_path, {"base": "paper", "batch_size": 64, "processes": 1, "epochs": 3, "crop_scale": [1, 1.0]})
    expected = replace(RECIPES["paper"], batch_size=64, processes=1, epochs=3, steps=None, crop_scale=(1, 1.0))
    assert recipe_named(path) == expected
    fields = recipe_fields(path, processes=1)
    assert (fields["per_device_train_batch_size"], fields["gradient_accumulation_steps"]) == (64, 1)
    assert fields["num_train_epochs"] == 3 and "max_steps" not in fields
    path = written(tmp_path, {"base": "smoke", "batch_size": {"opt_2.7b": 2, "opt_6.7b": 4, "flan_t5": 8}})
    assert read_recipe(path, STAGE2_RECIPES).column("vit_g", "flan_t5").batch_size == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([], "must be an object, got list"),
        ({"steps": 2}, "must have a `base` of paper, lavis, smoke, got None"),
        ({"base": "smoke", "step": 2}, r"unknown fields \['step'\]"),
        ({"base": "smoke", "flip": "no"}, "`flip` of recipe .* must be float, got 'no'"),
        ({"base": "smoke", "flip": True}, "`flip` of recipe .* must be float, got True"),
        ({"base": "smoke", "batch_size": {"vit_g": 2}}, "`batch_size` of recipe"),
        ({"base": "smoke", "crop_scale": [1]}, "`crop_scale` of recipe"),
        ({"base": "smoke", "steps": 2, "epochs": 1}, "must have `steps` or `epochs`, got both"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, content, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe(written(tmp_path, content))
    with pytest.raises(ValueError, match="recipe"):
        recipe_named(str(tmp_path / "absent.json"))
