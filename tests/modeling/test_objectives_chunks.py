"""`chunk_size`: the gradient of the full batch, while only one chunk's activations are held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from blip2_hf.modeling import objectives
from distributed_objectives import (
    IMAGE_IDS,
    Case,
    Step,
    batch_of,
    gradients_of,
    largest_error,
    losses_of,
    model_of,
    recorded_draws,
)
from parity import counted
from tiny_models import QUERIES, VISION

TOLERANCE = 1e-5  # measured: 2e-6 at most
PAIRS = 8


def step(case: Case, seed: int = 0, model: nn.Module | None = None, **arguments: object) -> Step:
    model = model_of(case) if model is None else model
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    with recorded_draws() as draws:
        outputs = model(
            **batch_of(case, slice(0, PAIRS)),
            return_loss=True,
            chunk_size=case.chunk_size,
            generator=generator,
            **arguments,
        )
    outputs.loss.backward()
    return {"losses": losses_of(outputs), "gradients": gradients_of(model), "draws": dict(enumerate(draws))}


@pytest.mark.parametrize("chunk_size", [2, 3, 8])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"inputs": "pixel_values", "image_ids": IMAGE_IDS, "negatives": "sampled"}, id="unfrozen tower"),
        pytest.param({"inputs": "image_embeds"}, id="features"),
        pytest.param({"inputs": "vision_features", "frozen": True, "config": {"itg_weight": 0.0}}, id="no ITG"),
        pytest.param({"inputs": "pixel_values", "frozen": True, "config": {"itc_weight": 0.0}}, id="no ITC"),
        pytest.param({"inputs": "image_embeds", "config": {"itm_weight": 0.0}}, id="no ITM"),
        pytest.param({"inputs": "pixel_values", "checkpointing": True, "counts": True}, id="checkpointing"),
    ],
)
def test_equals_the_whole_batch(options: dict[str, object], chunk_size: int) -> None:
    expected, found = step(Case(**options)), step(Case(**options, chunk_size=chunk_size))
    assert expected["draws"].keys() == found["draws"].keys()
    for name, draw in expected["draws"].items():
        assert torch.equal(draw, found["draws"][name])
    error, where = largest_error(found, expected)
    assert error < TOLERANCE, f"{where}: {error}"


@pytest.mark.parametrize("chunk_size", [1, 100])
def test_chunks_of_one_pair_and_one_chunk_of_all(chunk_size: int) -> None:
    case = Case(image_ids=IMAGE_IDS)
    error, where = largest_error(step(replace(case, chunk_size=chunk_size)), step(case))
    assert error < TOLERANCE, f"{where}: {error}"


def test_contrastive_loss_alone_runs_nothing_else() -> None:
    """Queries and text, once per chunk, and once more in the backward pass."""
    case = Case(inputs="image_embeds", config={"itm_weight": 0.0, "itg_weight": 0.0})
    model = model_of(case)
    with counted(model.qformer) as calls:
        outputs = model(**batch_of(case, slice(0, PAIRS)), return_loss=True, chunk_size=4)
        assert len(calls) == 2 * 2
        outputs.loss.backward()
    assert len(calls) == 2 * 2 * 2


def test_another_batch_is_noticed() -> None:
    """Negative control."""
    assert largest_error(step(Case(chunk_size=3, lengths=(5, 9, 3, 6, 4, 7, 12, 4))), step(Case()))[0] > 0.01


def test_whole_output_is_the_same() -> None:
    case = Case(image_ids=IMAGE_IDS)
    with torch.no_grad():
        whole, chunked = (
            model_of(case)(**batch_of(case, slice(0, PAIRS)), return_loss=True, chunk_size=size) for size in (None, 3)
        )
    assert whole.keys() == chunked.keys()
    for name in whole:
        torch.testing.assert_close(chunked[name], whole[name], atol=1e-5, rtol=1e-5)


def test_draws_depend_on_the_generator_alone() -> None:
    case = Case(negatives="sampled", chunk_size=3)
    first = step(case, seed=1)
    torch.manual_seed(99)
    again, other = step(case, seed=1), step(case, seed=2)
    assert all(torch.equal(first["draws"][name], again["draws"][name]) for name in (0, 1))
    assert not all(torch.equal(first["draws"][name], other["draws"][name]) for name in (0, 1))
    for name, gradient in first["gradients"].items():
        assert torch.equal(gradient, again["gradients"][name])


# -- dropout -------------------------------------------------------------------------------------------------------


def dropping_model(case: Case) -> nn.Module:
    model = model_of(case)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    return model.train()


def dropped_step(case: Case, model: nn.Module) -> Step:
    torch.manual_seed(5)
    return step(case, model=model)


@pytest.mark.parametrize("chunk_size", [2, 3])
def test_dropout_of_the_backward_pass_is_that_of_the_forward_pass(
    chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same chunks with their activations kept; forgetting the random state must be noticed."""
    case = Case(chunk_size=chunk_size, negatives="sampled")
    model = dropping_model(case)
    found = dropped_step(case, model)
    monkeypatch.setattr(objectives, "checkpoint", lambda function, *args, **_: function(*args))
    kept = dropped_step(case, model)
    error, where = largest_error(found, kept)
    assert error < 1e-6, f"{where}: {error}"
    forgetting = partial(checkpoint, preserve_rng_state=False)
    monkeypatch.setattr(objectives, "checkpoint", forgetting)
    assert largest_error(dropped_step(case, model), kept)[0] > 0.1


