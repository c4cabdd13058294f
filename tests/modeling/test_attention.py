"""Which attention kernel runs, and that the written-out one equals it."""

from __future__ import annotations

import pytest
import torch

from blip2_hf.modeling.attention import attend, slow_backward
from blip2_hf.modeling.vision import Blip2VisionModel
from tiny_models import VISION, pixels


@pytest.fixture()
def fused(monkeypatch) -> list[torch.dtype]:
    """The dtypes of the calls of torch's fused attention."""
    calls, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        calls.append(query.dtype)
        return kernel(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return calls


def attention(dtype: torch.dtype) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor]:
    """A module with a kernel, [2, 3, 5, 8] queries, [2, 3, 7, 8] keys and values, and a mask."""
    module = torch.nn.Module()
    module.config, module.scaling, module.attention_dropout = Blip2VisionModel.config_class(**VISION), 8**-0.5, 0.0
    module.config._attn_implementation = "sdpa"
    generator = torch.Generator().manual_seed(0)
    rows = tuple(torch.randn(2, 3, n, 8, generator=generator).to(dtype) for n in (5, 7, 7))
    return module, rows, torch.rand(2, 1, 5, 7, generator=generator) > 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fused_kernel_is_not_trained_through_in_half_precision(dtype, fused) -> None:
    module, rows, mask = attention(dtype)
    plain, _ = attend(module, *rows, mask, output_attentions=False)
    assert fused == [dtype]  # nothing to go backwards through
    rows[0].requires_grad_()
    trained, _ = attend(module, *rows, mask, output_attentions=False)
    assert fused == [dtype] and trained.requires_grad
    torch.testing.assert_close(trained, plain, atol=0.02, rtol=0.02)


def test_it_is_in_float32(fused) -> None:
    module, rows, mask = attention(torch.float32)
    rows[0].requires_grad_()
    attend(module, *rows, mask, output_attentions=False)
    assert fused == [torch.float32]
    assert not slow_backward("cuda", torch.bfloat16)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_tower_keeps_the_fused_kernel(frozen, fused) -> None:
    tower = Blip2VisionModel(Blip2VisionModel.config_class(**VISION)).requires_grad_(not frozen)
    with torch.autocast("cpu", torch.bfloat16):
        tower(pixels())
    assert len(fused) == (tower.config.num_hidden_layers if frozen else 0)
