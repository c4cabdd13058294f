"""Checkpoints: short names, checked files, no key lost or made up in silence, and connector-only folders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..checkpoints import resolve_checkpoint
from ..configuration import Blip2Config

logger = logging.get_logger(__name__)

CONNECTOR_NAME = "connector.safetensors"

# InstructBLIP in `transformers` (Q-Former embeddings inside the Q-Former) -> ours, as regular expressions.
_INSTRUCTBLIP_KEYS = {
    r"^qformer\.embeddings\.layernorm\.": "qformer.layernorm.",
    r"^qformer\.embeddings\.(word|position)_embeddings\.": r"embeddings.\1_embeddings.",
}


class CheckpointMixin:
    """`from_pretrained` and `save_pretrained` of the BLIP-2 models."""

    # Keys (regular expressions) that a checkpoint may lack; what is missing is initialised and named in one warning.
    _optional_keys: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Loads a model from a folder, a Hub id or the short name of a released checkpoint.

        As `transformers.PreTrainedModel.from_pretrained` (dtype, device_map, quantization_config, revision, …), and:
        short names ("blip2-flan-t5-xxl" is the local folder of that name, else "Salesforce/blip2-flan-t5-xxl"),
        InstructBLIP folders of `transformers` (for the question-conditioned model), connector-only folders.

        Raises:
            ValueError: if a file is truncated or not safetensors (naming it), or if its keys are not those of this
                model (naming them).
        """
        source = resolve_checkpoint(pretrained_model_name_or_path)
        wants_info = kwargs.pop("output_loading_info", False)
        hub_options = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "subfolder") if kwargs.get(k)}
        raw_config, _ = PreTrainedConfig.get_config_dict(source, **hub_options)  # as it is written in the file
        if not isinstance(config, Blip2Config):
            config = Blip2Config.from_pretrained(source if config is None else config, **hub_options)
            config = _apply_overrides(config, kwargs)
        if raw_config.get("connector_of"):
            return cls._from_connector(source, config, wants_info, hub_options, *model_args, **kwargs)
        _check_files(source, kwargs.get("variant"))
        if raw_config.get("model_type") == "instructblip" and "key_mapping" not in kwargs:
            kwargs["key_mapping"] = dict(_INSTRUCTBLIP_KEYS)
        try:
            model, info = super().from_pretrained(
                source, *model_args, config=config, output_loading_info=True, **kwargs
            )
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{source} is not a checkpoint of this {cls.__name__}: {error}") from error
        _forget_key_mapping(model, kwargs.get("key_mapping"))
        cls._check_keys(source, info)
        return (model, info) if wants_info else model

    @classmethod
    def _check_keys(cls, source: str, info: dict[str, Any]) -> None:
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
        new = {key for key in missing if any(re.match(pattern, key) for pattern in cls._optional_keys)}
        problems = [
            f"{len(keys)} {what} keys: {_some(keys)}"
            for what, keys in (("missing", missing - new), ("unexpected", unexpected))
            if keys
        ]
        if problems:
            raise ValueError(f"{source} is not a checkpoint of {cls.__name__}: {'; '.join(problems)}")
        if new:
            logger.warning(f"{source} does not hold {_some(new)}: newly initialised")

    # -- connector-only ----------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory, *args, connector_only: bool = False, **kwargs) -> None:
        """Saves the model as sharded safetensors that `transformers` reads as well.

        Args:
            save_directory: folder, created if needed.
            connector_only: store only what was trained (everything but the frozen tower and language model; a part
                that was in training mode without being frozen is stored too) in `connector.safetensors`, and the name
                of the checkpoint that the rest came from; `from_pretrained(save_directory)` puts both together again.

        Raises:
            ValueError: with `connector_only`, if it is unknown where the frozen parts came from.
        """
        if not connector_only:
            origin, self.config.connector_of = getattr(self.config, "connector_of", None), None
            try:
                return super().save_pretrained(save_directory, *args, **kwargs)
            finally:
                self.config.connector_of = origin
        if args or set(kwargs) - {"is_main_process", "state_dict", "max_shard_size"}:
            raise ValueError(f"`connector_only` cannot be combined with {sorted(kwargs)}")
        if not kwargs.get("is_main_process", True):
            return None
        return self._save_connector(Path(save_directory), kwargs.get("state_dict"))

    def _save_connector(self, folder: Path, state_dict: dict | None) -> None:
        origin = getattr(self.config, "connector_of", None) or self.config._name_or_path
        if not origin:
            raise ValueError(
                "`connector_only=True` needs to know where the frozen parts came from, but this model was not loaded "
                "with `from_pretrained`; save it in full once"
            )
        if os.path.isdir(origin) and folder.exists() and os.path.samefile(origin, folder):
            raise ValueError(f"`save_directory` {folder} holds the full checkpoint the frozen parts come from")
        omitted = {
            name
            for part, parameters in self._backbones().items()
            if part not in self._trained_parts
            for name, _ in parameters
        }
        state_dict = self.state_dict() if state_dict is None else state_dict
        tied = set(getattr(self, "all_tied_weights_keys", None) or ())
        tensors = {k: v.contiguous() for k, v in state_dict.items() if k not in omitted and k not in tied}
        tensors = {k: v for k, v in tensors.items() if not self._is_backbone_buffer(k)}
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

    def _is_backbone_buffer(self, key: str) -> bool:
        """Persistent buffers of a part that is left out come with its own checkpoint."""
        part = key.split(".")[0]
        if part not in self._backbones() or part in self._trained_parts:
            return False
        return any(key == f"{part}.{name}" for name, _ in getattr(self, part).named_buffers())

    @classmethod
    def _from_connector(cls, source, config, wants_info, hub_options, *model_args, **kwargs):
        origin = config.connector_of
        connector = cached_file(source, CONNECTOR_NAME, **hub_options)
        _check_safetensors(Path(connector))
        for option in ("revision", "subfolder"):  # those of the connector, not of the checkpoint it belongs to
            kwargs.pop(option, None)
        base = Blip2Config.from_pretrained(origin)
        if base.text_config.to_dict().get("vocab_size") != config.text_config.to_dict().get("vocab_size"):
            raise ValueError(
                f"{connector} belongs to a language model of {config.text_config.vocab_size} tokens, its base "
                f"checkpoint {origin} has {base.text_config.vocab_size}"
            )
        model, info = cls.from_pretrained(origin, *model_args, config=config, output_loading_info=True, **kwargs)
        own = model.state_dict()
        with safe_open(connector, framework="pt") as file:
            foreign = [
                k for k in list(file.keys()) if k not in own or list(own[k].shape) != file.get_slice(k).get_shape()
            ]
            if foreign:
                raise ValueError(f"{connector} is not a connector of {cls.__name__} on {origin}: {_some(foreign)}")
            for key in list(file.keys()):
                own[key].copy_(file.get_tensor(key))
        model.config.connector_of = origin
        return (model, info) if wants_info else model


