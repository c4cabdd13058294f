"""What is run to train and evaluate everything, as commands of the public example scripts with recipe files.

Paths in commands are relative to the folder of the run, but for the scripts and recipes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent
RECIPES = HERE / "recipes"

GROUPS = (
    "world",
    "backbones",
    "stage1",
    "stage2",
    "tuning",
    "evaluation",
    "easy-vqa",
    "export",
    "findings",
    "results",
)
QUERIES = 16
# Of the Q-Former besides its BERT (make_bert.py): the space of the contrastive loss.
_SPACE = 64
LANGUAGE_MODELS = {"opt": "opt-base", "opt-small": "opt-small", "t5": "t5"}
# The findings compare runs that are shorter than the shipped ones.
_FINDING_STEPS = {"stage1": 1500, "stage2": 1000, "vqa": 1500}
FINDING_QUERIES = (4, 8, 32)
# Before the T5 is asked questions. After the whole stage 2 its Q-Former, whose text branch is that of stage 1, did not
# learn to look for what a question asks.
SHORT_STAGE2 = "stage2-t5-short"
# Re-ranked by ITM for each query: the paper's 128 would be an eighth of the 1,000 images.
_CANDIDATES = 32
# Of the runs of figure 5: so many checkpoints are kept and measured.
_CURVE_POINTS = 8
# What is shipped, and the run that it is.
SHIPPED = {
    "blip2-tiny-opt": "captioning-opt",
    "blip2-tiny-opt-vqa": "vqa-opt",
    "blip2-tiny-t5": "vqa-t5",
    "blip2-tiny-itm": "retrieval",
}
# The language models have never read its words ("teal", "rectangle"), so they learn them with an adapter.
_EASY_VQA_OPTIONS = ("--lora", "true")


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: unique; also where it is marked as done.
        group: one of `GROUPS`.
        script: below examples/.
        options: of the command.
        always: it is run whenever it is asked for, as what it reads may have changed.
    """

    name: str
    group: str
    script: str
    options: tuple[str, ...]
    always: bool = False


@dataclass(frozen=True)
class Settings:
    """What all steps share.

    Attributes:
        device: "cpu" or "cuda".
        precision: of autocast in training, "float32" or "bfloat16".
        quick: a tiny pass, to see that everything runs.
        seeds: how many runs there are of each finding.
        workers: of the loaders.
    """

    device: str = "cpu"
    precision: str = "float32"
    quick: bool = False
    seeds: int = 1
    workers: int = 1


def all_steps(settings: Settings) -> list[Step]:
    """Every step, each behind those that it needs."""
    steps = [*_world(settings), *_backbones(settings)]
    steps.append(_stage1(settings, "stage1", "stage1", "base"))
    steps += [_stage2(settings, f"stage2-{name}", "stage2", llm, "stage1") for name, llm in LANGUAGE_MODELS.items()]
    steps.append(_stage2(settings, SHORT_STAGE2, "stage2", "t5", "stage1", recipe="stage2_short"))
    steps += _tuning(settings)
    steps += _evaluation(settings)
    steps += _easy_vqa(settings)
    steps += _export(settings)
    for seed in range(settings.seeds):
        steps += _findings(settings, seed)
    return [*steps, *_results()]


# -- what is trained -------------------------------------------------------------------------------------------------


def _world(settings: Settings) -> list[Step]:
    options = ["--output-dir", "world"]
    if settings.quick:
        options += ["--sizes", json.dumps({"train": 64, "val": 8, "test": 8, "combinations": 8})]
        options += ["--documents", json.dumps({"train": 400, "val": 40}), "--processes", "1"]
    return [Step("world", "world", "shapes/make_world.py", tuple(options))]


