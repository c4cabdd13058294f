"""Linear layers on processors that torch's default matrix library is slow on.

On x86 torch multiplies float32 matrices by MKL, which packs the weights anew for each product and is not made for AMD's
processors. There oneDNN, which torch contains, too, takes 0.73 of the time for weights of 4096 x 1024 and 40 rows (8
prompts with 5 beams), 0.83 for hundreds of rows, 0.9 for weights of 1024 x 1024, 0.6 for a vocabulary of 50,304 (Zen 4,
one thread, torch 2.13). It adds in another order, so that results differ by rounding; nothing is copied or kept.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

_LEAST_WEIGHTS = 2**20  # of a layer: below there is little to gain
_Method = TypeVar("_Method", bound=Callable[..., Any])


@contextlib.contextmanager
def fast_linears(model: nn.Module) -> Iterator[None]:
    """While active, a model's large float32 layers on a CPU that is known for it are computed by oneDNN, where no
    gradient is wanted. `torch.backends.mkldnn.enabled = False` turns it off."""
    wanted = torch.backends.mkldnn.enabled and onednn_is_faster()
    changed = [module for module in model.modules() if _is_large(module)] if wanted else []
    for module in changed:
        module.forward = functools.partial(_linear, module)
    try:
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)  # gone if another thread generates with the same model


def with_fast_linears(method: _Method) -> _Method:
    """A model's method, in `fast_linears` of it."""

    @functools.wraps(method)
    def fast(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with fast_linears(self):
            return method(self, *args, **kwargs)

    return fast


@functools.cache
def onednn_is_faster() -> bool:
    """Where it was measured to be: AMD's processors with AVX-512, torch with MKL."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
    )


def _processor() -> str:
    """What the system tells about it (Linux: in a file; Windows: in a name that contains the vendor's)."""
    told = platform.processor()
    with contextlib.suppress(OSError):
        told += Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return told


def _is_large(module: nn.Module) -> bool:
    """Whether it is a plain layer with large weights (neither quantised nor sharded) that nobody else has changed."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return (
        type(weight) is nn.Parameter
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.numel() >= _LEAST_WEIGHTS
    )


def _linear(layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    plain = states.dtype == torch.float32 and states.numel() and not torch.is_autocast_enabled("cpu")
    if plain and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(states, layer.weight, layer.bias, "none", [], "")
    return nn.functional.linear(states, layer.weight, layer.bias)
