"""Captions of scenes: true, of the right length, of few words and many sorts, and enough to find the scene by."""

import numpy as np
import pytest
from hypothesis import given, settings

from blip2_hf.data.captions import normalise_caption
from blip2_hf.data.shapes.captions import LONGEST, SHORTEST, captions
from blip2_hf.data.shapes.claims import There
from blip2_hf.data.shapes.grammar import check_caption, read_caption
from blip2_hf.data.shapes.recall import fitting, oracle_recall
from blip2_hf.data.shapes.scenes import COLOURS, SHAPES, Scene
from blip2_hf.data.shapes.words import PLURALS
from tiny_scenes import drawn, scene, scenes

ONE = scene(small_plain_white_ring=(48, 48))  # the least that one can talk about


def written(count: int, seed: int = 1) -> tuple[list[Scene], list[list[str]]]:
    rng = np.random.default_rng(seed)
    found = scenes(count, seed)
    return found, [captions(one, rng) for one in found]


@settings(max_examples=150, deadline=None)
@given(drawn)
def test_captions_are_true_and_all_different(drawn) -> None:
    scene, rng = drawn
    found = captions(scene, rng, 5)
    assert len(set(found)) == 5
    for caption in found:
        check = check_caption(caption, scene)
        assert check.true, (caption, check, scene)
        assert check.statements
        assert SHORTEST <= len(caption.split()) <= LONGEST
        assert caption == normalise_caption(caption)


def test_captions_are_false_of_most_other_scenes() -> None:
    found, texts = written(120)
    fits = fitting([caption for alike in texts for caption in alike], found)
    own = np.repeat(np.eye(len(found), dtype=bool), 5, axis=0)
    assert fits[own].all()
    assert fits[~own].mean() < 0.02


def test_two_in_five_name_everything() -> None:
    for one, texts in zip(*written(150), strict=True):
        assert sum(things_named(caption) == len(one.things) for caption in texts) >= 2, texts


def colours_named(caption: str) -> int:
    return sum(word in COLOURS for word in caption.replace(",", "").split())


def things_named(caption: str) -> int:
    """How many things a list names."""
    parts = [claim for claim in read_caption(caption) or [] if isinstance(claim, There)]
    return sum(phrase.count or 1 for part in parts for phrase in part.phrases)


def test_a_thing_that_changes_its_colour_makes_complete_captions_false() -> None:
    rng, complete = np.random.default_rng(5), 0
    for one, texts in zip(*written(200, 5), strict=True):
        absent = next(colour for colour in COLOURS if colour not in {thing.colour for thing in one.things})
        place = int(rng.integers(len(one.things)))
        changed = [
            type(thing)(**{**vars(thing), "colour": absent}) if number == place else thing
            for number, thing in enumerate(one.things)
        ]
        for caption in texts:
            if things_named(caption) == colours_named(caption) == len(one.things):
                complete += 1
                assert not check_caption(caption, Scene(tuple(changed), 0)).true, caption
    assert complete > 200


def test_few_words_and_many_beginnings() -> None:
    texts = [caption for alike in written(300)[1] for caption in alike]
    words = {word for caption in texts for word in caption.replace(",", "").split()}
    assert 80 < len(words) < 150
    assert {*SHAPES, *PLURALS.values(), *COLOURS} - {"object"} <= words
    assert len(set(texts)) > 0.95 * len(texts)
    assert len({tuple(caption.split()[:4]) for caption in texts}) > 400


def test_a_caption_finds_its_scene() -> None:
    found, texts = written(200)
    recall = oracle_recall(texts, found)
    assert recall.text_at_1 > 97
    assert recall.image_at_1 > 85


def test_same_seed_same_captions() -> None:
    assert written(20)[1] == written(20)[1]
    assert written(20)[1] != written(20, 2)[1]


@pytest.mark.parametrize("count", [1, 2, 20])
def test_as_many_as_wanted_even_for_one_thing(count: int) -> None:
    assert len(set(captions(ONE, np.random.default_rng(0), count))) == count


@pytest.mark.parametrize("count", [0, 5000])
def test_a_count_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="`count` must be"):
        captions(ONE, np.random.default_rng(0), count)
