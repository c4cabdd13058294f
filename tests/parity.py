"""What comparisons of two models need: gradients, single changed weights, checkpointing, counting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

EXACT = {"atol": 1e-5, "rtol": 1e-5}


@contextmanager
def changed(model: nn.Module, name: str, by: float = 0.1) -> Iterator[None]:
    """One parameter with noise on it, for negative controls; put back afterwards."""
    parameter = model.get_parameter(name)
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(by * torch.randn_like(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(before)


def without_dropout(model: nn.Module) -> nn.Module:
    """Training mode (which gradient checkpointing needs) that computes what evaluation mode computes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model.train()


def enable_checkpointing(model: nn.Module, **options: object) -> None:
    """`activation_checkpointing_enable`, or what transformers before 5.23 calls it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or None)


def gradients(model: nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of `loss()` for every parameter that gets one."""
    model.zero_grad()
    loss().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert any(gradient.abs().sum() > 0 for gradient in first.values())
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@contextmanager
def counted(*modules: nn.Module) -> Iterator[list[nn.Module]]:
    """A list to which each call of one of the modules adds that module."""
    calls: list[nn.Module] = []
    hooks = [module.register_forward_hook(lambda module, *_: calls.append(module)) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
