"""Checkpoints: short names, checked files, no key lost or made up in silence, and connector-only folders."""

from __future__ import annotations

import contextlib
import logging as std_logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from ..checkpoints import resolve_checkpoint
from ..configuration import Blip2Config
from .adapter_files import adapter_config, adapter_detached, split_adapter, write_adapter
from .checkpoint_files import check_files, remove_other_layout, some, stored_keys, weight_files
from .connector import ConnectorMixin
from .precisions import with_language_dtype
from .quantization import language_model_only
from .stored_tensors import can_convert, stored_tensors

logger = logging.get_logger(__name__)

_MODEL_TYPES = ("blip-2", "instructblip")
# Options of `from_pretrained` that say where files come from.
_HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")

# InstructBLIP in `transformers` (Q-Former embeddings inside the Q-Former) -> ours, as regular expressions.
_INSTRUCTBLIP_KEYS = {
    r"^qformer\.embeddings\.layernorm\.": "qformer.layernorm.",
    r"^qformer\.embeddings\.(word|position)_embeddings\.": r"embeddings.\1_embeddings.",
}


class CheckpointMixin(ConnectorMixin):
    """`from_pretrained` and `save_pretrained` of the BLIP-2 models."""

    # Keys (regular expressions) that a checkpoint may lack; what is missing is initialised and named in one warning.
    _optional_keys: tuple[str, ...] = ()

    # First components of the keys that a checkpoint must and may have.
    _parts: frozenset[str] = frozenset()
    _optional_parts: frozenset[str] = frozenset()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Loads a model from a folder, a Hub id or the short name of a released checkpoint.

        As `transformers.PreTrainedModel.from_pretrained` (dtype, device_map, quantization_config, revision, …), and:
        short names ("blip2-flan-t5-xxl" is the local folder of that name, else "Salesforce/blip2-flan-t5-xxl"),
        InstructBLIP folders of `transformers` (for the question-conditioned model), connector-only folders, folders
        with a LoRA adapter of the language model (which is then frozen, the adapter in float32). `quantization_config`
        applies to the language model without its head, unless it says which modules to skip. `language_dtype` is the
        precision of a frozen language model, with everything else in float32: for training.

        Raises:
            ValueError: if a file is missing, truncated or not safetensors (naming it), or if its keys or their shapes
                are not those of this model (naming them).
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = cls._load(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        if model.config.language_adapter:
            hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name)}
            model._load_adapter(
                resolve_checkpoint(pretrained_model_name_or_path), kwargs.get("subfolder") or "", hub_options
            )
        if new := info["missing_keys"]:
            logger.warning(f"{pretrained_model_name_or_path} does not hold {some(new)}: newly initialised")
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
        has_adapter = bool(raw_config.get("language_adapter"))  # also if `config` does not say so
        if raw_config.get("connector_of"):
            model, info = cls._from_connector(source, config, hub_options, *model_args, **kwargs)
            model.config.language_adapter = has_adapter  # not that of the checkpoint it belongs to
            return model, info
        if kwargs.get("quantization_config") is not None and "language_model" in cls._parts:
            others = (cls._parts | cls._optional_parts) - {"language_model"}
            kwargs["quantization_config"] = language_model_only(kwargs["quantization_config"], cls, config, others)
        check_files(source, kwargs.get("variant"))
        if "key_mapping" not in kwargs:
            cls._check_parts(source)
            if raw_config.get("model_type") == "instructblip":
                kwargs["key_mapping"] = dict(_INSTRUCTBLIP_KEYS)
        # Other shapes are let through here, for `_check_keys` to name them.
        other_shapes_allowed = kwargs.pop("ignore_mismatched_sizes", False)
        loaded, options = with_language_dtype(cls, cls._parts | cls._optional_parts, kwargs)
        options |= {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            with without_load_report():  # `_check_keys` and our own warning account for every key
                model, info = super(CheckpointMixin, loaded).from_pretrained(source, *model_args, **options)
        except (SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
            pickles = [os.fspath(path) for path in Path(source).glob("*.bin")]
            if not pickles and not isinstance(error, SafetensorError):
                raise
            raise ValueError(f"{', '.join(pickles) or source} cannot be read as weights: {error}") from error
        if loaded is not cls:
            model.__class__, model.config.dtype = cls, torch.float32
        _forget_key_mapping(model, kwargs.get("key_mapping"))
        cls._check_keys(source, info, other_shapes_allowed)
        model._loaded_versions = model._versions()
        model.config.language_adapter = has_adapter
        return model, info

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """As `transformers`, whose `from_pretrained` calls it, but it need not have the files' pages in memory beside
        the weights that it makes of them."""
        load = super()._load_pretrained_model
        if state_dict is not None or not can_convert(checkpoint_files, load_config):
            return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        with stored_tensors(checkpoint_files) as tensors:
            return load(model, tensors, checkpoint_files, load_config, *args, **kwargs)

    @classmethod
    def _check_parts(cls, source: str) -> None:
        """Refuses a local checkpoint of another class by its keys, before a model is built for it."""
        keys = stored_keys(Path(source))
        found = {key.split(".")[0] for key in keys}
        foreign = [key for key in keys if key.split(".")[0] not in cls._parts | cls._optional_parts]
        if foreign:
            message = f"{source} is not a checkpoint of {cls.__name__}: {len(foreign)} unexpected keys: {some(foreign)}"
            if missing := cls._parts - found:
                message += f"; missing parts: {some(missing)}"
            raise ValueError(message)

    @classmethod
    def _check_keys(cls, source: str, info: dict[str, Any], other_shapes_allowed: bool) -> None:
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
        new = {key for key in missing if any(re.match(pattern, key) for pattern in cls._optional_keys)}
        other = {f"{key} {list(found)} instead of {list(expected)}" for key, found, expected in info["mismatched_keys"]}
        if other and other_shapes_allowed:
            logger.warning(f"{source} has other shapes: {some(other)}: newly initialised")
            other = set()
        kinds = {"missing keys": missing - new, "unexpected keys": unexpected, "keys of another shape": other}
        problems = [f"{len(keys)} {kind}: {some(keys)}" for kind, keys in kinds.items() if keys]
        if problems:
            raise ValueError(f"{source} is not a checkpoint of {cls.__name__}: {'; '.join(problems)}")

    # -- connector-only ----------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory, *args, connector_only: bool = False, **kwargs) -> None:
        """Saves the model as sharded safetensors that `transformers` reads as well.

        A LoRA adapter of the language model is put beside it, into `language_adapter/`, in peft's format.

        Args:
            save_directory: folder, created if needed.
            connector_only: store only what was trained in `connector.safetensors`, and the name of the checkpoint
                that the rest came from; `from_pretrained(save_directory)` puts both together again. What is left out
                are tower and language model, each only if it is as it was loaded: never written to since, and never in
                training mode without being frozen.

        Raises:
            ValueError: with `connector_only`, if it is unknown where the frozen parts came from; for adapters that
                `add_lora` did not make.
        """
        adapter = adapter_config(self)
        self.config.language_adapter = adapter is not None
        tensors = {}
        if adapter is not None:
            given = kwargs.get("state_dict")
            plain, tensors = split_adapter(self.state_dict() if given is None else given)
            if given is not None:
                kwargs["state_dict"] = plain
            del plain
        with adapter_detached(self):
            if connector_only:
                self._save_only_connector(save_directory, args, kwargs)
            else:
                self._save_whole(save_directory, args, kwargs)
        if kwargs.get("is_main_process", True) and os.path.isdir(save_directory):
            write_adapter(save_directory, adapter, tensors)

    def _save_whole(self, save_directory, args: tuple, kwargs: dict[str, Any]) -> None:
        before = weight_files(save_directory)
        origin, self.config.connector_of = getattr(self.config, "connector_of", None), None
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.connector_of = origin
        remove_other_layout(before, weight_files(save_directory))

    def _save_only_connector(self, save_directory, args: tuple, kwargs: dict[str, Any]) -> None:
        others = sorted(set(kwargs) - {"is_main_process", "state_dict", "max_shard_size"})
        if args or others:
            raise ValueError(f"`connector_only` cannot be combined with {others or 'positional arguments'}")
        if kwargs.get("is_main_process", True):
            self._save_connector(Path(save_directory), kwargs.get("state_dict"))


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
