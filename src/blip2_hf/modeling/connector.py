"""Connector-only checkpoints: what was trained, and the name of the checkpoint that the rest came from."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.generation import GenerationConfig
from transformers.utils.hub import cached_file

from ..checkpoints import short_name
from ..configuration import Blip2Config
from .checkpoint_files import CONNECTOR_NAME, check_safetensors, some
from .stored_tensors import StoredTensor, stored_tensors
from .text_branch import TEXT_FIELDS, insert_text_branch, text_branch_shapes
from .towers import tower_side


class ConnectorMixin:
    """Saving and loading of connectors, for `CheckpointMixin`."""

    # Version counters of the backbones' weights after loading (see `_changed_parts`); None: not loaded from anywhere.
    _loaded_versions: dict[str, int] | None = None

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
            origin = short_name(os.path.abspath(origin))  # it must be found from another working directory, too
        state_dict = self.state_dict() if state_dict is None else state_dict
        keys = self._connector_keys(state_dict, self._changed_parts())
        tensors = {key: state_dict[key].contiguous() for key in keys}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / CONNECTOR_NAME, metadata={"format": "pt"})
        config = copy.deepcopy(self.config)
        config.connector_of = os.fspath(origin)
        config.architectures = [type(self).__name__]
        if hasattr(config, "quantization_config"):  # of the base, which decides by itself when it is loaded
            del config.quantization_config
        config.save_pretrained(folder)
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
        keys = list(keys)
        for part, parameters in self._backbones().items():
            if part not in parts:
                # all that lies in it, also what a quantised weight consists of, but not what is trained anyway
                kept = {f"{part}.{name}" for name, _ in getattr(self, part).named_parameters()}
                kept -= {name for name, _ in parameters}
                left_out |= {key for key in keys if key.startswith(f"{part}.") and key not in kept}
        return [key for key in keys if key not in left_out]

    @classmethod
    def _from_connector(cls, source, config, hub_options, *model_args, **kwargs):
        origin = config.connector_of
        connector = Path(source, kwargs.get("subfolder") or "", CONNECTOR_NAME)
        if not connector.exists():
            if os.path.isdir(source):
                raise ValueError(f"{connector} is missing, config.json names it as a connector of {origin}")
            connector = Path(cached_file(source, CONNECTOR_NAME, **hub_options))
        check_safetensors(connector)
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
        wanted, config = config, _as_in(base, config)
        if hasattr(base, "quantization_config"):
            config.quantization_config = base.quantization_config
        model, info = cls._load(origin, *model_args, config=config, **kwargs)
        with stored_tensors([connector]) as tensors:
            stored = set(tensors)
            parts = {
                part for part, weights in model._backbones().items() if not stored.isdisjoint(n for n, _ in weights)
            }
            _adapt(model, wanted, parts)
            own = model.state_dict()
            missing = set(model._connector_keys(own, parts)) - stored
            foreign = [k for k in stored if k not in own or list(own[k].shape) != tensors[k].get_shape()]
            kinds = {"missing keys": missing, "unexpected keys or shapes": foreign}
            problems = [f"{len(keys)} {kind}: {some(keys)}" for kind, keys in kinds.items() if keys]
            if problems:
                raise ValueError(f"{connector} is no connector of {cls.__name__} on {origin}: {'; '.join(problems)}")
            if offloaded := [key for key in stored if own[key].is_meta]:
                raise ValueError(f"`device_map` must not offload what {connector} holds: {some(offloaded)}")
            for key, tensor in tensors.items():
                if isinstance(tensor, StoredTensor):
                    tensor.read_into(own[key])
                else:
                    own[key].copy_(tensor[...])
        info["missing_keys"] = set(info["missing_keys"]) - stored
        model.config.connector_of = origin
        if model.can_generate() and "generation_config" not in kwargs:
            with contextlib.suppress(OSError):  # a connector of an older save may have none
                model.generation_config = GenerationConfig.from_pretrained(source, **connector_options)
        return model, info


def _as_in(base: Blip2Config, config: Blip2Config) -> Blip2Config:
    """A connector's config with the shapes of the checkpoint it belongs to, which is loaded as it is."""
    config = copy.deepcopy(config)
    config.text_config.get_text_config().vocab_size = base.text_config.get_text_config().vocab_size
    if _image_size(config) != _image_size(base):
        config.vision_config = copy.deepcopy(base.vision_config)
    qformer, base_qformer = config.qformer_config, base.qformer_config
    if qformer.use_qformer_text_input and not base_qformer.use_qformer_text_input:
        qformer.use_qformer_text_input = False
    elif qformer.vocab_size != base_qformer.vocab_size:
        qformer.vocab_size = base_qformer.vocab_size
    return config


def _adapt(model, config: Blip2Config, parts: set[str]) -> None:
    """What was done to the model between the checkpoint and its connector, in place; the values are filled in later.

    Args:
        config: that of the connector.
        parts: the backbones that the connector holds.
    """
    if _image_size(config) != _image_size(model.config):
        model.resize_image_positions(tower_side(config.vision_config, "image_size"))
    wanted, qformer = config.qformer_config, model.config.qformer_config
    if wanted.use_qformer_text_input and not qformer.use_qformer_text_input:
        shapes = text_branch_shapes(wanted)
        insert_text_branch(model, wanted, {key: torch.zeros(shape) for key, shape in shapes.items()})
    if "language_model" in model._backbones():
        size = config.text_config.get_text_config().vocab_size
        if size != model.config.text_config.get_text_config().vocab_size and "language_model" in parts:
            model.resize_token_embeddings(size, mean_resizing=False)
    elif wanted.vocab_size != qformer.vocab_size:
        model.resize_token_embeddings(wanted.vocab_size, mean_resizing=False)
        for name in TEXT_FIELDS:
            setattr(qformer, name, getattr(wanted, name))


def _image_size(config: Blip2Config) -> tuple:
    return tuple(getattr(config.vision_config, name, None) for name in ("image_size", "num_patches"))
