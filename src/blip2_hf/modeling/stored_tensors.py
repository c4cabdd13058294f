"""Tensors in safetensors files, converted to another precision while they are read.

`transformers` maps the files into memory and converts from there, so that in the end all their pages are in memory
beside the converted weights. Here, what is wanted in another precision is read in small pieces, each converted into its
place; what is wanted as it is stays mapped.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.integrations import is_deepspeed_zero3_enabled

from .checkpoint_files import read_header

_PIECE = 2**20  # bytes: large enough to be fast, small enough for the processor's cache
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Buffer(threading.local):
    """One per thread as long as files are open: made anew for each tensor, it would leave holes between the weights."""

    def __init__(self) -> None:
        self.bytes = torch.empty(_PIECE, dtype=torch.uint8, device="cpu")


class StoredTensor:
    """One of them. For the loader of `transformers` it is like a slice of safetensors, of which it takes `[...]` and
    then `.to(...)`."""

    def __init__(self, mapped: Any, file: str | os.PathLike, start: int, buffer: _Buffer):
        """
        Args:
            mapped: the slice of safetensors, of one of the three float precisions.
            file: that it is in.
            start: of its bytes in the file.
            buffer: for reading.
        """
        self._mapped, self._file, self._start, self._buffer = mapped, file, start, buffer
        self._dtype = _DTYPES[mapped.get_dtype()]

    def get_dtype(self) -> str:
        return self._mapped.get_dtype()

    def get_shape(self) -> list[int]:
        return self._mapped.get_shape()

    def __getitem__(self, index: Any) -> torch.Tensor | StoredTensor:
        return self if index is Ellipsis else self._mapped[index]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor on this device and in this precision; None: the CPU, its own."""
        if dtype in (None, self._dtype):
            return self._mapped[...].to(device=device, dtype=dtype)
        device = "cpu" if device is None else device
        return self.read_into(torch.empty(self.get_shape(), dtype=dtype, device=device))

    def read_into(self, target: torch.Tensor) -> torch.Tensor:
        """Fills a tensor of the same shape, which is returned.

        Raises:
            ValueError: if the file ends before.
        """
        if not target.is_contiguous():
            return target.copy_(self._mapped[...])
        size = self._dtype.itemsize
        with open(self._file, "rb", buffering=0) as stream:
            stream.seek(self._start)
            for piece in target.view(-1).split(_PIECE // size):
                read = self._buffer.bytes[: piece.numel() * size]
                _fill(stream, memoryview(read.numpy()), self._file)
                piece.copy_(read.view(self._dtype))
        return target


def _fill(stream, rest: memoryview, file: str | os.PathLike) -> None:
    while rest:
        count = stream.readinto(rest)
        if not count:
            raise ValueError(f"{file} is truncated: {len(rest)} bytes of a tensor are missing")
        rest = rest[count:]


@contextlib.contextmanager
def stored_tensors(files: Iterable[str | os.PathLike]) -> Iterator[dict[str, Any]]:
    """{name: tensor} of safetensors files: `StoredTensor`, or the slice of safetensors for what is not a float.

    Raises:
        SafetensorError: if a file is not one.
    """
    with contextlib.ExitStack() as stack:
        tensors: dict[str, Any] = {}
        buffer = _Buffer()
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            entries, begin = read_header(Path(file))
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                mapped = opened.get_slice(name)
                if mapped.get_dtype() in _DTYPES:
                    mapped = StoredTensor(mapped, file, begin + entries[name]["data_offsets"][0], buffer)
                tensors[name] = mapped
        yield tensors


def can_convert(files: list[str] | None, load_config: Any) -> bool:
    """Whether `transformers` may get the weights of these files as `StoredTensor`.

    Not where it has its own way to read: quantised, by DeepSpeed, or without mapping (asked for, on Windows and MPS).

    Args:
        files: of weights; None: there are none.
        load_config: what its loader is given.
    """
    if not files or not all(os.fspath(file).endswith(".safetensors") for file in files):
        return False
    devices = (load_config.device_map or {}).values()
    unmapped = sys.platform == "win32" or any(str(device).startswith("mps") for device in devices)
    unmapped = unmapped or getattr(load_config, "disable_mmap", None)
    own_way = load_config.hf_quantizer is not None or is_deepspeed_zero3_enabled()
    return not (unmapped or own_way) and sys.byteorder == "little"