def _backbones(settings: Settings) -> list[Step]:
    common = ["--device", settings.device, "--precision", settings.precision, "--workers", str(settings.workers)]
    if settings.quick:
        common += ["--steps", "3", "--batch-size", "8", "--eval-samples", "8"]
    corpus = ("--corpus", "world/corpus_train.txt")
    steps = [
        _own("backbones", f"tower-{size}", "train_tower.py", f"towers/{size}", ("--size", size, *common))
        for size in ("base", "small")
    ]
    steps += [
        _own(
            "backbones",
            f"language-{size}",
            "train_language.py",
            f"language/{size}",
            ("--size", size, *corpus, "--eval-corpus", "world/corpus_val.txt", *common),
        )
        for size in LANGUAGE_MODELS.values()
    ]
    return [*steps, _own("backbones", "bert", "make_bert.py", "bert", corpus)]


def _own(group: str, name: str, script: str, output: str, options: Iterable[str]) -> Step:
    return Step(name, group, f"shapes/{script}", ("--output-dir", output, *options))


def _run(
    settings: Settings,
    name: str,
    group: str,
    task: str,
    options: Sequence[str],
    *,
    steps: int | None = None,
    seed: int = 0,
    data: str = "world",
    recipe: str | None = None,
    kept: int = 1,
) -> Step:
    """A run of run_<task>.py with its recipe.

    Args:
        steps: other than the recipe's; with `_CURVE_POINTS` checkpoints and evaluations.
        data: folder with the sets.
        recipe: name of the file; default: the task's.
        kept: how many checkpoints, the last ones.
    """
    kind = "questions" if task == "vqa" else "captions"
    common = ["--recipe", str(RECIPES / f"{recipe or task}.json"), "--output_dir", f"runs/{name}", "--seed", str(seed)]
    common += ["--train_sets", f"{data}/sets/{kind}_train.json", "--eval_sets", f"{data}/sets/{kind}_val.json"]
    common += ["--precision", settings.precision, "--use_cpu", str(settings.device == "cpu").lower()]
    common += ["--save_total_limit", str(kept), "--report_to", "none", "--disable_tqdm", "true"]
    common += ["--dataloader_num_workers", str(0 if settings.quick else settings.workers)]
    if settings.quick:
        common += ["--max_steps", "2", "--save_steps", "2", "--logging_steps", "1", "--warmup_steps", "1"]
        common += ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1"]
    elif steps is not None:
        common += ["--max_steps", str(steps), "--save_steps", str(max(1, steps // _CURVE_POINTS))]
    return Step(name, group, f"run_{task}.py", (*common, *options))


def _stage1(
    settings: Settings,
    name: str,
    group: str,
    tower: str,
    *,
    queries: int = QUERIES,
    steps: int | None = None,
    seed: int = 0,
    **fields: float,
) -> Step:
    config = {"num_query_tokens": queries, "image_text_hidden_size": _SPACE, **fields}
    options = ["--vision", f"towers/{tower}", "--text", "bert", "--model_config", json.dumps(config)]
    return _run(settings, name, group, "stage1", options, steps=steps, seed=seed)


def _stage2(
    settings: Settings,
    name: str,
    group: str,
    language: str,
    stage1: str | None,
    *,
    steps: int | None = None,
    seed: int = 0,
    recipe: str | None = None,
    kept: int = 1,
) -> Step:
    options = ["--language", f"language/{language}"]
    if stage1 is None:  # the paper's figure 5: no representation learning
        options += ["--vision", "towers/base", "--text", "bert"]
        options += ["--model_config", json.dumps({"num_query_tokens": QUERIES})]
    else:
        options += ["--stage1", f"runs/{stage1}"]
    return _run(settings, name, group, "stage2", options, steps=steps, seed=seed, recipe=recipe, kept=kept)


def _tuning(settings: Settings) -> list[Step]:
    steps = [_run(settings, "retrieval", "tuning", "retrieval", ["--model", "runs/stage1"])]
    for llm in ("opt", "t5"):
        model = ["--model", f"runs/stage2-{llm}"]
        steps.append(_run(settings, f"captioning-{llm}", "tuning", "captioning", model))
        start = {"opt": model, "t5": ["--model", f"runs/{SHORT_STAGE2}"]}[llm]
        questions = [*start, "--text_branch", "runs/stage1"]
        steps.append(_run(settings, f"vqa-{llm}", "tuning", "vqa", questions))
    return steps


# -- what is measured ------------------------------------------------------------------------------------------------


def _evaluation(settings: Settings) -> list[Step]:
    steps = []
    for split in ("test",) if settings.quick else ("test", "combinations"):
        steps.append(_script("oracle", split, "--world", "world", "--split", split))
        steps += [_blind(settings, split, llm) for llm in ("opt-base", "t5")]
        for model in ("stage1", "retrieval"):
            steps.append(_eval_retrieval(settings, "evaluation", model, split))
        for model in ("stage2-opt", "stage2-t5", "captioning-opt", "captioning-t5"):
            steps += _eval_captioning(settings, "evaluation", model, split)
        for model in ("stage2-opt", "stage2-opt-small", "stage2-t5", "vqa-opt", "vqa-t5"):
            steps.append(_eval_vqa(settings, "evaluation", model, split))
    return steps


def _script(kind: str, name: str, *options: str, group: str = "evaluation") -> Step:
    """A step of eval_<kind>.py, which writes eval/<kind>/<name>.json."""
    path = f"eval/{kind}/{name}"
    return Step(path, group, f"shapes/eval_{kind}.py", (*options, "--output", f"{path}.json"))


def _blind(settings: Settings, split: str, llm: str, world: str = "world", group: str = "evaluation") -> Step:
    options = ["--world", world, "--split", split, "--language", f"language/{llm}", "--device", settings.device]
    options += ["--limit", "8"] if settings.quick else []
    return _script("blind", f"{split if world == 'world' else world}/{llm}", *options, group=group)


def _measured(settings: Settings, name: str, model: str) -> list[str]:
    folder = model if model.startswith("shipped/") else f"runs/{model}"
    options = ["--model", folder, "--output-dir", name, "--device", settings.device]
    return [*options, "--limit", "8"] if settings.quick else options


def _eval_retrieval(settings: Settings, group: str, model: str, split: str) -> Step:
    """By ITC, and re-ranked by ITM: both are in the report."""
    name = f"eval/retrieval/{split}/{model}"
    options = ["--annotations", "world/dataset_shapes.json", "--images", "world/images", "--split", split]
    options += ["--k", str(_CANDIDATES)]
    return Step(name, group, "eval_retrieval.py", (*options, *_measured(settings, name, model)))


def _eval_captioning(settings: Settings, group: str, model: str, split: str) -> list[Step]:
    name = f"eval/captioning/{split}/{model}"
    options = ["--annotations", "world/dataset_shapes.json", "--images", "world/images", "--split", split]
    options += ["--metrics", "none" if settings.quick else "available", *_measured(settings, name, model)]
    # a stage-2 model has learned captions without prompt
    options += ["--prompt", ""] if model.split("/")[-1].startswith("stage2") else []
    truth = ["--predictions", name, "--scenes", f"world/scenes_{split}.jsonl", "--output", f"{name}/truth.json"]
    return [
        Step(name, group, "eval_captioning.py", tuple(options)),
        Step(f"{name}-truth", group, "shapes/eval_truth.py", tuple(truth)),
    ]


def _eval_vqa(settings: Settings, group: str, model: str, split: str, world: str = "world") -> Step:
    name = f"eval/vqa/{split if world == 'world' else world}/{model}"
    options = ["--questions", f"{world}/questions_{split}.json", "--annotations", f"{world}/annotations_{split}.json"]
    options += ["--images", f"{world}/images/{split}", "--image-pattern", "{:012d}.png"]
    return Step(name, group, "eval_vqa.py", (*options, *_measured(settings, name, model)))


def _eval_curve(settings: Settings, group: str, model: str) -> Step:
    options = ["--run", f"runs/{model}", "--world", "world", "--device", settings.device]
    options += ["--questions", "8", "--captions", "8"] if settings.quick else []
    return _script("curve", model, *options, group=group)


def _easy_vqa(settings: Settings) -> list[Step]:
    """Pictures and questions that others have made; left out where the package is not installed (run_all.py)."""
    group = "easy-vqa"
    options = ["--output-dir", group, *(["--pictures", "16"] if settings.quick else [])]
    steps = [Step("easy-vqa-files", group, "shapes/easy_vqa_files.py", tuple(options))]
    for family, llm in (("opt", "opt-base"), ("t5", "t5")):
        name, model = f"easy-vqa-{family}", ["--model", f"runs/vqa-{family}", *_EASY_VQA_OPTIONS]
        steps.append(_run(settings, name, group, "vqa", model, data=group, recipe="easy_vqa"))
        steps.append(_blind(settings, "test", llm, group, group))
        steps.append(_eval_vqa(settings, group, name, "test", group))
    return steps


def _export(settings: Settings) -> list[Step]:
    """What is shipped, measured as it is shipped."""
    steps = []
    for name, run in SHIPPED.items():
        folder = f"shipped/{name}"
        options = ("--model", f"runs/{run}", "--output-dir", folder, "--connector", "float16")
        steps.append(Step(f"export-{name}", "export", "shapes/export.py", options))
        if run == "retrieval":
            steps.append(_eval_retrieval(settings, "export", folder, "test"))
        else:
            steps += _eval_captioning(settings, "export", folder, "test")
            steps.append(_eval_vqa(settings, "export", folder, "test"))
    return steps


def _results() -> list[Step]:
    """Model cards, tables and figures of all that is there."""
    cards = Step("cards", "results", "shapes/cards.py", ("--run-dir", ".", "--shipped", "shipped"), always=True)
    tables = ("--run-dir", ".", "--output-dir", "results")
    return [cards, Step("results", "results", "shapes/results.py", tables, always=True)]


# -- the paper's findings --------------------------------------------------------------------------------------------


def _findings(settings: Settings, seed: int) -> list[Step]:
    """Tables 2 and 6, figure 5 (both families of language models, at several steps), question conditioning, number of
    queries: short runs that differ in one thing."""
    first, second = _FINDING_STEPS["stage1"], _FINDING_STEPS["stage2"]
    place = f"findings/{seed}"
    group = "findings"
    more = {"steps": first, "seed": seed}
    bridges = {
        "stage1": _stage1(settings, f"{place}/stage1", group, "base", **more),
        "no-itg": _stage1(settings, f"{place}/stage1-no-itg", group, "base", itg_weight=0.0, **more),
        "small-tower": _stage1(settings, f"{place}/stage1-small-tower", group, "small", **more),
    }
    for queries in FINDING_QUERIES:
        name = f"{place}/stage1-{queries}-queries"
        bridges[f"{queries}-queries"] = _stage1(settings, name, group, "base", queries=queries, **more)
    more = {"steps": second, "seed": seed}
    reference = bridges["stage1"].name
    figure5 = []
    for name, llm in (("stage2", "opt-base"), ("stage2-t5", "t5")):
        for suffix, start in (("", reference), ("-without-stage1", None)):
            kept = {"kept": _CURVE_POINTS + 1, **more}
            figure5.append(_stage2(settings, f"{place}/{name}{suffix}", group, llm, start, **kept))
    models = [*figure5]
    models.append(_stage2(settings, f"{place}/stage2-small-llm", group, "opt-small", reference, **more))
    for name, bridge in bridges.items():
        if name not in ("stage1", "no-itg"):
            models.append(_stage2(settings, f"{place}/stage2-{name}", group, "opt-base", bridge.name, **more))
    measured = [_eval_retrieval(settings, group, bridge.name, "test") for bridge in bridges.values()]
    measured += [_eval_curve(settings, group, model.name) for model in figure5]
    for model in models:
        measured += _eval_captioning(settings, group, model.name, "test")
        measured.append(_eval_vqa(settings, group, model.name, "test"))
    asked = []
    for name, branch in {"conditioned": ["--text_branch", f"runs/{reference}"], "unconditioned": []}.items():
        options = ["--model", f"runs/{models[0].name}", *branch]
        run = f"{place}/vqa-{name}"
        asked.append(_run(settings, run, group, "vqa", options, steps=_FINDING_STEPS["vqa"], seed=seed))
        measured.append(_eval_vqa(settings, group, run, "test"))
    return [*bridges.values(), *models, *asked, *measured]