def _apply_overrides(config: Blip2Config, kwargs: dict[str, Any]) -> Blip2Config:
    """Fields of the config given to `from_pretrained` (as `transformers` does it), validated again."""
    fields = {
        key: kwargs.pop(key) for key in list(kwargs) if key in Blip2Config.__dataclass_fields__ and key != "dtype"
    }
    if not fields:
        return config
    return Blip2Config.from_dict({**config.to_dict(), **fields, "name_or_path": config._name_or_path})


def _forget_key_mapping(model, key_mapping: dict[str, str] | None) -> None:
    """`transformers` would undo the renaming on save; what we save has our names and our config."""
    conversions = getattr(model, "_weight_conversions", None)
    if key_mapping and conversions:
        targets = set(key_mapping.values())
        model._weight_conversions = [c for c in conversions if not targets & set(c.target_patterns)]


def _check_files(source: str, variant: str | None) -> None:
    """Raises ValueError if a local checkpoint lacks a file or has a broken one; a Hub's files are checked by it."""
    folder = Path(source)
    if not folder.is_dir():
        return
    suffix = f".{variant}" if variant else ""
    index = folder / f"model.safetensors.index{suffix}.json"
    files = [folder / f"model{suffix}.safetensors"]
    if not files[0].exists() and index.exists():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
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
