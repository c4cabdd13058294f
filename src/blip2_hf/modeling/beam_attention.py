"""Attention of several sequences per row (beams) over keys and values that are there once per row, not copied.

Registered with `transformers` as an attention implementation of its own, which a model is set to while it decodes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

NAME = "blip2_hf_shared_rows"
# Decoders with one attention over their own tokens and the encoder's output, the keys of both side by side.
_MERGED = ("t5gemma2",)


def shared_rows_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`transformers`' "sdpa", also for more rows of queries than of keys.

    Args:
        query: [rows * times, heads, 1, d]; the sequences of a row are next to each other.
        key, value: [rows * times, heads, M, d], or [rows, heads, M, d] for all sequences of a row.
        attention_mask: [rows * times, 1, 1, M] (the same for the sequences of a row where they share keys) or None.

    Returns:
        output [rows * times, 1, heads, d], and None.
    """
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    sequences, rows = query.shape[0], key.shape[0]
    if sequences == rows:
        return attention(module, query, key, value, attention_mask, **kwargs)
    times = sequences // rows
    folded = query.reshape(rows, times, *query.shape[1:]).squeeze(3).transpose(1, 2)  # [rows, heads, times, d]
    if attention_mask is not None:
        attention_mask = attention_mask[::times]
    kwargs["is_causal"] = False  # the queries are no sequence
    output, _ = attention(module, folded, key, value, attention_mask, **kwargs)
    return output.reshape(sequences, 1, *output.shape[2:]), None


AttentionInterface.register(NAME, shared_rows_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def can_share_rows(model: PreTrainedModel) -> bool:
    """Whether a model's attention goes through what is registered here, and would be `transformers`' "sdpa" else."""
    if model.config.model_type in _MERGED:
        return False
    functions = getattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS", None)
    return functions is ALL_ATTENTION_FUNCTIONS and all(
        part.config._attn_implementation == "sdpa" for part in _parts(model)
    )


@contextlib.contextmanager
def shared_rows(model: PreTrainedModel) -> Iterator[None]:
    """While active, a model that runs "sdpa" runs `shared_rows_attention`."""
    # One by one: in transformers 5.17 setting the whole leaves out parts with a config of the same kind.
    parts = _parts(model)
    for part in parts:
        part.set_attn_implementation(NAME)
    try:
        yield
    finally:
        for part in parts:
            part.set_attn_implementation("sdpa")


def _parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The model, its encoder and decoder, …: what has a config."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
