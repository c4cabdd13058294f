"""Several map-style sets of pairs as one: one after the other, or in given proportions."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from .pairs import EpochDataset
from .seeding import random_generator


class ConcatPairs(EpochDataset):
    """All sets one after the other, as the original code trains on COCO and Visual Genome.

    Args:
        datasets: sets of pairs, mixed sets included.
    """

    def __init__(self, datasets: Sequence[EpochDataset]) -> None:
        super().__init__()
        self.datasets = _checked(datasets)
        self._ends = list(accumulate(len(dataset) for dataset in self.datasets))

    def __len__(self) -> int:
        return self._ends[-1]

    def example(self, index: int, epoch: int) -> dict[str, Any]:
        index = self._position(index)
        number = bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        return self.datasets[number].example(index - start, epoch)


class MixedPairs(EpochDataset):
    """Sets in proportion to their weights.

    An epoch holds `length` examples, of which set k gives `weight_k / sum(weights)` (rounded; the numbers are in
    `quotas`), at consecutive indices, so the loader must shuffle, as a Trainer's does. Each set is gone through in
    rounds, over the epochs: it gives all its samples once, in an order drawn anew for each round, before any of
    them again; a sample met twice in an epoch belongs to two rounds and has another caption and augmentation.

    Args:
        parts: pairs (dataset, weight).
        length: number of examples of an epoch; None: the sum of the sets' lengths.
        seed: another seed gives other orders.

    Raises:
        ValueError: no sets, a weight that is not positive and finite, or a `length` that leaves a set without any
            example.
    """

    def __init__(
        self, parts: Sequence[tuple[EpochDataset, float]], *, length: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.datasets = _checked([dataset for dataset, _ in parts])
        self.weights = check_weights([weight for _, weight in parts])
        self.length = sum(len(dataset) for dataset in self.datasets) if length is None else length
        self.seed = seed
        self.quotas = _quotas(self.weights, self.length)
        if 0 in self.quotas:
            raise ValueError(
                f"`length` {self.length} is too small for `weights` {self.weights}: the sets would give "
                f"{self.quotas} examples"
            )
        self._ends = list(accumulate(self.quotas))

    def __len__(self) -> int:
        return self.length

    def example(self, index: int, epoch: int) -> dict[str, Any]:
        index = self._position(index)
        number = bisect_right(self._ends, index)
        dataset, quota = self.datasets[number], self.quotas[number]
        given = epoch * quota + index - (self._ends[number] - quota)
        round_number, place = divmod(given, len(dataset))
        # An affine map with a factor coprime to the length is a permutation that needs no memory.
        rng = random_generator("mixing", self.seed, number, round_number)
        factor, shift = _coprime(len(dataset), rng), int(rng.integers(len(dataset)))
        return dataset.example((factor * place + shift) % len(dataset), round_number)


def check_weights(weights: Sequence[float], argument: str = "`weights`") -> list[float]:
    """The weights as floats.

    Raises:
        ValueError: one that is not a positive finite number; names `argument`.
    """
    for weight in weights:
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight <= 0:
            raise ValueError(f"{argument} must be positive finite numbers, got {weight!r}")
    return [float(weight) for weight in weights]


def _checked(datasets: Sequence[EpochDataset]) -> list[EpochDataset]:
    if len(datasets) == 0:
        raise ValueError("`datasets` is empty; expected at least one set")
    for dataset in datasets:
        if not isinstance(dataset, EpochDataset):
            raise ValueError(
                f"`datasets` must be ImageTextPairs, ConcatPairs or MixedPairs, got {type(dataset).__name__}"
            )
    return list(datasets)


def _quotas(weights: list[float], length: int) -> list[int]:
    """`length` split by largest remainder."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"`length` must be an int of at least 1, got {length!r}")
    total = math.fsum(weights)
    shares = [length * (weight / total) for weight in weights]
    quotas = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: (quotas[k] - shares[k], k))
    for k in by_remainder[: length - sum(quotas)]:
        quotas[k] += 1
    return quotas


def _coprime(length: int, rng: Any) -> int:
    if length < 3:
        return 1
    while True:
        factor = int(rng.integers(1, length))
        if math.gcd(factor, length) == 1:
            return factor
