"""Half precision for what is frozen, float32 for what is trained (Li et al. 2023, sec. 3.4)."""

from __future__ import annotations

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

HALF_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def cast_frozen_vision(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the frozen vision tower of a BLIP-2 model to `dtype`; its `post_layernorm` becomes float32.

    Raises:
        ValueError: if the tower is not frozen (`model.freeze_vision()`).
    """
    tower = model.vision_model
    trained = [
        name
        for name, parameter in tower.named_parameters()
        if parameter.requires_grad and not name.startswith("post_layernorm.")
    ]
    if trained:
        raise ValueError(
            f"`frozen_vision_dtype` {dtype} needs a frozen tower (`model.freeze_vision()`), but {len(trained)} of its "
            f"parameters are trained, such as vision_model.{trained[0]}"
        )
    tower.to(dtype)
    tower.post_layernorm.float()


def check_trained_precision(model: nn.Module, fp16: bool) -> None:
    """What is trained must be float32: under float16 the gradients' scaling requires it, otherwise it is advisable.

    Raises:
        ValueError: with `fp16`, if trained parameters are in another precision.
    """
    other = {
        name: parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dtype != torch.float32
    }
    if not other:
        return
    name, dtype = next(iter(other.items()))
    message = f"{len(other)} trained parameters are not float32, such as {name} ({dtype})"
    if fp16:
        raise ValueError(f"`fp16=True` needs float32 for all that is trained, but {message}")
    logger.warning(f"{message}: small updates are lost in half precision")
