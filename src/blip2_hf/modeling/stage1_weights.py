"""The result of representation learning as the start of a generation model: its tensors, wherever they are."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoints import path_or_id, resolve_checkpoint
from ..configuration import Blip2Config
from .backbone_report import SourceWeights, TensorOrigin

_CONTRAST = "of image-text contrast (ITC)"
NO_TEXT_BRANCH = {
    r"^embeddings\.": "no text branch (`text_branch=True` keeps it)",
    r"^qformer\.encoder\.layer\.\d+\.(intermediate|output)\.": "no text branch (`text_branch=True` keeps it)",
}
# Keys of a retrieval model (regular expressions) that a generation model has no place for, and why.
STAGE1_HEADS = {
    r"^(vision|text)_projection\.": _CONTRAST,
    r"^temperature$": _CONTRAST,
    r"^itm_head\.": "head of image-text matching (ITM)",
    r"^lm_head\.": "head of image-grounded text generation (ITG)",
}


def read_stage1(argument: str, source: Any) -> tuple[str, Blip2Config, SourceWeights]:
    """Name, config and float32 tensors of a retrieval checkpoint.

    Args:
        argument: what to call it in errors.
        source: a folder, a Hub id or a short name; a connector-only folder, too.

    Raises:
        ValueError: if it is no checkpoint of a retrieval model.
        OSError: for a name that is neither a folder nor on the Hub.
    """
    from .retrieval import Blip2ForImageTextRetrieval

    name = resolve_checkpoint(path_or_id(argument, source))
    try:
        model, info = Blip2ForImageTextRetrieval._load(name, dtype=torch.float32)
    except ValueError as error:
        raise ValueError(f"`{argument}` must be a checkpoint of stage 1 (a retrieval model): {error}") from error
    weights = SourceWeights()
    absent = {*info["missing_keys"], *model.all_tied_weights_keys}  # new, or a second name
    for key, tensor in model.state_dict().items():
        if key not in absent:
            weights.tensors[key] = tensor
            weights.loaded.append(TensorOrigin(key, name, key, tensor.numel()))
    return name, model.config, weights
