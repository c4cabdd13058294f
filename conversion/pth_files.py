"""The original's `.pth` files: tensors and plain data only, read without running what a pickle may ask for.

`torch.load(weights_only=True)` knows tensors, containers, numbers and texts; whatever else the pickle names is refused
here with that name. Files in the zip format (torch 1.6 and later) are mapped, so that a tensor costs memory only while
it is read; older ones have to be read as a whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from .precisions import DTYPE_NAMES

# What the original's runner writes beside the weights
# (https://github.com/salesforce/LAVIS/blob/main/lavis/runners/runner_base.py, `_save_checkpoint`).
BESIDE_WEIGHTS = ("optimizer", "config", "scaler", "epoch")


@dataclass(frozen=True)
class PthFile:
    """An opened file.

    Attributes:
        tensors: its weights, on the CPU; they lie in the file if it is mapped.
        mapped: whether the file is mapped into memory, not read.
        beside: names of what else the file holds ("optimizer", "epoch", …).
    """

    tensors: dict[str, torch.Tensor]
    mapped: bool
    beside: tuple[str, ...] = ()


def open_pth(path: str | os.PathLike) -> PthFile:
    """The weights of a `.pth` or `.bin` file: a state dict, or the original's dictionary with one as "model".

    Raises:
        ValueError: naming the file and what is wrong: damaged, something else than tensors and plain data in the
            pickle, another layout, a value of the state dict that is not a plain tensor.
        OSError: if the file cannot be opened.
    """
    path = Path(path)
    with open(path, "rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"
    try:
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        raise ValueError(f"{path} is refused: {_what_was_refused(error)}") from error
    except MemoryError:
        raise
    except Exception as error:  # what a damaged file leads to is of many kinds (EOFError, RuntimeError, OSError, …)
        why = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged or not a file of torch: {why}") from error
    weights, beside = _state_dict(path, content)
    _check_tensors(path, weights)
    return PthFile(dict(weights), mapped, beside)


def _state_dict(path: Path, content: Any) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a state dict, got {type(content).__name__}")
    if not isinstance(content.get("model"), dict):
        return content, ()
    beside = [name for name in content if name != "model"]
    unknown = [str(name) for name in beside if name not in BESIDE_WEIGHTS]
    if unknown:
        raise ValueError(
            f"{path} holds {', '.join(unknown)} beside the weights; expected at most {', '.join(BESIDE_WEIGHTS)}"
        )
    return content["model"], tuple(beside)


def _check_tensors(path: Path, weights: Mapping[str, Any]) -> None:
    if not weights:
        raise ValueError(f"{path} holds no tensors")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            got = type(value).__name__
            raise ValueError(f"{path} must hold tensors by their names only, got {got} as {name!r}")
        plain = value.layout == torch.strided and value.dtype in DTYPE_NAMES and not value.is_meta
        if not plain:
            kind = "quantized" if value.is_quantized else f"{value.layout}, {value.dtype}, {value.device}"
            raise ValueError(f"{path} must hold plain real tensors only, {name!r} is {kind}")


def _what_was_refused(error: UnpicklingError) -> str:
    """The name in torch's long message, which also explains how to run the file's code all the same."""
    message = str(error)
    named = re.search(r"(?:GLOBAL|class|callable|function)\s+`?([A-Za-z_][\w.]*\.[\w.]*\w)", message)
    named = named or re.search(r"GLOBAL (\w+)", message)  # of Python's builtins
    if named:
        return f"its pickle asks for {named[1]}, only tensors and plain data are read"
    detail = re.search(r"WeightsUnpickler error:\s*(.*)", message)
    why = detail[1] if detail else message.strip().split("\n")[0]
    return f"its pickle holds something else than tensors and plain data ({why.strip().rstrip('.')})"
