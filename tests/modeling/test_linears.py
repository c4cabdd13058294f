"""Large float32 layers may be computed by another library, with the same results but for rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blip2_hf.modeling import linears
from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from blip2_hf.modeling.linears import fast_linears
from generation_pairs import build
from tiny_models import IMAGE_TOKEN, QUERIES, pixels

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
SETTINGS = {"greedy": {}, "beams": {"num_beams": 4, "length_penalty": -1.0}, "plain beams": {"num_beams": 3}}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where it pays, with layers of any size."""
    monkeypatch.setattr(linears, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(linears, "_LEAST_WEIGHTS", 1)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what torch's own function is given."""
    calls, function = [], nn.functional.linear

    def record(states: torch.Tensor, *args) -> torch.Tensor:
        calls.append(tuple(states.shape))
        return function(states, *args)

    monkeypatch.setattr(nn.functional, "linear", record)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_results_are_those_of_torch(bias: bool, plain: list) -> None:
    layer = nn.Linear(96, 64, bias=bias)
    for states in (
        torch.randn(96),
        torch.randn(7, 96),
        torch.randn(3, 5, 96),
        torch.randn(3, 5, 96)[:, -1:],
        torch.randn(2, 96, 4).transpose(1, 2),
    ):
        expected = layer(states)
        plain.clear()
        with fast_linears(layer):
            torch.testing.assert_close(layer(states), expected, atol=1e-5, rtol=1e-5)
        assert not plain
        layer(states)
        assert plain  # outside it is as before
    with fast_linears(layer):
        assert layer(torch.randn(0, 96)).shape == (0, 64)


def test_what_it_is_not_made_for_stays_with_torch(plain: list, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, states = nn.Linear(64, 64), torch.randn(2, 64)
    with fast_linears(layer):
        layer(states).sum().backward()  # a gradient is wanted
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(states).dtype == torch.bfloat16
    half = nn.Linear(64, 64, dtype=torch.bfloat16)
    with torch.no_grad(), fast_linears(half):
        half(states.bfloat16())
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.no_grad(), fast_linears(layer):
        layer(states)
    assert layer.weight.grad is not None
    assert len(plain) == 4


class Doubled(nn.Linear):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(states)


@torch.no_grad()
def test_layers_that_compute_something_else_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, changed, states = Doubled(64, 64), nn.Linear(64, 64), torch.randn(2, 64)
    changed.forward = lambda states: states + 1  # as accelerate's hooks do
    model, expected = nn.ModuleList([kind, changed]), kind(states)
    with fast_linears(model):
        assert torch.equal(kind(states), expected)
        assert torch.equal(changed(states), states + 1)
    assert "forward" in vars(changed)
    small = nn.Linear(64, 64)
    monkeypatch.setattr(linears, "_LEAST_WEIGHTS", 64 * 64 + 1)
    with fast_linears(small):
        assert "forward" not in vars(small)


def test_everything_is_put_back_after_an_error() -> None:
    layer = nn.Linear(64, 64)
    with pytest.raises(KeyError), fast_linears(layer), fast_linears(layer):
        assert "forward" in vars(layer)
        raise KeyError
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("family", ["opt", "llama", "t5"])
def test_generated_tokens_stay_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, row = build(family), [IMAGE_TOKEN] * QUERIES + list(range(10, 16))
    inputs = {"pixel_values": pixels(), "input_ids": torch.tensor([row, row[::-1]])}
    for options in SETTINGS.values():
        found = generated(ours, inputs, options)
        monkeypatch.setattr(linears, "onednn_is_faster", lambda: False)
        assert torch.equal(generated(ours, inputs, options), found)
        monkeypatch.setattr(linears, "onednn_is_faster", lambda: True)


def test_generate_computes_no_large_layer_plainly(plain: list, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"pixel_values": pixels(), "input_ids": torch.tensor([[IMAGE_TOKEN] * QUERIES + [10, 11]] * 2)}
    ours = build("opt")
    generated(ours, inputs, SETTINGS["beams"])
    assert not plain
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    generated(ours, inputs, SETTINGS["beams"])
    assert plain


def generated(ours: Blip2ForConditionalGeneration, inputs: dict, options: dict) -> torch.Tensor:
    return ours.generate(**inputs, **options, max_new_tokens=5, min_new_tokens=5)
