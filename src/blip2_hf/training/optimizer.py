"""Parameter groups: weight decay and layer-wise learning rates.

As the original code builds them, except that temperature is not decayed, and that the layer-wise rates are applied
(the original code computes them and then overwrites them).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_TOWER = "vision_model."


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Every trained parameter of a BLIP-2 model in exactly one group, for a torch optimiser.

    Biases, norms and all other parameters of one dimension (temperature too) are not decayed. With `layer_decay` d,
    the learning rate of block i = 1 … depth of a trained vision tower is lr · d^(depth+1−i), that of its embeddings
    (all that comes before the blocks) lr · d^(depth+1); of all else lr. A scheduler that multiplies keeps the ratios.

    Args:
        model: retrieval or generation model, with any tower.
        learning_rate: lr, of the parts that are not scaled.
        weight_decay: of the parameters that are decayed.
        layer_decay: d, above 0 and at most 1.

    Returns:
        Groups with "params", "param_names", "weight_decay" and "lr", the largest rate first.

    Raises:
        ValueError: nothing to train, `layer_decay` out of range, or not 1 for a tower without a stack of blocks.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"`layer_decay` must be above 0 and at most 1, got {layer_decay!r}")
    scales = learning_rate_scales(model, layer_decay)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = is_decayed(name, parameter)
        group = groups.setdefault(
            (scales.get(name, 1.0), decayed),
            {
                "params": [],
                "param_names": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr": learning_rate * scales.get(name, 1.0),
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    if not groups:
        raise ValueError("`model` has no parameter to train: all are frozen")
    return [groups[key] for key in sorted(groups, reverse=True)]


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter gets weight decay: matrices and larger, but no biases."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed's ZeRO-3 leaves an empty tensor
    return len(shape) > 1 and not name.endswith(".bias")


def learning_rate_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Factors of the learning rate, by name, of the parameters of a trained tower that have one other than 1.

    Raises:
        ValueError: with `layer_decay` below 1, for a trained tower without a stack of blocks.
    """
    if layer_decay == 1.0:
        return {}
    scales: dict[str, float] = {}
    for start, tower in _towers(model):
        names = [name for name, _ in tower.named_parameters()]
        if not any(
            parameter.requires_grad and not name.startswith("post_layernorm.")
            for name, parameter in tower.named_parameters()
        ):
            continue
        blocks = tower_blocks(tower)
        depth, index = len(blocks), 0  # parameters stand in the order of computation
        for name in names:
            number = next((i for i, block in enumerate(blocks, start=1) if name.startswith(f"{block}.")), None)
            if number is not None:
                index = number
            elif index:
                continue  # behind the blocks
            scales[start + name] = layer_decay ** (depth + 1 - index)
    return scales


def tower_blocks(tower: nn.Module) -> list[str]:
    """Names of the blocks of a vision tower, from the first: the entries of its largest list of modules.

    Raises:
        ValueError: if there is no such list.
    """
    stacks = {
        name: [f"{name}.{i}" for i, block in enumerate(module) if any(True for _ in block.parameters())]
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    outermost = {
        name: blocks
        for name, blocks in stacks.items()
        if blocks and not any(name.startswith(f"{other}.") for other in stacks)
    }
    if not outermost:
        raise ValueError(f"`layer_decay` needs a tower with a stack of blocks, {type(tower).__name__} has none")
    return max(outermost.values(), key=len)


def _towers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The vision tower and the start of its parameters' names, also inside a wrapper."""
    for name, module in model.named_modules():
        if name == _TOWER[:-1] or name.endswith(f".{_TOWER[:-1]}"):
            yield f"{name}.", module
            return
