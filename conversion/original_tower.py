"""The original's two towers, straight from its parameter names: plain functions of tensors, written apart from our
modules and tables, so that a converted checkpoint is checked against something that shares neither with it.

What is computed: https://github.com/salesforce/LAVIS, `lavis/models/eva_vit.py` and `lavis/models/clip_vit.py`.
Shapes: B images, P tokens (class token and patches), D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

# The value of a parameter by its original name.
Read = Callable[[str], torch.Tensor]
# Told of an intermediate result by its place; what it returns is computed with from there on.
Watch = Callable[[str, torch.Tensor], torch.Tensor]

EVA_EPS = 1e-6
CLIP_EPS = 1e-5
LN_VISION_EPS = 1e-5

_TOWER = "visual_encoder."


def layer_norm(read: Read, name: str, states: torch.Tensor, eps: float) -> torch.Tensor:
    weight = read(f"{name}.weight")
    return nn.functional.layer_norm(states, weight.shape, weight, read(f"{name}.bias"), eps)


def linear(read: Read, name: str, states: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(states, read(f"{name}.weight"), read(f"{name}.bias"))


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, N, D] and twice [B, M, D] -> [B, N, D]; `mask` [B, 1, N or 1, M] is added to the scores."""
    query, key, value = (states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (query, key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def image_features(read: Read, kind: str, layers: int, heads: int, pixels: torch.Tensor, watch: Watch) -> torch.Tensor:
    """Pixels [B, 3, H, W] -> [B, P, D] after `ln_vision`, which is outside of the tower.

    Args:
        kind: "eva" or "clip".
        layers: how many are computed, from the first; the original builds neither tower's last.
        watch: gets "tower, embeddings", "tower, layer 0", …, "tower, ln_vision".
    """
    states = (_eva if kind == "eva" else _clip)(read, layers, heads, pixels, watch)
    return watch("tower, ln_vision", layer_norm(read, "ln_vision", states, LN_VISION_EPS))


def _eva(read: Read, layers: int, heads: int, pixels: torch.Tensor, watch: Watch) -> torch.Tensor:
    patch = read(f"{_TOWER}patch_embed.proj.weight")
    patches = nn.functional.conv2d(pixels, patch, read(f"{_TOWER}patch_embed.proj.bias"), patch.shape[-1])
    states = patches.flatten(2).transpose(1, 2)
    states = torch.cat([read(f"{_TOWER}cls_token").expand(len(states), -1, -1), states], dim=1)
    states = watch("tower, embeddings", states + read(f"{_TOWER}pos_embed"))
    for index in range(layers):
        name = f"{_TOWER}blocks.{index}"
        normed = layer_norm(read, f"{name}.norm1", states, EVA_EPS)
        query_bias, value_bias = read(f"{name}.attn.q_bias"), read(f"{name}.attn.v_bias")
        bias = torch.cat([query_bias, torch.zeros_like(query_bias), value_bias])
        parts = nn.functional.linear(normed, read(f"{name}.attn.qkv.weight"), bias).chunk(3, dim=-1)
        states = states + linear(read, f"{name}.attn.proj", attention(*parts, heads))
        hidden = linear(read, f"{name}.mlp.fc1", layer_norm(read, f"{name}.norm2", states, EVA_EPS))
        states = states + linear(read, f"{name}.mlp.fc2", nn.functional.gelu(hidden))
        states = watch(f"tower, layer {index}", states)
    return states


def _clip(read: Read, layers: int, heads: int, pixels: torch.Tensor, watch: Watch) -> torch.Tensor:
    patch = read(f"{_TOWER}conv1.weight")
    states = nn.functional.conv2d(pixels, patch, stride=patch.shape[-1]).flatten(2).transpose(1, 2)
    states = torch.cat([read(f"{_TOWER}class_embedding").expand(len(states), 1, -1), states], dim=1)
    states = layer_norm(read, f"{_TOWER}ln_pre", states + read(f"{_TOWER}positional_embedding"), CLIP_EPS)
    states = watch("tower, embeddings", states)
    for index in range(layers):
        name = f"{_TOWER}transformer.resblocks.{index}"
        normed = layer_norm(read, f"{name}.ln_1", states, CLIP_EPS)
        weight, bias = read(f"{name}.attn.in_proj_weight"), read(f"{name}.attn.in_proj_bias")
        parts = nn.functional.linear(normed, weight, bias).chunk(3, dim=-1)
        states = states + linear(read, f"{name}.attn.out_proj", attention(*parts, heads))
        hidden = linear(read, f"{name}.mlp.c_fc", layer_norm(read, f"{name}.ln_2", states, CLIP_EPS))
        states = states + linear(read, f"{name}.mlp.c_proj", hidden * torch.sigmoid(1.702 * hidden))  # "QuickGELU"
        states = watch(f"tower, layer {index}", states)
    return states
