"""Random choices of the world's writers, all from one generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of `items`, all equally likely."""
    return items[int(rng.integers(len(items)))]


def mostly_first(rng: np.random.Generator, items: Sequence[T], share: float = 0.6) -> T:
    """The first of `items` in `share` of all cases, else any other one."""
    return items[0] if len(items) == 1 or rng.random() < share else pick(rng, items[1:])


def weighted(rng: np.random.Generator, weights: Mapping[T, float]) -> T:
    """A key of `weights`, with probability in proportion to its weight."""
    items = list(weights)
    place = np.searchsorted(np.cumsum([weights[item] for item in items]), rng.random() * sum(weights.values()), "right")
    return items[min(int(place), len(items) - 1)]


def shuffled(rng: np.random.Generator, items: Sequence[T]) -> list[T]:
    """`items` in random order."""
    return [items[number] for number in rng.permutation(len(items))]


def by_weight(rng: np.random.Generator, weights: Mapping[T, float]) -> list[T]:
    """All keys in a random order in which heavier ones tend to come first (drawn one by one without replacement)."""
    keys = {item: rng.random() ** (1 / weight) for item, weight in weights.items()}
    return sorted(weights, key=keys.__getitem__, reverse=True)
