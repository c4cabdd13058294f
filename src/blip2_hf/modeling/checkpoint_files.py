"""Weight files of a folder: which there are, and whether they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open

CONNECTOR_NAME = "connector.safetensors"
_WHOLE_FILES = ("model.safetensors", "model.safetensors.index.json")


def weight_files(folder: str | os.PathLike) -> dict[Path, int]:
    """Single weight files and shard indices of a folder, with the time they were written (ns)."""
    files = [path for pattern in _WHOLE_FILES for path in Path(folder).glob(pattern)]
    return {path: path.stat().st_mtime_ns for path in files}


def remove_other_layout(before: dict[Path, int], after: dict[Path, int]) -> None:
    """A single file that stayed behind would be loaded instead of the shards just written, and the other way round an
    index would name shards that are gone."""
    written = {path for path, time in after.items() if before.get(path) != time}
    if written:
        for path in set(after) - written:
            path.unlink()


def stored_keys(folder: Path) -> list[str]:
    """Names of the tensors in a local checkpoint; empty if it has none in safetensors."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            return list(file.keys())
    return list(json.loads(index.read_text())["weight_map"]) if index.is_file() else []


def check_files(source: str, variant: str | None) -> None:
    """Raises ValueError if a local checkpoint lacks a file or has a broken one; a Hub's files are checked by it."""
    folder = Path(source)
    if not folder.is_dir():
        return
    suffix = f".{variant}" if variant else ""
    index = folder / f"model.safetensors.index{suffix}.json"
    files = [folder / f"model{suffix}.safetensors"]
    if not files[0].exists() and index.exists():
        try:
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of weight files: {error}") from error
    for file in files:
        if file.exists():
            check_safetensors(file)
        elif len(files) > 1 or index.exists():
            raise ValueError(f"{file} is missing, {index.name} names it")


def check_safetensors(file: Path) -> None:
    """Raises ValueError naming the file unless its header is whole and its length is what the header says."""
    size = file.stat().st_size
    try:
        entries, begin = read_header(file)
        ends = [entry["data_offsets"][1] for entry in entries.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a safetensors file or is truncated ({size} bytes): {error}") from error
    expected = begin + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{file} is truncated or damaged: it has {size} bytes, its header says {expected}")


def read_header(file: Path) -> tuple[dict[str, dict], int]:
    """What a safetensors file says of its tensors, by name, and where the bytes begin that `data_offsets` count from.

    Raises:
        ValueError: if it is cut off or no JSON.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("header is cut off")
        header = json.loads(stream.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + length


def some(keys: Iterable[str], shown: int = 8) -> str:
    keys = sorted(keys)
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + more
