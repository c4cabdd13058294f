"""Weights of a checkpoint as its files hold them: one file or shards, safetensors or a pickle of tensors only."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

# In the order in which `transformers` looks for them.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_weights(source: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose names begin with `prefix`, on the CPU, in the precision of the file.

    They may lie in the file, mapped into memory: copy what is to stay.

    Of a sharded checkpoint only the shards that hold such tensors are opened (and downloaded).

    Args:
        source: a folder or a Hub id.

    Raises:
        ValueError: if there is no weight file, a shard is missing, or a file cannot be read (naming it).
    """
    for name in _NAMES:
        path = _file(source, name)
        if path is not None:
            break
    else:
        raise ValueError(f"{source} has no weights: none of {', '.join(_NAMES)}")
    files = [path]
    if path.suffix == ".json":
        files = [_shard(source, shard, path) for shard in _shards(path, prefix)]
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        weights.update(_tensors(file, prefix))
    return weights


def _file(source: str, name: str) -> Path | None:
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def _shard(source: str, name: str, index: Path) -> Path:
    path = _file(source, name)
    if path is None:
        raise ValueError(f"{name} of {source} is missing, {index.name} names it")
    return path


def _shards(index: Path, prefix: str) -> list[str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({shard for key, shard in weight_map.items() if key.startswith(prefix)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weight files: {error}") from error


def _tensors(file: Path, prefix: str) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return {key: opened.get_tensor(key) for key in opened.keys() if key.startswith(prefix)}  # noqa: SIM118
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} cannot be read as weights: {error}") from error
    if not isinstance(stored, dict) or not all(isinstance(value, torch.Tensor) for value in stored.values()):
        raise ValueError(f"{file} must hold a dictionary of tensors, got {type(stored).__name__}")
    return {key: value for key, value in stored.items() if key.startswith(prefix)}
