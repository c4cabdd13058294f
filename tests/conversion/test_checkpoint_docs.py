"""docs/checkpoints.md against the table of checkpoints: every row, every command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from blip2_hf.checkpoints import CHECKPOINTS
from conversion.convert import build_parser
from conversion.precisions import written_as
from original_keys import target

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
TOWERS = {"eva_vit_g": "EVA ViT-g", "clip_vit_l": "CLIP ViT-L"}
TOWER_FILES = {"eva_vit_g": "eva_vit_g.pth", "clip_vit_l": "clip_vit_L.pth"}
ROWS = [re.split(r" *\| *", line.strip("| \n")) for line in TEXT.splitlines() if line.startswith("| `blip2-")]
COMMANDS = [shlex.split(line, comments=True)[2:] for line in TEXT.splitlines() if line.startswith("python conversion/")]


def code(text: str | None) -> str:
    return "–" if text is None else f"`{text}`"


def test_a_row_for_every_checkpoint():
    assert [row[0] for row in ROWS] == [f"`{name}`" for name in CHECKPOINTS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`"))
def test_row(row):
    name = row[0].strip("`")
    entry = CHECKPOINTS[name]
    size, parameters = sizes(name)
    assert row[1:6] == [
        TOWERS[entry.tower],
        code(entry.language_model),
        str(entry.image_size),
        f"{parameters / 1e9:.2f}B",
        f"{size / 1e9:.1f} GB",
    ]
    stage, use = {
        ("retrieval", 224): ("1", "retrieval, stage 2"),
        ("retrieval", 364): ("fine-tuned", "retrieval as in COCO"),
        ("generation", 224): ("2", "captions, answers"),
        ("generation", 364): ("fine-tuned", "captions as in COCO"),
    }[entry.kind, entry.image_size]
    assert row[6:8] == [stage, use]
    assert (stage == "fine-tuned") == ("COCO" in entry.trained_for)
    assert row[8] == ("–" if entry.license is None else entry.license.upper())
    assert row[9] == ("never released" if entry.original_file is None else code(entry.original_file))


def sizes(name: str) -> tuple[int, int]:
    """Bytes and number of the parameters as a conversion stores them, the frozen ones halved."""
    entry = CHECKPOINTS[name]
    half = getattr(torch, entry.language_dtype or "float16")
    counts = {
        key: (torch.Size(i.shape).numel(), i.dtype)
        for key, i in target(name).infos.items()
        if key not in target(name).tied
    }
    size = sum(count * written_as(key, dtype, frozen=half).itemsize for key, (count, dtype) in counts.items())
    return size, sum(count for count, _ in counts.values())


def test_a_command_for_every_original_file():
    found = {}
    for command in COMMANDS:
        args = build_parser().parse_args(command)
        if args.source.endswith(".pth"):
            found[str(args.to)] = args
    assert list(found) == [name for name, entry in CHECKPOINTS.items() if entry.original_file is not None]
    for name, args in found.items():
        entry = CHECKPOINTS[name]
        tower = None if entry.image_size == 364 else TOWER_FILES[entry.tower]  # a fine-tuned one is in the file
        assert (args.source, args.tower, args.llm) == (entry.original_file, tower, entry.language_model)
        assert args.dtype == entry.language_dtype and args.layout == "ours"
