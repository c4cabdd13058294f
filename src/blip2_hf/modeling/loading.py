"""Checkpoints: short names, checked files, no key lost or made up in silence, and connector-only folders."""

from __future__ import annotations

import contextlib
import copy
import json
import logging as std_logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..checkpoints import resolve_checkpoint
from ..configuration import Blip2Config

logger = logging.get_logger(__name__)

CONNECTOR_NAME = "connector.safetensors"

_MODEL_TYPES = ("blip-2", "instructblip")
_WHOLE_FILES = ("model.safetensors", "model.safetensors.index.json")
# Options of `from_pretrained` that say where files come from.
_HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")

# InstructBLIP in `transformers` (Q-Former embeddings inside the Q-Former) -> ours, as regular expressions.
_INSTRUCTBLIP_KEYS = {
    r"^qformer\.embeddings\.layernorm\.": "qformer.layernorm.",
    r"^qformer\.embeddings\.(word|position)_embeddings\.": r"embeddings.\1_embeddings.",
}


class CheckpointMixin:
    """`from_pretrained` and `save_pretrained` of the BLIP-2 models."""

    # Keys (regular expressions) that a checkpoint may lack; what is missing is initialised and named in one warning.
    _optional_keys: tuple[str, ...] = ()

    # First components of the keys that a checkpoint must and may have.
    _parts: frozenset[str] = frozenset()
    _optional_parts: frozenset[str] = frozenset()

    # Version counters of the backbones' weights after loading (see `_changed_parts`); None: not loaded from anywhere.
    _loaded_versions: dict[str, int] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Loads a model from a folder, a Hub id or the short name of a released checkpoint.

        As `transformers.PreTrainedModel.from_pretrained` (dtype, device_map, quantization_config, revision, …), and:
        short names ("blip2-flan-t5-xxl" is the local folder of that name, else "Salesforce/blip2-flan-t5-xxl"),
        InstructBLIP folders of `transformers` (for the question-conditioned model), connector-only folders.

        Raises:
            ValueError: if a file is truncated or not safetensors (naming it), or if its keys or their shapes are not
                those of this model (naming them).
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = cls._load(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        if new := info["missing_keys"]:
            logger.warning(f"{pretrained_model_name_or_path} does not hold {_some(new)}: newly initialised")
        return (model, info) if wants_info else model

    @classmethod
    def _load(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """The model, and what `transformers` tells of the loading; missing keys among it are optional ones."""
        source = resolve_checkpoint(pretrained_model_name_or_path)
        hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name)}
        raw_config, _ = PreTrainedConfig.get_config_dict(source, **hub_options)  # as it is written in the file
        if config is None:
            _check_model_type(source, raw_config)
        config = _as_config(source if config is None else config, kwargs, hub_options)
        if raw_config.get("connector_of"):
            return cls._from_connector(source, config, hub_options, *model_args, **kwargs)
        _check_files(source, kwargs.get("variant"))
        if "key_mapping" not in kwargs:
            cls._check_parts(source)
            if raw_config.get("model_type") == "instructblip":
                kwargs["key_mapping"] = dict(_INSTRUCTBLIP_KEYS)
        # Other shapes are let through here, for `_check_keys` to name them.
        other_shapes_allowed = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            with without_load_report():  # `_check_keys` and our own warning account for every key
                model, info = super().from_pretrained(
                    source, *model_args, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
                )
        except (SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
            pickles = [os.fspath(path) for path in Path(source).glob("*.bin")]
            if not pickles and not isinstance(error, SafetensorError):
                raise
            raise ValueError(f"{', '.join(pickles) or source} cannot be read as weights: {error}") from error
        _forget_key_mapping(model, kwargs.get("key_mapping"))
        cls._check_keys(source, info, other_shapes_allowed)
        model._loaded_versions = model._versions()
        return model, info

    @classmethod
    def _check_parts(cls, source: str) -> None:
        """Refuses a local checkpoint of another class by its keys, before a model is built for it."""
        keys = _stored_keys(Path(source))
        found = {key.split(".")[0] for key in keys}
        foreign = [key for key in keys if key.split(".")[0] not in cls._parts | cls._optional_parts]
        if foreign:
            message = (
                f"{source} is not a checkpoint of {cls.__name__}: {len(foreign)} unexpected keys: {_some(foreign)}"
            )
            if missing := cls._parts - found:
                message += f"; missing parts: {_some(missing)}"
            raise ValueError(message)

    @classmethod
    def _check_keys(cls, source: str, info: dict[str, Any], other_shapes_allowed: bool) -> None:
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
        new = {key for key in missing if any(re.match(pattern, key) for pattern in cls._optional_keys)}
        other = {f"{key} {list(found)} instead of {list(expected)}" for key, found, expected in info["mismatched_keys"]}
        if other and other_shapes_allowed:
            logger.warning(f"{source} has other shapes: {_some(other)}: newly initialised")
            other = set()
        kinds = {"missing keys": missing - new, "unexpected keys": unexpected, "keys of another shape": other}
        problems = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in kinds.items() if keys]
        if problems:
            raise ValueError(f"{source} is not a checkpoint of {cls.__name__}: {'; '.join(problems)}")

    # -- connector-only ----------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory, *args, connector_only: bool = False, **kwargs) -> None:
        """Saves the model as sharded safetensors that `transformers` reads as well.

        Args:
            save_directory: folder, created if needed.
            connector_only: store only what was trained in `connector.safetensors`, and the name of the checkpoint
                that the rest came from; `from_pretrained(save_directory)` puts both together again. What is left out
                are tower and language model, each only if it is as it was loaded: never written to since, and never in
                training mode without being frozen.

        Raises:
            ValueError: with `connector_only`, if it is unknown where the frozen parts came from.
        """
        if not connector_only:
            before = _weight_files(save_directory)
            origin, self.config.connector_of = getattr(self.config, "connector_of", None), None
            try:
                super().save_pretrained(save_directory, *args, **kwargs)
            finally:
                self.config.connector_of = origin
            _remove_other_layout(before, _weight_files(save_directory))
            return None
        others = sorted(set(kwargs) - {"is_main_process", "state_dict", "max_shard_size"})
        if args or others:
            raise ValueError(f"`connector_only` cannot be combined with {others or 'positional arguments'}")
        if not kwargs.get("is_main_process", True):
            return None
        return self._save_connector(Path(save_directory), kwargs.get("state_dict"))

    def _save_connector(self, folder: Path, state_dict: dict | None) -> None:
        origin = getattr(self.config, "connector_of", None) or self.config._name_or_path
        if not origin or self._loaded_versions is None:
            raise ValueError(
                "`connector_only=True` needs to know where the frozen parts came from, but this model was not loaded "
                "with `from_pretrained`; save it in full once and load it from there"
            )
        if os.path.isdir(origin):
            if folder.exists() and os.path.samefile(origin, folder):
                raise ValueError(f"`save_directory` {folder} holds the full checkpoint the frozen parts come from")
            origin = os.path.abspath(origin)  # it must be found from another working directory, too
        state_dict = self.state_dict() if state_dict is None else state_dict
        keys = self._connector_keys(state_dict, self._changed_parts())
        tensors = {key: state_dict[key].contiguous() for key in keys}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / CONNECTOR_NAME, metadata={"format": "pt"})
        previous, self.config.connector_of = getattr(self.config, "connector_of", None), os.fspath(origin)
        try:
            self.config.architectures = [type(self).__name__]
            self.config.save_pretrained(folder)
        finally:
            self.config.connector_of = previous
        if self.can_generate():
            self.generation_config.save_pretrained(folder)

    def _versions(self) -> dict[str, int]:
        """Per backbone, how often its weights were written to (torch counts it per tensor)."""
        return {part: sum(weight._version for _, weight in weights) for part, weights in self._backbones().items()}

    def _changed_parts(self) -> set[str]:
        """The backbones that may differ from the checkpoint they were loaded from."""
        return self._trained_parts | self._written_parts()

    def _written_parts(self) -> set[str]:
        """The backbones whose weights were written to since they were loaded, as far as torch can tell."""
        if self._loaded_versions is None:
            return set()
        return {part for part, version in self._versions().items() if version != self._loaded_versions[part]}

    def _connector_keys(self, keys: Iterable[str], parts: set[str]) -> list[str]:
        """Of these state-dict keys, those that a connector with the backbones `parts` holds.

        What is left out: weights that are tied to others, and the other backbones with their buffers.
        """
        left_out = set(getattr(self, "all_tied_weights_keys", None) or ())
        for part, parameters in self._backbones().items():
            if part not in parts:
                left_out |= {name for name, _ in parameters}
                left_out |= {f"{part}.{name}" for name, _ in getattr(self, part).named_buffers()}
        return [key for key in keys if key not in left_out]

    @classmethod
    def _from_connector(cls, source, config, hub_options, *model_args, **kwargs):
        origin = config.connector_of
        connector = Path(source, kwargs.get("subfolder") or "", CONNECTOR_NAME)
        if not connector.exists():
            if os.path.isdir(source):
                raise ValueError(f"{connector} is missing, config.json names it as a connector of {origin}")
            connector = Path(cached_file(source, CONNECTOR_NAME, **hub_options))
        _check_safetensors(connector)
        connector_options = dict(hub_options)
        for option in ("revision", "subfolder"):  # those of the connector, not of the checkpoint it belongs to
            kwargs.pop(option, None)
            hub_options.pop(option, None)
        try:
            base = Blip2Config.from_pretrained(origin, **hub_options)
        except OSError as error:
            raise ValueError(f"{connector} belongs to {origin}, which cannot be loaded: {error}") from error
        if base.connector_of:
            raise ValueError(f"{connector} belongs to {origin}, which is not a full checkpoint but a connector, too")
        size, base_size = (part.text_config.get_text_config().vocab_size for part in (config, base))
        if size != base_size:  # the embeddings were resized; those of the base are loaded first
            config = copy.deepcopy(config)
            config.text_config.get_text_config().vocab_size = base_size
        model, info = cls._load(origin, *model_args, config=config, **kwargs)
        with safe_open(connector, framework="pt") as file:
            stored = set(file.keys())
            parts = {
                part for part, weights in model._backbones().items() if not stored.isdisjoint(n for n, _ in weights)
            }
            if size != base_size and "language_model" in parts:
                model.resize_token_embeddings(size, mean_resizing=False)
            own = model.state_dict()
            missing = set(model._connector_keys(own, parts)) - stored
            foreign = [k for k in stored if k not in own or list(own[k].shape) != file.get_slice(k).get_shape()]
            kinds = {"missing keys": missing, "unexpected keys or shapes": foreign}
            problems = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in kinds.items() if keys]
            if problems:
                raise ValueError(f"{connector} is no connector of {cls.__name__} on {origin}: {'; '.join(problems)}")
            if offloaded := [key for key in stored if own[key].is_meta]:
                raise ValueError(f"`device_map` must not offload what {connector} holds: {_some(offloaded)}")
            for key in stored:
                own[key].copy_(file.get_tensor(key))
        info["missing_keys"] = set(info["missing_keys"]) - stored
        model.config.connector_of = origin
        if model.can_generate() and "generation_config" not in kwargs:
            with contextlib.suppress(OSError):  # a connector of an older save may have none
                model.generation_config = GenerationConfig.from_pretrained(source, **connector_options)
        return model, info


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Keeps `transformers` from warning of keys that the caller accounts for itself."""

    def is_other(record: std_logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    loggers = [std_logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "utils.loading_report")]
    for logger in loggers:
        logger.addFilter(is_other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_other)


def _weight_files(folder: str | os.PathLike) -> dict[Path, int]:
    """Single weight files and shard indices of a folder, with the time they were written (ns)."""
    files = [path for pattern in _WHOLE_FILES for path in Path(folder).glob(pattern)]
    return {path: path.stat().st_mtime_ns for path in files}


def _remove_other_layout(before: dict[Path, int], after: dict[Path, int]) -> None:
    """A single file that stayed behind would be loaded instead of the shards just written, and the other way round an
    index would name shards that are gone."""
    written = {path for path, time in after.items() if before.get(path) != time}
    if written:
        for path in set(after) - written:
            path.unlink()


def _check_model_type(source: str, raw_config: dict[str, Any]) -> None:
    found = raw_config.get("model_type")
    if found not in _MODEL_TYPES:
        kind = f"model_type {found!r}" if raw_config else "no config.json"
        raise ValueError(f"{source} is not a BLIP-2 checkpoint: it has {kind}, expected {' or '.join(_MODEL_TYPES)}")


def _as_config(given: Any, kwargs: dict[str, Any], hub_options: dict[str, Any]) -> Blip2Config:
    """`config` of `from_pretrained`: an object, a dictionary, or where to read it from (then fields may be given too,
    as `transformers` takes them; they are removed from `kwargs`, and validated)."""
    if isinstance(given, Blip2Config):
        return given
    if isinstance(given, dict | PreTrainedConfig):
        return Blip2Config.from_dict(given if isinstance(given, dict) else given.to_dict())
    config = Blip2Config.from_pretrained(given, **hub_options)
    known = {*Blip2Config.__dataclass_fields__, "output_attentions"} - {"dtype"}
    fields = {key: kwargs.pop(key) for key in list(kwargs) if key in known}
    if not fields:
        return config
    whole = config.to_dict()
    for key in config.sub_configs:  # some fields of a part leave its others as they are
        if isinstance(fields.get(key), dict):
            fields[key] = {**whole[key], **fields[key]}
    return Blip2Config.from_dict({**whole, **fields, "name_or_path": config._name_or_path})


def _forget_key_mapping(model, key_mapping: dict[str, str] | None) -> None:
    """`transformers` would undo the renaming on save; what we save has our names and our config."""
    conversions = getattr(model, "_weight_conversions", None)
    if key_mapping and conversions:
        targets = set(key_mapping.values())
        model._weight_conversions = [c for c in conversions if not targets & set(c.target_patterns)]


def _stored_keys(folder: Path) -> list[str]:
    """Names of the tensors in a local checkpoint; empty if it has none in safetensors."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            return list(file.keys())
    return list(json.loads(index.read_text())["weight_map"]) if index.is_file() else []


def _check_files(source: str, variant: str | None) -> None:
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
            _check_safetensors(file)
        elif len(files) > 1 or index.exists():
            raise ValueError(f"{file} is missing, {index.name} names it")


def _check_safetensors(file: Path) -> None:
    """Raises ValueError naming the file unless its header is whole and its length is what the header says."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("header is cut off")
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a safetensors file or is truncated ({size} bytes): {error}") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{file} is truncated or damaged: it has {size} bytes, its header says {expected}")


def _some(keys: Iterable[str], shown: int = 8) -> str:
    keys = sorted(keys)
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + more
