"""What the tower and the Q-Former share: picking the attention kernel and running blocks with checkpointing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel


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
    """Attention by the kernel that `module.config` names; by the eager one if its weights are asked for, or where that
    kernel is slow backwards (`slow_backward`).

    `module` has `config`, `scaling`, `attention_dropout`. Shapes as in `eager_attention`; the output is contiguous in
    its last two dimensions, so that `flatten(2)` gives the heads side by side.
    """
    implementation = module.config._attn_implementation
    kernel: Callable = eager_attention
    slow = implementation == "sdpa" and query.requires_grad and slow_backward(query.device.type, query.dtype)
    if not (output_attentions or slow or implementation in (None, "eager")):
        kernel = ALL_ATTENTION_FUNCTIONS[implementation]
        if implementation == "flex_attention" and attention_mask is not None:
            attention_mask = _block_mask(attention_mask, query.shape[2], key.shape[2])
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


def slow_backward(device_type: str, dtype: torch.dtype | None) -> bool:
    """Whether the backward pass of torch's fused attention costs many times that of the written-out one: on a CPU in
    half precision it does (torch 2.13, bfloat16, 40 to 65 keys: five to twelve times)."""
    return device_type == "cpu" and dtype in (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def eager_if(wanted: bool, model: PreTrainedModel) -> Iterator[None]:
    """While active, a model of `transformers` runs its eager attention, the only one that gives weights, if `wanted`;
    its own choice is put back afterwards."""
    chosen = model.config._attn_implementation
    if not wanted or chosen == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


@contextlib.contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """While active, no block of a model is checkpointed. A model in training mode would drop its cache for it, and so
    generate from the last token alone; without gradients there is nothing to save anyway."""
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


def _block_mask(mask: torch.Tensor, queries: int, keys: int) -> Any:
    """A boolean mask as flex attention's own kind. (A tensor of additive scores makes its CPU kernel read beyond the
    tensor's end, and the process dies.)"""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, heads = mask.shape[:2]
    allowed = mask.expand(-1, -1, queries, keys)

    def may_attend(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return allowed[b, h if heads > 1 else 0, q, k]

    return create_block_mask(may_attend, batch, heads if heads > 1 else None, queries, keys, device=str(mask.device))


def run_block(stack: nn.Module, block: nn.Module, *args: Any) -> Any:
    """Calls `block(*args)`, under gradient checkpointing where `gradient_checkpointing_enable()` set it on `stack`.

    Blocks are functions of their arguments (caches are written outside of them), so that the second run in the
    backward pass changes nothing.

    Raises:
        ValueError: for reentrant checkpointing, which does not see keys and values inside tuples: their gradients
            would be lost.
    """
    if stack.gradient_checkpointing and stack.training:
        if getattr(stack._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError('`gradient_checkpointing_kwargs` must have "use_reentrant" False, got True')
        return stack._gradient_checkpointing_func(block.__call__, *args)
    return block(*args)
