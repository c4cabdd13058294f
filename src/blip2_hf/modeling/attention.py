"""What the tower and the Q-Former share: picking the attention kernel and running blocks with checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, the only kernel that can return its weights.

    Args:
        query: [B, heads, N, d]; key, value: [B, heads, M, d].
        attention_mask: boolean (True = may attend), broadcastable to [B, heads, N, M].

    Returns:
        output [B, N, heads, d] and weights [B, heads, N, M] after softmax (and dropout).
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    output_attentions: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by the kernel that `module.config` names; by the eager one if its weights are asked for.

    `module` has `config`, `scaling`, `attention_dropout`. Shapes as in `eager_attention`; the output is contiguous in
    its last two dimensions, so that `flatten(2)` gives the heads side by side.
    """
    implementation = module.config._attn_implementation
    kernel: Callable = eager_attention
    if not output_attentions and implementation not in (None, "eager"):
        kernel = ALL_ATTENTION_FUNCTIONS[implementation]
        if implementation == "flex_attention" and attention_mask is not None:
            # flex takes an additive mask of one value per (row, query, key)
            allowed = attention_mask.expand(-1, -1, query.shape[-2], -1)
            attention_mask = torch.zeros_like(allowed, dtype=query.dtype)
            attention_mask = attention_mask.masked_fill(~allowed, torch.finfo(query.dtype).min)
    output, weights = kernel(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=module.scaling,
        dropout=module.attention_dropout if module.training else 0.0,
    )
    return output.flatten(2), weights if output_attentions else None


def run_block(stack: nn.Module, block: nn.Module, *args: Any) -> Any:
    """Calls `block(*args)`, under gradient checkpointing where `gradient_checkpointing_enable()` set it on `stack`.

    Blocks are functions of their arguments (caches are written outside of them), so that the second run in the
    backward pass changes nothing.
    """
    if stack.gradient_checkpointing and stack.training:
        return stack._gradient_checkpointing_func(block.__call__, *args)
    return block(*args)
