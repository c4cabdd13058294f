"""Precisions of what is written: the frozen parts may be halved, what is trained stays as it is unless asked."""

from __future__ import annotations

import re

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED_DTYPES = {  # by the names that safetensors has for them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}

_PIECE = 2**22  # values
_FROZEN = re.compile(r"vision_model\.(?!post_layernorm\.)|language_model\.")


def is_frozen(name: str) -> bool:
    """Whether one of our names is that of a part that BLIP-2 keeps as it got it: tower and language model.

    The tower's last norm (`ln_vision` of the original) is BLIP-2's own and trained.
    """
    return _FROZEN.match(name) is not None


def written_as(
    name: str, dtype: torch.dtype, frozen: torch.dtype | None = None, trained: torch.dtype | None = None
) -> torch.dtype:
    """The dtype that a tensor of ours is written in; None: as it is. Integers stay integers."""
    wanted = frozen if is_frozen(name) else trained
    return wanted if wanted is not None and dtype.is_floating_point else dtype


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in another dtype; itself if it has that.

    Raises:
        ValueError: if a number is too large for the dtype, naming the tensor.
    """
    if tensor.dtype == dtype:
        return tensor
    made = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    if tensor.is_meta:
        return made
    narrower = torch.finfo(tensor.dtype).max > torch.finfo(dtype).max
    # In pieces, as the comparison needs room of its own.
    for old, new in zip(tensor.reshape(-1).split(_PIECE), made.view(-1).split(_PIECE), strict=True):
        new.copy_(old)
        if narrower and new.isinf().any() and (large := old[new.isinf() & ~old.isinf()]).numel():
            at = large.abs().max().item()
            raise ValueError(f"{name!r} holds {at:g}, which is too large for {str(dtype).removeprefix('torch.')}")
    return made
