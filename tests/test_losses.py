"""The losses against torch's functions, formulas written out in loops, and properties they must have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from blip2_hf.losses import (
    contrastive_loss,
    floored_temperature,
    generation_loss,
    hard_negative_probabilities,
    image_text_similarity,
    matching_loss,
    positive_pairs,
    sample_hard_negatives,
)

EXACT = {"atol": 1e-5, "rtol": 1e-5}
quickly = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def own_pair(rows: int, columns: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + rows)[:, None] == torch.arange(columns)[None]


def shared(ids: list[int]) -> torch.Tensor:
    numbers, ids = torch.arange(len(ids)), torch.tensor(ids)
    return positive_pairs(numbers, numbers, ids, ids)


# -- similarity ----------------------------------------------------------------------------------------------------


@quickly
@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_similarity_is_that_of_the_nearest_query(number: int, images: int, texts: int, queries: int) -> None:
    image_vectors = torch.randn(images, queries, 6, generator=seed(number))
    text_vectors = torch.randn(texts, 6, generator=seed(number + 1))
    found = image_text_similarity(image_vectors, text_vectors)
    assert found.shape == (images, texts)
    for i in range(images):
        for j in range(texts):
            expected = max(float(image_vectors[i, q] @ text_vectors[j]) for q in range(queries))
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_only_the_nearest_query_gets_a_gradient() -> None:
    images = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    image_text_similarity(images, torch.tensor([[0.6, 0.8]])).sum().backward()
    torch.testing.assert_close(images.grad, torch.tensor([[[0.0, 0.0], [0.6, 0.8]]]))


# -- temperature ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "expected"), [(0.07, 0.07), (0.001, 0.001), (0.0, 0.001), (-5e6, 0.001)])
def test_temperature_has_a_floor_and_the_gradient_of_the_identity(value: float, expected: float) -> None:
    temperature = torch.tensor([value], requires_grad=True)
    floored = floored_temperature(temperature, 0.001)
    assert floored.item() == torch.tensor(expected).item()
    (3 * floored).sum().backward()
    assert temperature.grad.item() == 3.0


def test_temperature_comes_back_from_below_the_floor() -> None:
    """A clamp alone would have no gradient there."""
    temperature = torch.nn.Parameter(torch.tensor([-0.01]))
    optimiser = torch.optim.SGD([temperature], lr=1e-8)
    logits = torch.tensor([[0.1, 0.5], [0.4, 0.2]])  # wrong: a softer softmax is better
    for _ in range(200):
        optimiser.zero_grad()
        contrastive_loss(logits / floored_temperature(temperature, 0.001), torch.eye(2).bool(), 0.0).backward()
        optimiser.step()
    assert temperature.item() > 0.001
    clamped = torch.tensor([-0.01], requires_grad=True)
    contrastive_loss(logits / clamped.clamp(min=0.001), torch.eye(2).bool(), 0.0).backward()
    assert clamped.grad.item() == 0.0


# -- positives -----------------------------------------------------------------------------------------------------


def test_positives_are_the_pair_itself_and_equal_ids() -> None:
    numbers = torch.arange(4)
    assert torch.equal(positive_pairs(numbers[2:], numbers, None, None), torch.eye(4).bool()[2:])
    ids = torch.tensor([7, 9, 7, -1])
    expected = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(positive_pairs(numbers, numbers, ids, ids), expected)
    assert torch.equal(positive_pairs(numbers[1:3], numbers, ids[1:3], ids), expected[1:3])


# -- contrastive ---------------------------------------------------------------------------------------------------


def plain_contrastive(logits: torch.Tensor, positives: torch.Tensor, smoothing: float) -> float:
    """Targets (1 - s) pos / npos + s / N, as the original code has them for shared ids, in loops."""
    total, columns = 0.0, logits.shape[1]
    for row, matches in zip(logits.double().tolist(), positives.tolist(), strict=True):
        highest = max(row)
        log_sum = highest + math.log(sum(math.exp(value - highest) for value in row))
        for value, match in zip(row, matches, strict=True):
            target = (1 - smoothing) * match / sum(matches) + smoothing / columns
            total -= target * (value - log_sum)
    return total


@quickly
@given(seeds, st.integers(1, 6), st.integers(0, 4), st.sampled_from([0.0, 0.1, 0.5]))
def test_contrastive_loss_is_cross_entropy_for_one_positive(
    number: int, rows: int, more: int, smoothing: float
) -> None:
    logits = (5 * torch.randn(rows, rows + more, generator=seed(number))).requires_grad_()
    start = number % (more + 1)
    loss = contrastive_loss(logits, own_pair(rows, rows + more, start), smoothing)
    expected = torch.nn.functional.cross_entropy(
        logits, torch.arange(start, start + rows), label_smoothing=smoothing, reduction="sum"
    )
    torch.testing.assert_close(loss, expected, **EXACT)
    (found,), (wanted,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found, wanted, **EXACT)


@quickly
@given(seeds, st.lists(st.integers(0, 3), min_size=1, max_size=7), st.sampled_from([0.0, 0.1]))
def test_contrastive_loss_with_shared_ids(number: int, ids: list[int], smoothing: float) -> None:
    positives, logits = shared(ids), 5 * torch.randn(len(ids), len(ids), generator=seed(number))
    found = contrastive_loss(logits, positives, smoothing)
    assert found.item() == pytest.approx(plain_contrastive(logits, positives, smoothing), rel=1e-5, abs=1e-5)
    order = torch.randperm(len(ids), generator=seed(number))
    permuted = contrastive_loss(logits[order][:, order], positives[order][:, order], smoothing)
    torch.testing.assert_close(permuted, found, **EXACT)
    parts = [contrastive_loss(*part, smoothing) for part in zip(logits.split(2), positives.split(2), strict=True)]
    torch.testing.assert_close(sum(parts), found, **EXACT)  # a sum over rows: it splits


def test_contrastive_loss_by_hand() -> None:
    """Two captions of one image and one of another; logits 0: log 3 each, whatever the targets."""
    assert contrastive_loss(torch.zeros(3, 3), shared([1, 1, 2]), 0.1).item() == pytest.approx(3 * math.log(3))
    logits = torch.tensor([[math.log(2), 0.0, 0.0]])  # probabilities 1/2, 1/4, 1/4
    positives = torch.tensor([[True, True, False]])
    expected = -(0.45 + 0.1 / 3) * (math.log(0.5) + math.log(0.25)) - 0.1 / 3 * math.log(0.25)
    assert contrastive_loss(logits, positives, 0.1).item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_contrastive_loss_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (6e4 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).to(dtype)
    loss = contrastive_loss(logits, torch.eye(2).bool(), 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2 * 0.05 * 2 * logits[0, 0].item(), rel=1e-6)


# -- hard negatives ------------------------------------------------------------------------------------------------


def test_probabilities_are_the_softmax_over_negatives() -> None:
    logits = torch.tensor([[9.0, 0.0, math.log(3)], [0.0, 5.0, 0.0], [1.0, 1.0, 1.0]])
    positives = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 1]]).bool()
    expected = torch.tensor([[0.0, 0.25, 0.75], [0.5, 0.0, 0.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(hard_negative_probabilities(logits, positives), expected)


def test_frequencies_match_the_softmax() -> None:
    """Chi-square with 4 degrees of freedom, 10^5 draws; 18.5 is exceeded once in a thousand."""
    draws, logits = 100_000, torch.tensor([[3.0, 0.5, 2.0, -1.0, 1.0, 0.0]])
    positives = torch.tensor([[1, 0, 0, 0, 0, 0]]).bool()

    def chi_square(temperature: float) -> float:
        drawn = sample_hard_negatives((logits / temperature).expand(draws, -1), positives.expand(draws, -1), seed())
        counts = drawn.bincount(minlength=6)
        assert counts[0] == 0
        expected = draws * hard_negative_probabilities(logits, positives)[0, 1:]
        return float(((counts[1:] - expected) ** 2 / expected).sum())

    assert chi_square(1.0) < 18.5
    assert chi_square(1.1) > 100  # other probabilities would be noticed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "huge", "huge positive", "all equal", "all lowest"])
def test_a_positive_is_never_drawn(dtype: torch.dtype, kind: str) -> None:
    draws = 100_000
    logits = torch.randn(4, 4, generator=seed())
    positives = shared([1, 1, 2, 3])
    if kind == "huge":
        logits = 6e4 * logits.sign()
    elif kind == "huge positive":
        logits = torch.where(positives, 6e4, -6e4)
    elif kind == "all equal":
        logits = torch.full((4, 4), 6e4)
    elif kind == "all lowest":
        logits = torch.full((4, 4), -6e4)
    logits = logits.to(dtype).repeat(draws // 4, 1)
    mask = positives.repeat(draws // 4, 1)
    drawn = sample_hard_negatives(logits, mask, seed())
    assert drawn.dtype == torch.int64
    assert ((drawn >= 0) & (drawn < 4)).all()
    assert not mask.gather(1, drawn[:, None]).any()
    assert not hard_negative_probabilities(logits[:4], positives)[positives].any()
    if kind != "huge" and kind != "random":  # equal negatives are drawn equally often
        shares = drawn[2::4].bincount(minlength=4) / (draws / 4)
        torch.testing.assert_close(shares, torch.tensor([1, 1, 0, 1]) / 3, atol=0.02, rtol=0)


def test_hard_means_hard() -> None:
    """Negatives of probability (nearly) 0 are not drawn, whatever their number."""
    logits = torch.zeros(1000, 500)
    logits[:, 17] = 40.0
    assert (sample_hard_negatives(logits, own_pair(1000, 500, -2000), seed()) == 17).all()


def test_draws_are_reproducible() -> None:
    logits, positives = torch.randn(64, 64, generator=seed()), torch.eye(64).bool()
    first = sample_hard_negatives(logits, positives, seed(1))
    assert torch.equal(first, sample_hard_negatives(logits, positives, seed(1)))
    assert not torch.equal(first, sample_hard_negatives(logits, positives, seed(2)))
    torch.manual_seed(3)
    own = sample_hard_negatives(logits, positives)
    torch.manual_seed(3)
    assert torch.equal(own, sample_hard_negatives(logits, positives))


def test_a_row_without_negatives_gives_minus_one() -> None:
    logits = torch.randn(3, 3, generator=seed())
    positives = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 1, 1]]).bool()
    drawn = sample_hard_negatives(logits, positives, seed())
    assert drawn[0] == drawn[2] == -1
    assert drawn[1] in (0, 2)
    assert sample_hard_negatives(torch.ones(1, 1), torch.ones(1, 1).bool()).tolist() == [-1]


@quickly
@given(seeds, st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_draws_are_admissible_for_any_ids(number: int, ids: list[int]) -> None:
    positives = shared(ids)
    drawn = sample_hard_negatives(torch.randn(len(ids), len(ids), generator=seed(number)), positives, seed(number))
    for row, column in enumerate(drawn.tolist()):
        assert (column == -1) == (len(set(ids)) == 1)
        assert column == -1 or ids[row] != ids[column]


# -- matching and generation ---------------------------------------------------------------------------------------


def test_matching_loss() -> None:
    logits, labels = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]), torch.tensor([0, 1])
    assert matching_loss(logits, labels).item() == pytest.approx(math.log(2) + math.log(4 / 3))
    logits = torch.randn(9, 2, generator=seed())
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0])
    expected = -sum(float(row[label] - row.exp().sum().log()) for row, label in zip(logits, labels, strict=True))
    assert matching_loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)
    half = matching_loss(logits.half(), labels)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_generation_loss(smoothing: float) -> None:
    logits, targets = torch.randn(5, 11, generator=seed()), torch.tensor([0, 3, 10, 3, 7])
    logs = (logits.exp() / logits.exp().sum(dim=1, keepdim=True)).log()
    expected = -sum(
        (1 - smoothing) * float(row[target]) + smoothing / 11 * float(row.sum())
        for row, target in zip(logs, targets, strict=True)
    )
    assert generation_loss(logits, targets, smoothing).item() == pytest.approx(expected, rel=1e-5)
    mean = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    torch.testing.assert_close(generation_loss(logits, targets, smoothing), 5 * mean, **EXACT)
    assert generation_loss(logits.bfloat16(), targets, smoothing).dtype == torch.float32
