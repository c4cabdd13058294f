"""Files of the original at a small size, written once."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny_original


@dataclass(frozen=True)
class OriginalFiles:
    """A folder with the files of `tiny_original`, and the command line that converts them."""

    folder: Path

    def command(self, stage: str, to: Path, *more: str) -> list[str]:
        """Arguments for a checkpoint without its frozen parts; `stage`: "itm", "opt" or "t5"."""
        given = ["--tower", self / f"{stage}_tower.pth", "--config", self / f"{stage}.json"]
        given += ["--text", self / "bert"] if stage == "itm" else ["--llm", self / stage]
        return [str(part) for part in (self / f"{stage}.pth", "--to", to, *given, *more)]

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """A comparison collects garbage after each side, which takes longer than its tiny models if all of the imported
    libraries are searched for it."""
    gc.freeze()


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> OriginalFiles:
    folder = tmp_path_factory.mktemp("original")
    for stage, image_token in (("itm", None), ("opt", 250), ("t5", 100)):
        tiny_original.save_stored(folder / f"{stage}.pth", stage, optimizer={}, config={"run": {}}, epoch=9)
        tiny_original.save_tower(folder / f"{stage}_tower.pth", stage)
        tiny_original.save_config(folder / f"{stage}.json", stage, image_token)
    for family in ("opt", "t5"):
        tiny_original.save_language_folder(folder / family, family)
    tiny_original.save_bert_folder(folder / "bert")
    return OriginalFiles(folder)
