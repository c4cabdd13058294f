"""Tensors in safetensors files, converted to another precision while they are read.

`transformers` maps the files into memory and converts from there, so that in the end all their pages are in memory
beside the converted weights. Here, what is wanted in another precision is converted piece by piece into its place, and
the pages of a piece are given back at once; what is wanted as it is stays mapped.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.integrations import is_deepspeed_zero3_enabled

from .checkpoint_files import read_header

_PIECE = 2**22  # bytes
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_GIVE_BACK = getattr(mmap, "MADV_DONTNEED", None)  # not on Windows


class StoredTensor:
    """One of them. For the loader of `transformers` it is like a slice of safetensors, of which it takes `[...]` and
    then `.to(...)`."""

    def __init__(self, stored: Any, pages: mmap.mmap, start: int):
        """
        Args:
            stored: the slice of safetensors, of one of the three float precisions.
            pages: the file that it is in.
            start: of its bytes in the file.
        """
        self._stored, self._pages, self._start = stored, pages, start
        self._dtype = _DTYPES[stored.get_dtype()]

    def get_dtype(self) -> str:
        return self._stored.get_dtype()

    def get_shape(self) -> list[int]:
        return self._stored.get_shape()

    def __getitem__(self, index: Any) -> torch.Tensor | StoredTensor:
        return self if index is Ellipsis else self._stored[index]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor on this device and in this precision; None: the CPU, its own."""
        if dtype in (None, self._dtype):
            return self._stored[...].to(device=device, dtype=dtype)
        device = "cpu" if device is None else device
        return self.read_into(torch.empty(self.get_shape(), dtype=dtype, device=device))

    def read_into(self, target: torch.Tensor) -> torch.Tensor:
        """Fills a tensor of the same shape, which is returned."""
        if not target.is_contiguous() or not target.numel():
            return target.copy_(self._stored[...])
        values = torch.frombuffer(self._pages, dtype=self._dtype, count=target.numel(), offset=self._start)
        step = _PIECE // self._dtype.itemsize
        page, end = self._start - self._start % mmap.PAGESIZE, self._start
        for place, piece in zip(target.view(-1).split(step), values.split(step), strict=True):
            place.copy_(piece)
            end += piece.numel() * piece.element_size()
            if _GIVE_BACK is not None:  # a page shared with the next piece or tensor is found again in the page cache
                self._pages.madvise(_GIVE_BACK, page, end - page)
            page = end - end % mmap.PAGESIZE
        return target


@contextlib.contextmanager
def stored_tensors(files: Iterable[str | os.PathLike]) -> Iterator[dict[str, Any]]:
    """{name: tensor} of safetensors files: `StoredTensor`, or the slice of safetensors for what is not a float.

    Raises:
        SafetensorError: if a file is not one, or truncated.
    """
    with contextlib.ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            entries, begin = read_header(Path(file))
            with open(file, "rb") as stream:
                pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of what is read-only
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                stored = opened.get_slice(name)
                if stored.get_dtype() in _DTYPES:
                    stored = StoredTensor(stored, pages, begin + entries[name]["data_offsets"][0])
                tensors[name] = stored
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
