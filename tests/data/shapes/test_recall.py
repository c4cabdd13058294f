"""Which captions fit which scenes, and the recall that is left to whoever knows that."""

import numpy as np
import pytest

from blip2_hf.data.shapes.captions import captions
from blip2_hf.data.shapes.grammar import check_caption
from blip2_hf.data.shapes.recall import fitting, oracle_recall
from tiny_scenes import scene, scenes

RED = scene(large_plain_red_ring=(48, 48))
BLUE = scene(large_plain_blue_ring=(48, 48))
BOTH = scene(large_plain_red_ring=(20, 48), large_plain_blue_ring=(70, 48))


def test_fitting_is_what_the_grammar_says_of_each_pair() -> None:
    rng = np.random.default_rng(3)
    found = scenes(25, 3)
    texts = [caption for one in found for caption in captions(one, rng)] + ["a cat", "three of them"]
    fits = fitting(texts, found)
    assert fits.dtype == bool and fits.any(axis=1).sum() == len(texts) - 2
    for row, caption in zip(fits, texts, strict=True):
        assert row.tolist() == [check_caption(caption, one).true for one in found], caption


def test_lists_can_be_taken_as_complete() -> None:
    texts = ["a red ring", "the red ring is large", "a red ring left of a blue ring"]
    assert fitting(texts, [RED, BLUE, BOTH]).tolist() == [
        [True, False, True],
        [True, False, True],
        [False, False, True],
    ]
    assert fitting(texts, [RED, BLUE, BOTH], lists_are_complete=True).tolist() == [
        [True, False, False],
        [True, False, True],
        [False, False, True],
    ]


def test_recall_by_hand() -> None:
    # a ring is all three; the red one two; the list only its own scene
    recall = oracle_recall(
        [["the red ring is large"], ["there are more rings than stars"], ["a red ring"]], [RED, BLUE, BOTH]
    )
    # captions: half, a false one, a list that is false of its own scene
    assert recall.image_at_1 == pytest.approx(100 * (1 / 2 + 0 + 0) / 3)
    # scenes: "a red ring" fits the first alone, nothing the second, the first caption the third and one more
    assert recall.text_at_1 == pytest.approx(100 * (1 + 0 + 1 / 2) / 3)


@pytest.mark.parametrize(("texts", "found"), [([], []), ([["a ring"]], []), ([["a ring"]], [RED, BLUE])])
def test_other_numbers_are_refused(texts, found) -> None:
    with pytest.raises(ValueError, match="`captions` must hold one list for each of `scenes`"):
        oracle_recall(texts, found)