def test_gradient_with_dropout_by_finite_differences() -> None:
    """Along the gradient: the loss of the same seed changes by its norm."""
    case = Case(chunk_size=3, inputs="image_embeds")
    model = dropping_model(case)
    gradients = dropped_step(case, model)["gradients"]
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    parameters, size = dict(model.named_parameters()), 2e-3
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, gradient in gradients.items():
                parameters[name].add_(gradient, alpha=sign * size / float(norm))
        values.append(float(dropped_step(case, model)["losses"]["loss"]))
    assert (values[0] - values[1]) / (2 * size) == pytest.approx(float(norm), rel=1e-2)


# -- memory --------------------------------------------------------------------------------------------------------


def held_bytes(model: nn.Module, pairs: int, chunk_size: int | None) -> int:
    """Bytes that one forward pass keeps for the backward pass, parameters and equal storages counted once or not."""
    case = Case(sizes=(pairs,), lengths=(6,) * pairs, negatives="sampled", inputs="image_embeds")
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}
    kept = []  # so that no storage is freed, and its address used again, while counting

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch_of(case, slice(0, pairs)), return_loss=True, chunk_size=chunk_size)
    return sum(held.values())


@pytest.fixture
def memory() -> Callable[[int, int | None], int]:
    return partial(held_bytes, model_of(Case()))


def test_held_memory_is_that_of_features_and_vectors(memory: Callable[[int, int | None], int]) -> None:
    pairs, tokens, width = 32, 5, VISION["hidden_size"]
    features = 4 * pairs * tokens * width
    vectors = 4 * pairs * (QUERIES + 1) * 16
    logits = 4 * pairs * pairs
    for chunk_size in (1, 4, 16):
        # own features and the negatives'; vectors before and after joining; per query products, logits and softmaxes
        assert memory(pairs, chunk_size) <= 2 * features + 4 * vectors + (QUERIES + 16) * logits
    assert memory(pairs, None) > 20 * (2 * features + 4 * vectors)


def test_held_memory_does_not_grow_with_the_number_of_chunks(memory: Callable[[int, int | None], int]) -> None:
    by_size = {size: memory(24, size) for size in (1, 2, 8, 24)}
    assert max(by_size.values()) <= 1.02 * min(by_size.values()), by_size


def test_held_memory_grows_by_features_and_vectors_alone(memory: Callable[[int, int | None], int]) -> None:
    """Beyond the [n, n] contrastive logits: 1/50 at most of what the whole batch keeps per pair."""
    chunked = (memory(16, 2) - memory(8, 2)) / 8
    whole = (memory(16, None) - memory(8, None)) / 8
    assert chunked < whole / 20, (chunked, whole)


@pytest.mark.parametrize(("frozen", "calls"), [(True, 4), (False, 8)])
def test_a_frozen_tower_is_computed_once(frozen: bool, calls: int) -> None:
    """Per chunk; one that is trained is computed again in the backward pass."""
    case = Case(inputs="pixel_values", frozen=frozen, chunk_size=2)
    model = model_of(case)
    with counted(model.vision_model.encoder.layers[0]) as towers:
        step(case, model=model)
    assert len(towers) == calls
