"""Model cards of the shipped checkpoints: data, recipe, numbers, limits, as far as the folder of the run tells.

python examples/shapes/cards.py --run-dir shapes --shipped shapes/shipped
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from measured import Measured, number
from result_tables import MISSING, percent, plain, table
from safetensors import safe_open
from steps import SHIPPED

from blip2_hf.data.shapes.scenes import COLOURS, MOST_THINGS, SHAPES, SIDE, SIZES, TEXTURES
from blip2_hf.presets import CAPTION_PROMPT

CARD = "README.md"
_LICENCE = "apache-2.0"
_RETRIEVAL = "Blip2ForImageTextRetrieval"
_WEAKEST = 3  # kinds of questions that the card names
_PARTS = {"vision_model.": "vision tower", "language_model.": "language model"}

_GENERATION = """\
from blip2_hf import pipeline
from blip2_hf.data.shapes.drawing import render
from blip2_hf.data.shapes.splits import split_scene

picture = render(split_scene("test", 0, seed=0))
print(pipeline("image-to-text", model="{name}")(picture, prompt="{prompt}"))
print(pipeline("visual-question-answering", model="{name}")(picture, "how many objects are there?"))
"""
_SCORING = """\
import torch

from blip2_hf import Blip2ForImageTextRetrieval, Blip2Processor
from blip2_hf.data.shapes.drawing import render
from blip2_hf.data.shapes.splits import split_scene

model = Blip2ForImageTextRetrieval.from_pretrained("{name}").eval()
processor = Blip2Processor.from_pretrained("{name}")
pictures = [render(split_scene("test", number, seed=0)) for number in range(3)]
words = processor(text=["a red circle", "two objects"], return_tensors="pt")
with torch.no_grad():
    encoded = model.encode_image(**processor(images=pictures, return_tensors="pt"))
    print(model.match_matrix(encoded, **words).softmax(-1)[..., 1])  # [3 pictures, 2 texts]
"""


def write_card(folder: Path, run: Measured, source: str) -> None:
    """Writes README.md.

    Args:
        folder: of a checkpoint (config.json, model.safetensors), with the name that it is shipped under.
        run: what was measured.
        source: the training run that it is.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    retrieval = _RETRIEVAL in (config.get("architectures") or [])
    tags = (
        ["blip-2", "image-text-retrieval"] if retrieval else ["blip-2", "image-captioning", "visual-question-answering"]
    )
    header = ModelCardData(
        license=_LICENCE,
        library_name="blip2_hf",
        pipeline_tag="zero-shot-image-classification" if retrieval else "image-to-text",
        tags=["blip2_hf", *tags],
        language=["en"],
    )
    snippet = (_SCORING if retrieval else _GENERATION).format(name=folder.name, prompt=CAPTION_PROMPT)
    sections = [
        f"# {folder.name}",
        "A very small [BLIP-2](https://arxiv.org/abs/2301.12597), trained from nothing on generated pictures of shapes "
        "(docs/shapes.md of `blip2_hf`). It is part of the package, so no network is needed; for trying things "
        "out, tests and demonstrations.",
        f"## Use\n\n```python\n{snippet}```",
        f"## Parts\n\n{_parts(folder)}",
        f"## Data\n\n{_data(run, retrieval)}",
        f"## Recipe\n\n{_recipe(run, source)}",
        f"## Numbers\n\n{_numbers(run, folder.name, source, retrieval)}",
        f"## Limits\n\n{_limits(run, source, retrieval)}",
        f"## Licence\n\n{_LICENCE}: weights, tokenizers and data were all made with this project's code.",
    ]
    card = ModelCard(f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    (folder / CARD).write_text(str(card), encoding="utf-8", newline="\n")


def _parts(folder: Path) -> str:
    counts: dict[str, int] = {}
    kinds: dict[str, set[str]] = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dictionary)
            part = next((title for prefix, title in _PARTS.items() if name.startswith(prefix)), "Q-Former and heads")
            tensor = file.get_slice(name)
            counts[part] = counts.get(part, 0) + math.prod(tensor.get_shape())
            kinds.setdefault(part, set()).add(tensor.get_dtype())
    rows = [[part, ", ".join(sorted(kinds[part])), f"{count:,}"] for part, count in counts.items()]
    return table(["part", "stored as", "parameters"], rows, texts=2)


def _data(run: Measured, retrieval: bool) -> str:
    train = run.size("train")
    scenes = "Generated scenes" if train is None else f"{train:,} generated scenes"
    return (
        f"{scenes} of 1 to {MOST_THINGS} things on {SIDE}-pixel pictures: {len(SHAPES)} shapes "
        f"({', '.join(SHAPES)}), {len(COLOURS)} colours ({', '.join(COLOURS)}), {len(SIZES)} sizes, {len(TEXTURES)} "
        "textures, each with five captions and six questions. One combination of shape and colour in eight is in no "
        f"training picture.{'' if retrieval else ' The language model was trained on text of the same language alone.'}"
    )


