"""Values of tensors, read in chunks of rows: the mean row and equality across precisions."""

from __future__ import annotations

import torch

_CHUNK = 4096  # rows that are copied to another precision at once


def mean_row(rows: torch.Tensor) -> torch.Tensor:
    """[1, …] in the dtype of `rows`. As an output embedding it gives the mean of all logits, and by that no more than
    its share of the probability (Jensen): new tokens change the distribution as little as can be."""
    total = torch.zeros_like(rows[:1], dtype=torch.float64)
    for chunk in rows.split(_CHUNK):
        total += chunk.double().sum(0, keepdim=True)
    return (total / len(rows)).to(rows.dtype)


def equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors agree, up to the rounding to the coarser of their precisions."""
    if first.dtype == second.dtype:
        return torch.equal(first, second)
    coarse = max((first.dtype, second.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    tolerance = torch.finfo(coarse).eps
    parts = zip(first.split(_CHUNK), second.split(_CHUNK), strict=True)
    return all(torch.allclose(a.float(), b.float(), rtol=tolerance, atol=1e-7) for a, b in parts)
