"""Weights where they lie: names, shapes and dtypes at once, values one at a time.

Files are mapped. What has been read of a mapping stays in the process's memory until the mapping goes, so files are
opened anew after some hundred megabytes; a caller that keeps no tensors needs no more memory than that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from blip2_hf.checkpoints import resolve_checkpoint
from blip2_hf.model_card import hub_id
from blip2_hf.modeling.checkpoint_files import CONNECTOR_NAME, check_safetensors

from .precisions import STORED_DTYPES
from .pth_files import PthFile, open_pth
from .steps import TensorInfo

REOPEN_AFTER = 128 * 2**20  # bytes read of one checkpoint
PICKLES = (".pth", ".pt", ".bin")

PEFT_CONFIG = "adapter_config.json"  # `transformers` loads such an adapter unasked

# In the order in which `transformers` looks for them.
_IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class WeightFile:
    """One file of weights, opened when needed.

    Attributes:
        path: the file.
        infos: shape and dtype of each tensor, by name.
        beside: names of what a `.pth` file holds beside the weights.
        mapped: False for an old `.pth` file, which is in memory as a whole from now on.
        read_bytes: read since it was opened.

    Raises:
        ValueError: if it is damaged or of another kind, naming it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.beside: tuple[str, ...] = ()
        self.mapped = True
        self._opened: Any = None
        self.read_bytes = 0
        if path.suffix == ".safetensors":
            self.infos = _safetensors_infos(path)
        elif path.suffix in PICKLES:
            file = open_pth(path)
            self.beside, self.mapped = file.beside, file.mapped
            self.infos = {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in file.tensors.items()}
            self._opened = None if file.mapped else file
        else:
            raise ValueError(f"{path} must be one of {', '.join((*PICKLES, '.safetensors'))}")

    def read(self, name: str) -> torch.Tensor:
        """A tensor, which may lie in the mapped file: not to be written to, nor kept."""
        if self._opened is None:
            is_pickle = self.path.suffix in PICKLES
            self._opened = open_pth(self.path) if is_pickle else safe_open(self.path, framework="pt")
        if isinstance(self._opened, PthFile):
            tensor = self._opened.tensors[name]
        else:
            try:
                tensor = self._opened.get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"{self.path} cannot be read as weights: {error}") from error
        self.read_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def release(self) -> None:
        """Gives the pages that were read back."""
        if self.mapped:
            self._opened, self.read_bytes = None, 0


class Weights:
    """The weights of a checkpoint: one file, or several of them.

    Attributes:
        name: what the user gave: file, folder, Hub id or short name.
        source: what is to be loaded: `name`, or the Hub id of a short name.
        files: the files of weights.
        infos: shape and dtype of each tensor, by name.
    """

    def __init__(self, name: str, source: str, files: Mapping[Path, Iterable[str] | None]) -> None:
        """`files`: with the names that are taken from each; None: all."""
        self.name, self.source = name, source
        self.files: list[WeightFile] = []
        self.infos: dict[str, TensorInfo] = {}
        self._places: dict[str, WeightFile] = {}
        for path, names in files.items():
            file = WeightFile(path)
            self.files.append(file)
            absent = sorted(set(names or ()) - set(file.infos))
            if absent:
                raise ValueError(f"{path} lacks {len(absent)} tensors that the index names, such as {absent[0]!r}")
            for tensor in file.infos if names is None else names:
                self._places[tensor], self.infos[tensor] = file, file.infos[tensor]

    @property
    def is_pth(self) -> bool:
        """Whether it is a single file of torch, as the original's are."""
        return len(self.files) == 1 and self.files[0].path.suffix in PICKLES and not os.path.isdir(self.source)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def read(self, name: str) -> torch.Tensor:
        """A tensor, which may lie in a mapped file: not to be written to, nor kept.

        Raises:
            KeyError: for an unknown name.
        """
        if sum(file.read_bytes for file in self.files if file.mapped) > REOPEN_AFTER:
            for file in self.files:
                file.release()
        return self._places[name].read(name)


class Sources:
    """Several checkpoints under one namespace: "bridge:query_tokens", "llm:lm_head.weight"."""

    def __init__(self, parts: Mapping[str, Weights]) -> None:
        self.parts = dict(parts)

    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of each tensor, by its name with the prefix."""
        return {f"{part}:{name}": info for part, w in self.parts.items() for name, info in w.infos.items()}

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its name with the prefix, as `Weights.read`."""
        part, _, rest = name.partition(":")
        return self.parts[part].read(rest)


def open_weights(name: str | os.PathLike, argument: str = "SOURCE") -> Weights:
    """The weights of a file, a folder, a Hub id or a short name.

    Args:
        argument: what the user calls it, for messages.

    Raises:
        ValueError: for a name that is neither, a folder without weights, with a part of a checkpoint only, or with
            files that are missing or damaged (naming them).
        OSError: for files that cannot be read, and for a Hub id that cannot be reached.
    """
    name = os.fspath(name)
    if os.path.isfile(name):
        return Weights(name, name, {Path(name): None})
    if Path(name).suffix in (*PICKLES, ".safetensors"):
        raise ValueError(f"`{argument}` {name} does not exist")
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):  # no Hub id looks like this
        raise ValueError(f"`{argument}` must be a file, a folder or a Hub id, but there is no folder {name!r}")
    source = resolve_checkpoint(name)
    is_folder = os.path.isdir(source)
    if not is_folder and hub_id(source) is None:
        raise ValueError(f"`{argument}` must be a file, a folder or a Hub id, got {name!r}")
    if _file(source, CONNECTOR_NAME) is not None:
        raise ValueError(
            f"`{argument}` {name} holds only what was trained; load it and `save_pretrained` it in full first"
        )
    if _file(source, PEFT_CONFIG) is not None:
        raise ValueError(f"`{argument}` {name} has an adapter of peft ({PEFT_CONFIG}); merge it into its weights first")
    index = next((path for path in (_file(source, file) for file in _IN_FOLDERS) if path is not None), None)
    if index is None:
        where = "has" if is_folder else "is no folder here, and on the Hub or (offline) in its cache it has"
        raise ValueError(f"`{argument}` {name} {where} no weights: none of {', '.join(_IN_FOLDERS)}")
    if index.suffix != ".json":
        return Weights(name, source, {index: None})
    files: dict[Path, list[str]] = {}
    for tensor, shard in _weight_map(index).items():
        path = _file(source, shard)
        if path is None:
            raise ValueError(f"{shard} of {name} is missing, {index.name} names it")
        files.setdefault(path, []).append(tensor)
    return Weights(name, source, files)


def _safetensors_infos(path: Path) -> dict[str, TensorInfo]:
    check_safetensors(path)
    with open(path, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    infos = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in STORED_DTYPES:
            raise ValueError(f"{path} has {name!r} in {entry['dtype']}; expected one of {', '.join(STORED_DTYPES)}")
        infos[name] = TensorInfo(tuple(entry["shape"]), STORED_DTYPES[entry["dtype"]])
    return infos


def _file(source: str, name: str) -> Path | None:
    from transformers.utils.hub import cached_file

    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("a name of a file is not a text")
        return weight_map
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weight files: {error}") from error
