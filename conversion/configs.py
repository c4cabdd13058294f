"""The config of what a conversion makes, and the tensors that a model of that config has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from blip2_hf.checkpoints import checkpoint_config
from blip2_hf.configuration import Blip2Config
from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval

from .detect import Detected, require_checkpoint
from .steps import Target, TensorInfo

# Epsilon of the original code's `ln_vision`. The published checkpoints of `transformers` have 1e-6.
ORIGINAL_LN_VISION_EPS = 1e-5


def config_for(found: Detected, config: str | os.PathLike | None = None) -> Blip2Config:
    """The config of the model of ours that `found` becomes.

    Args:
        found: what is converted.
        config: a config.json or a folder with one, for shapes that were never released; the image size is that of the
            positions, where the tower is there. None: that of the released checkpoint.

    Raises:
        ValueError: if `found` could be several released checkpoints, or is none; for a config of another kind of
            language model or tower, or that cannot be read.
    """
    if config is None:
        made = Blip2Config.for_checkpoint(require_checkpoint(found))
    else:
        made = _read(config)
        _check_kind(found, made, config)
    if found.image_size is not None:
        made.vision_config.image_size = found.image_size
    if found.kind.startswith("lavis") and made.vision_layernorm_eps is None:
        made.vision_layernorm_eps = ORIGINAL_LN_VISION_EPS
    return made


def model_class(model: Literal["retrieval", "generation"]) -> type:
    """Our class for a kind of model."""
    return {"retrieval": Blip2ForImageTextRetrieval, "generation": Blip2ForConditionalGeneration}[model]


def target_of(config: Blip2Config, model: Literal["retrieval", "generation"]) -> Target:
    """Names, shapes and second names of the tensors of our model with this config; nothing is allocated."""
    with torch.device("meta"):
        made = model_class(model)(config)
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in made.state_dict().items()}
    return Target(infos, dict(made.all_tied_weights_keys))


def original_vocabulary(config: Blip2Config) -> int:
    """Rows of the vocabulary that the language model has in its own folder, and so in the original's model.

    An OPT's has spare rows already; the published BLIP-2 files have more of them for the placeholder.
    """
    text = config.text_config.get_text_config()
    if text.model_type != "opt":
        return text.vocab_size
    return min(text.vocab_size, checkpoint_config("blip2-opt-2.7b-coco")["text_config"]["vocab_size"])


def _read(config: str | os.PathLike) -> Blip2Config:
    path = Path(config)
    if not path.exists():
        raise ValueError(f"`config` must be a config.json or a folder with one, got {os.fspath(config)!r}")
    try:
        return Blip2Config.from_pretrained(path)
    except (OSError, TypeError, AttributeError) as error:
        raise ValueError(f"`config` {os.fspath(config)!r} cannot be read: {error}") from error


def _check_kind(found: Detected, config: Blip2Config, source: str | os.PathLike) -> None:
    tower = (
        "eva" if config.uses_eva_tower else "clip" if config.vision_config.model_type == "clip_vision_model" else None
    )
    if found.tower is not None and tower != found.tower:
        raise ValueError(
            f"`config` {os.fspath(source)!r} has a tower of model_type {config.vision_config.model_type!r}, but the "
            f"tensors are those of a model with {found.tower}"
        )
    if found.model == "generation" and found.language in ("opt", "t5"):
        family = config.text_config.model_type
        if family != found.language:
            raise ValueError(
                f"`config` {os.fspath(source)!r} has a language model of model_type {family!r}, but the tensors are "
                f"those of a model with {found.language}"
            )