def _recipe(run: Measured, source: str) -> str:
    rows = []
    for folder in run.backbones(source).values():
        found = run.backbone(folder) or {}
        script = "train_tower.py" if folder.startswith("towers/") else "train_language.py"
        rows.append([folder, script, *map(_whole, (found.get("steps"), found.get("batch_size"))), "in the script"])
    for name in run.lineage(source):
        found = run.trained(name) or {}
        rate = found.get("learning_rate")
        how = f"{found['script']}, {found['recipe']}" if found.get("script") else MISSING
        rows.append(
            [
                name,
                how,
                *map(_whole, (found.get("steps"), found.get("batch"))),
                MISSING if rate is None else f"{rate:.2g}",
            ]
        )
    return (
        f"{table(['step', 'script and recipe', 'optimiser steps', 'batch', 'peak learning rate'], rows, texts=2)}\n\n"
        "All of it: `python examples/shapes/run_all.py --output-dir shapes`. What has no recipe file was trained first "
        "and then frozen."
    )


def _whole(value: Any) -> str:
    return MISSING if value is None else f"{value:,}"


def _numbers(run: Measured, name: str, source: str, retrieval: bool) -> str:
    """Of the files as they are shipped, else of the run before it was exported."""
    tasks = ("retrieval",) if retrieval else ("captioning", "vqa")
    as_shipped = any(run.report(task, "test", f"shipped/{name}") for task in tasks)
    model = f"shipped/{name}" if as_shipped else source
    what = "of these files" if as_shipped else "of the run, before it was stored in half precision"
    size = run.size("test")
    rows = []
    if retrieval:
        best = run.oracle("test")
        for title, names in (("images to texts", "txt_r1"), ("texts to images", "img_r1")):
            cells = [run.metric("retrieval", "test", model, score, names) for score in ("itc", "reranked")]
            rows.append([f"{title}, recall at 1", *map(percent, [*cells, number(best, names)])])
        body = table(["", "ITC, %", "re-ranked by ITM, %", "possible at best, %"], rows)
    else:
        truth, blind = run.truth("test", model), run.blind("test", "opt-base")
        rows = [
            ["captions whose every statement is true, %", percent(number(truth, "true"))],
            ["statements per caption", plain(number(truth, "statements_per_caption"))],
            ["CIDEr", percent(run.metric("captioning", "test", model, "cider"))],
            ["questions answered, %", percent(run.metric("vqa", "test", model, "overall"))],
            ["questions, most frequent answer to each, %", percent(number(blind, "most_frequent_of_question"))],
        ]
        body = table(["", "value"], rows)
    scenes = "Unseen scenes" if size is None else f"{size:,} unseen scenes"
    return f"{scenes}, {what}, evaluated with `blip2 eval`:\n\n{body}"


def _limits(run: Measured, source: str, retrieval: bool) -> str:
    """What is known, and what was measured to be weakest."""
    lines = [
        "Photos, drawings by others, other shapes or colours: whatever it says about them means nothing.",
        "Words that are not of the world's language are unknown to it.",
    ]
    if retrieval:
        lines.append("Captions fit other scenes than their own, too: the last column is what that leaves.")
        return "\n".join(f"- {line}" for line in lines)
    kinds = (run.report("vqa", "test", source) or {}).get("metrics", {}).get("per_question_type", {})
    weakest = sorted((value, kind) for kind, value in kinds.items() if value is not None)[:_WEAKEST]
    if weakest:
        said = ", ".join(f"{kind} ({percent(value)} %)" for value, kind in weakest)
        lines.append(f"The kinds of questions that it answers worst: {said}.")
    elsewhere = [
        ("captions wholly true", number(run.truth("combinations", source), "true")),
        ("questions answered", run.metric("vqa", "combinations", source, "overall")),
    ]
    said = ", ".join(f"{title} {percent(value)} %" for title, value in elsewhere if value is not None)
    if said:
        lines.append(f"Shapes in colours that it has never seen them in: {said}.")
    return "\n".join(f"- {line}" for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run-dir", required=True, help="--output-dir of run_all.py")
    parser.add_argument("--shipped", required=True, help="folder of the exported checkpoints")
    arguments = parser.parse_args(argv)
    run = Measured(Path(arguments.run_dir))
    for name, source in SHIPPED.items():
        folder = Path(arguments.shipped, name)
        if (folder / "config.json").is_file():
            write_card(folder, run, source)
            print(folder / CARD)
        else:
            print(f"{folder} is not there: no card")


if __name__ == "__main__":
    main()
