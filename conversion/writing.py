"""Writing checkpoints: sharded safetensors tensor by tensor, in a folder that gets its name only when it is finished.

`transformers` and `safetensors` write a shard from tensors that are all in memory; here one tensor at a time is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .precisions import DTYPE_NAMES
from .steps import TensorInfo

INDEX_NAME = "model.safetensors.index.json"
UNFINISHED = ".unfinished"  # end of the name of a folder that is being written
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_HEADER_BYTES_PER_TENSOR = 256
_SMALL_FILES = 64 * 2**20  # room for tokenizer, configs, model card


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    info: TensorInfo

    @property
    def nbytes(self) -> int:
        return self.info.nbytes


def parse_size(text: str) -> int:
    """Bytes from "5GB", "500MB", "2GiB" or a plain number.

    Raises:
        ValueError: for anything else, and for nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    size = int(float(found[1]) * unit) if unit else 0
    if size <= 0:
        raise ValueError(f"must be a size such as '5GB' or '500MB', got {text!r}")
    return size


def into_shards(tensors: Sequence[Planned], max_bytes: int) -> list[list[Planned]]:
    """The tensors in their order, cut where a shard would exceed `max_bytes`; a larger tensor has one to itself."""
    shards: list[list[Planned]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def space_needed(tensors: Sequence[Planned]) -> int:
    """Bytes on disk for the weights, their headers and the small files beside them, rather too many."""
    return sum(tensor.nbytes + _HEADER_BYTES_PER_TENSOR for tensor in tensors) + _SMALL_FILES


def check_target(target: Path, needed: int) -> None:
    """
    Raises:
        ValueError: if there is something of that name already, or less space than `needed` bytes.
    """
    if os.path.lexists(target):
        raise ValueError(f"`--to` {target} exists already; nothing is written over it")
    free = shutil.disk_usage(_existing_parent(target)).free
    if free < needed:
        raise ValueError(
            f"`--to` {target} needs {readable(needed)} of disk space, but there are {readable(free)} "
            f"free, {readable(needed - free)} too little"
        )


@contextmanager
def finished_or_nothing(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into, which becomes `target` at once if nothing went wrong, else is removed.

    What is left of a killed run has a name that begins with a dot and ends with `.unfinished`.

    Raises:
        ValueError: if `target` exists, at the beginning or at the end.
        OSError: if it cannot be written.
    """
    with _working_folder(target) as folder:
        yield folder
        for path in folder.rglob("*"):
            _to_disk(path)
        _give_name(folder, target)


@contextmanager
def finished_file_or_nothing(target: Path) -> Iterator[Path]:
    """The same for a single file: a path to write it to."""
    with _working_folder(target) as folder:
        path = folder / target.name
        yield path
        _give_name(path, target)
        folder.rmdir()


@contextmanager
def _working_folder(target: Path) -> Iterator[Path]:
    if os.path.lexists(target):
        raise ValueError(f"`--to` {target} exists already; nothing is written over it")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=UNFINISHED, dir=target.parent))
    try:
        os.chmod(folder, 0o777 & ~_umask())  # `mkdtemp` lets nobody else in
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _give_name(made: Path, target: Path) -> None:
    _to_disk(made)
    if os.path.lexists(target):
        raise ValueError(f"`--to` {target} has come into being in the meantime; nothing is written over it")
    os.rename(made, target)
    _to_disk(target.parent)


def unfinished_beside(target: Path) -> list[Path]:
    """What earlier runs for `target` that were killed left behind (or one that is still at work is writing)."""
    return sorted(target.parent.glob(f".{_escaped(target.name)}.*{UNFINISHED}"))


def write_shards(
    folder: Path,
    tensors: Sequence[Planned],
    make: Callable[[str], torch.Tensor],
    max_shard_bytes: int,
    done: Callable[[Planned], None] = lambda tensor: None,
) -> list[Path]:
    """Writes `model.safetensors`, or `model-00001-of-0000N.safetensors` … and their index.

    Args:
        make: gives the tensor of a name, of the shape and dtype planned; called once for each, and what it returned is
            dropped before the next call.
        done: called after each tensor.

    Raises:
        ValueError: for a tensor that is not as planned.
        OSError: if the disk is full.
    """
    shards = into_shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        files = [folder / "model.safetensors"]
    else:
        files = [folder / f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write_file(file, shard, make, done)
    if len(shards) > 1:
        places = {tensor.name: file.name for file, shard in zip(files, shards, strict=True) for tensor in shard}
        index = {
            "metadata": {
                "total_parameters": sum(tensor.nbytes // tensor.info.dtype.itemsize for tensor in tensors),
                "total_size": sum(tensor.nbytes for tensor in tensors),
            },
            "weight_map": dict(sorted(places.items())),
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _write_file(
    path: Path, tensors: Sequence[Planned], make: Callable[[str], torch.Tensor], done: Callable[[Planned], None]
) -> None:
    # Wide types first, so that every tensor begins at a multiple of its item's size.
    tensors = sorted(tensors, key=lambda tensor: -tensor.info.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.info.dtype],
            "shape": list(tensor.info.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            _write_tensor(file, tensor, make(tensor.name))
            done(tensor)


def _write_tensor(file, planned: Planned, tensor: torch.Tensor) -> None:
    found = TensorInfo(tuple(tensor.shape), tensor.dtype)
    if found != planned.info:
        raise ValueError(f"{planned.name!r} was planned as {planned.info}, but is {found}")
    file.write(memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))


def _to_disk(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def readable(size: int) -> str:
    """A number of bytes for people."""
    for unit, bytes_per_unit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= bytes_per_unit:
            return f"{size / bytes_per_unit:.1f} {unit}"
    return f"{size} bytes"
