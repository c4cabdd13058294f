from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from blip2_hf.data.mixing import ConcatPairs, MixedPairs
from blip2_hf.data.pairs import EpochDataset, ImageTextPairs
from tiny_sets import reveal, tiny_samples


class Keys(EpochDataset):
    """Gives back what it was asked for."""

    def __init__(self, name: str, length: int) -> None:
        super().__init__()
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def example(self, index: int, epoch: int) -> dict:
        return {"key": (self.name, self._position(index), epoch)}


def keys(dataset: EpochDataset, epoch: int) -> list[tuple]:
    dataset.set_epoch(epoch)
    return [dataset[index]["key"] for index in range(len(dataset))]


def test_concatenation() -> None:
    both = ConcatPairs([Keys("a", 2), Keys("b", 3)])
    assert keys(both, 4) == [("a", 0, 4), ("a", 1, 4), ("b", 0, 4), ("b", 1, 4), ("b", 2, 4)]
    assert both[-1]["key"] == ("b", 2, 4)
    with pytest.raises(IndexError):
        both[5]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(),
    length=st.integers(30, 60),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_mixture_keeps_proportions_and_goes_through_every_set(
    lengths: list[int], seed: int, length: int, data: st.DataObject
) -> None:
    weights = [data.draw(st.floats(0.5, 4)) for _ in lengths]
    sets = [(Keys(str(n), size), weight) for n, (size, weight) in enumerate(zip(lengths, weights, strict=True))]
    mixed = MixedPairs(sets, length=length, seed=seed)
    epochs = [keys(mixed, epoch) for epoch in range(3)]
    assert [keys(mixed, epoch) for epoch in (2, 0)] == [epochs[2], epochs[0]]
    for given_keys in epochs:
        counts = Counter(name for name, _, _ in given_keys)
        for number, weight in enumerate(weights):
            assert abs(counts[str(number)] - length * weight / sum(weights)) < 1
    everything = [key for given_keys in epochs for key in given_keys]
    assert len(set(everything)) == len(everything), "no sample twice in a round"
    for number, size in enumerate(lengths):
        rounds = Counter(epoch for name, _, epoch in everything if name == str(number))
        assert all(rounds[done] == size for done in range(max(rounds))), "a round gives every sample"


def test_default_length_and_quotas() -> None:
    mixed = MixedPairs([(Keys("a", 30), 1), (Keys("b", 70), 3)])
    assert len(mixed) == 100
    assert mixed.quotas == [25, 75]


def test_order_differs_between_rounds_and_seeds() -> None:
    mixed = MixedPairs([(Keys("a", 50), 1)], seed=1)
    orders = [[index for _, index, _ in keys(mixed, epoch)] for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert keys(MixedPairs([(Keys("a", 50), 1)], seed=2), 0) != keys(mixed, 0)


def test_a_sample_met_twice_differs() -> None:
    mixed = MixedPairs([(ImageTextPairs(tiny_samples(1, captions=2), reveal), 1)], length=6)
    assert len({mixed[index]["draw"] for index in range(6)}) == 6


def test_sets_can_be_nested() -> None:
    mixed = MixedPairs([(ConcatPairs([Keys("a", 1), Keys("b", 1)]), 1), (Keys("c", 2), 1)])
    assert Counter(name for name, _, _ in keys(mixed, 0)) == {"a": 1, "b": 1, "c": 2}


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "1", True])
def test_weights_are_checked(weight: object) -> None:
    with pytest.raises(ValueError, match="`weights` must be positive finite"):
        MixedPairs([(Keys("a", 2), weight)])


def test_refused() -> None:
    with pytest.raises(ValueError, match="`datasets` is empty"):
        MixedPairs([])
    with pytest.raises(ValueError, match="`datasets` must be ImageTextPairs.*list"):
        ConcatPairs([[1, 2]])
    with pytest.raises(ValueError, match="`length` 2 is too small"):
        MixedPairs([(Keys("a", 9), 1), (Keys("b", 9), 9)], length=2)
    with pytest.raises(ValueError, match="`length` must be an int"):
        MixedPairs([(Keys("a", 9), 1)], length=0)
