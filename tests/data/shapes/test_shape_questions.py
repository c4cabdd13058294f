"""Questions about scenes: the answers are those of a reader of scenes, and nobody gets far without the picture."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings

from blip2_hf.data.captions import normalise_question
from blip2_hf.data.shapes.answers import answer_question
from blip2_hf.data.shapes.questions import KINDS, Question, questions
from blip2_hf.data.shapes.scene_questions import comparison, existence, relation
from blip2_hf.data.shapes.scenes import HELD_OUT, TRAINED, draw_scene
from tiny_scenes import drawn, scene, scenes

SCENE = scene(
    large_striped_red_circle=(20, 20),
    small_plain_blue_star=(48, 50),
    small_striped_green_square=(20, 82),
    small_plain_green_square=(80, 82),
)


def asked(count: int, seed: int) -> list[Question]:
    rng = np.random.default_rng(seed)
    return [question for one in scenes(count, seed) for question in questions(one, rng)]


@settings(max_examples=150, deadline=None)
@given(drawn)
def test_answers_are_those_of_the_reader(drawn) -> None:
    scene, rng = drawn
    found = questions(scene, rng, 6)
    assert len({one.question for one in found}) == 6
    for one in found:
        assert one.answer == answer_question(one.question, scene), (one, scene)
        assert one.kind in KINDS
        assert one.question == normalise_question(one.question)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("what color is the star?", "blue"),
        ("what is the color of the large object?", "red"),
        ("what color is the object to the left of the star", None),  # two are
        ("what color is the object above the star?", "red"),
        ("what shape does the red object have?", "circle"),
        ("what is the blue object?", "star"),
        ("what is right of the star?", "green square"),
        ("what is left of the circle?", None),
        ("what shape is above the star?", "circle"),
        ("how large is the star?", "small"),
        ("is the circle little or big?", "big"),
        ("is the star plain or striped?", "plain"),
        ("where is the star?", "middle"),
        ("where in the picture is the plain square?", "bottom right"),
        ("how many squares are there?", "two"),
        ("how many striped objects can you see?", "two"),
        ("how many triangles are in the picture?", "zero"),
        ("is there a red circle?", "yes"),
        ("is there a red star?", "no"),
        ("are there any small squares?", "yes"),
        ("is the star red?", "no"),
        ("is the circle larger than the star?", "yes"),
        ("is the star bigger than the circle?", "no"),
        ("is the star larger than the plain square?", "no"),
        ("is the plain square smaller than the star?", "no"),
        ("which is smaller, the circle or the star?", "star"),
        ("which is larger, the star or the plain square?", None),  # neither
        ("do the star and the plain square have the same texture?", "yes"),
        ("do the star and the circle have the same color?", "no"),
        ("are there more squares than circles?", "yes"),
        ("are there more plain objects than striped objects?", "no"),
        ("is the star below the circle?", "yes"),
        ("is the star to the left of the circle?", "no"),
        ("is the star to the left or to the right of the circle?", "right"),
        ("is the star above or below the circle?", "below"),
        ("is the striped square left of the circle?", None),  # one above the other
        ("what color is the square?", None),  # there are two
        ("what color is the triangle?", None),
        ("what time is it?", None),
        ("what color is the star? red", None),
    ],
)
def test_the_reader_answers(question: str, answer: str | None) -> None:
    assert answer_question(question, SCENE) == answer


def test_every_kind_is_asked_about_evenly() -> None:
    shares = Counter(one.kind for one in asked(300, 1))
    assert set(shares) == set(KINDS)
    assert all(0.05 < shares[kind] / 1800 < 0.2 for kind in KINDS), shares


def test_who_does_not_see_the_picture_cannot_win() -> None:
    """The most frequent answer to the same question elsewhere, or of its kind where it was not asked often."""
    by_question: dict[str, Counter] = defaultdict(Counter)
    by_kind: dict[str, Counter] = defaultdict(Counter)
    for one in asked(1000, 2):
        by_question[one.question][one.answer] += 1
        by_kind[one.kind][one.answer] += 1
    right = []
    test = asked(400, 3)
    for one in test:
        known = by_question[one.question]
        answers = known if known.total() >= 10 else by_kind[one.kind]
        right.append(answers.most_common(1)[0][0] == one.answer)
    assert np.mean(right) < 0.4
    assert sum(one.answer in ("yes", "no") for one in test) < 0.4 * len(test)


@pytest.mark.parametrize("maker", [existence, comparison, relation])
def test_yes_and_no_are_balanced_for_every_wording(maker) -> None:
    """The z-scores of "yes" over wordings that come often are those of a fair coin."""
    rng = np.random.default_rng(4)
    wordings: dict[str, Counter] = defaultdict(Counter)
    for one in scenes(600, 4):
        for made in (maker(rng, one) for _ in range(6)):
            if made is not None and made[1] in ("yes", "no"):
                words = [word for word in made[0].split() if word not in ("the", "a")]
                wordings[" ".join(words[:1] + words[-1:])][made[1]] += 1
                wordings[" ".join(words[:2])][made[1]] += 1
                wordings["all"][made[1]] += 1
    scores = [(c["yes"] - c["no"]) / c.total() ** 0.5 for c in wordings.values() if c.total() >= 25]
    assert len(scores) >= 3
    assert max(map(abs, scores)) < 4
    assert np.mean(np.square(scores)) ** 0.5 < 1.5


def test_combinations_without_training_are_not_asked_for_in_training() -> None:
    unseen = {f"{colour} {shape}" for shape, colour in HELD_OUT}
    assert not [one for one in asked(300, 6) if any(f"{words}?" in one.question for words in unseen)]
    rng = np.random.default_rng(6)
    answers = Counter()
    for _ in range(300):
        one = draw_scene(rng, allowed=TRAINED, needed=HELD_OUT)
        for made in (existence(rng, one) for _ in range(8)):
            if made is not None and any(f"{words}?" in made[0] for words in unseen):
                answers[made[1]] += 1
    assert 0.35 < answers["yes"] / answers.total() < 0.65


def test_same_seed_same_questions() -> None:
    assert asked(20, 7) == asked(20, 7)
    assert asked(20, 7) != asked(20, 8)


@pytest.mark.parametrize("count", [0, 10_000])
def test_a_count_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="`count` must be"):
        questions(scene(small_plain_white_ring=(48, 48)), np.random.default_rng(0), count)
