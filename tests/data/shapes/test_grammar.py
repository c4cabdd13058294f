"""The grammar against sentences whose truth was found by hand, and against captions with one word changed."""

import re

import numpy as np
import pytest

from blip2_hf.data.shapes.captions import captions
from blip2_hf.data.shapes.grammar import check_caption
from blip2_hf.data.shapes.scenes import COLOURS, SHAPES
from blip2_hf.data.shapes.words import NUMBERS, PLURALS
from tiny_scenes import scene, scenes

# A circle in the top left, above and to the left of a star in the middle, and two squares at the bottom.
SCENE = scene(
    large_striped_red_circle=(20, 20),
    small_plain_blue_star=(48, 50),
    small_striped_green_square=(20, 82),
    small_plain_green_square=(80, 82),
)
TRUE = """
a red circle
A photo of a red circle.
a big red striped circle in the upper left corner and a small blue star
a large red circle with stripes on the left side
there is a star in the middle, a circle and two green squares
the picture shows two small green squares at the bottom, a plain blue star and a striped red circle
you can see only two squares, a star and a circle
two squares, one star, one circle and nothing else
there are four objects, two squares, one star and one circle
four objects in the picture, two of them striped
four objects, three of them small
four objects, two of them small and plain
one star, one circle and two squares in this picture
a small square is below a red circle
a circle above and to the left of a star, with two squares
a circle to the left of a star, and a striped green square and a plain green square
the red circle is left of the star
the star is to the right of the circle and above the plain square
the circle is large, red and striped
the circle is striped and red and the blue object is in the center
the object in the middle is blue, while the object in the top left is red
the plain square is in the bottom right and the striped square is in the lower left
both squares in the picture are green and small
all two squares are green
the circle is bigger than the star
the star is smaller than the circle
the star is as small as the striped square
the star and the plain square are the same size
the star and the plain square have the same texture
a red circle is in the top left
a circle is large and red and a blue star
a circle above the star
the circle is red and in the top left, and the star is blue
there are more squares than stars in the picture
there are more small objects than large objects
"""
FALSE = """
a blue circle
a red star
a small red circle
a plain red circle
three squares
one square
two squares and a striped square
a circle and a red circle
only two squares and a star
a circle, a star and nothing else
three objects, two squares and a circle
four objects, two squares and a circle
four objects, three of them striped
four objects, all of them small
a circle in the top right
a circle is in the top right
the circle is red and above the red circle
the circle is red and in the middle
a star above the circle
a red circle at the bottom
two squares on the left
a red circle is below a blue star
a circle above and to the right of a star
a star to the left of a star
a blue star above a circle, and two squares
the square is green
the circle is large and plain
the circle is striped and the star is red
the star is in the top left
both squares in the picture are striped
all objects in the picture are small
all three squares are green
both objects are green
the circle is smaller than the star
the star is larger than the plain square
the circle is as large as the star
the circle and the star are the same size
the red object and the blue object have the same texture
there are more stars than squares
there are more squares than triangles in the picture
there are more striped objects than plain objects
"""
UNREADABLE = """
a red
a circles
two circle
an red circle
a object
there are a circle
there is two squares
a red blue circle
a circle and
a circle is
the two green squares
a red circle is blue
circle
red circle
a cat
a red circle on the
the circle is
the circle is red and
the circle is red red
the circle are red
the circle is larger than
a circle circle
a circle, a star. a square
a circle: a star
is there a circle?
a red circle a blue star
three of them red
a circle above and below a star
"""


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


@pytest.mark.parametrize("caption", lines(TRUE))
def test_true_captions(caption: str) -> None:
    check = check_caption(caption, SCENE)
    assert check.parsed and check.statements
    assert check.true, check


@pytest.mark.parametrize("caption", lines(FALSE))
def test_false_captions(caption: str) -> None:
    check = check_caption(caption, SCENE)
    assert check.parsed, "it is of the grammar"
    assert not check.true
    assert not all(statement.true for statement in check.statements)


@pytest.mark.parametrize("caption", ["", " ", *lines(UNREADABLE)])
def test_what_cannot_be_read_is_not_true(caption: str) -> None:
    check = check_caption(caption, SCENE)
    assert (check.parsed, check.statements, check.true) == (False, [], False)


def test_statements_are_told_apart() -> None:
    check = check_caption("a large red circle, a blue ring and two squares", SCENE)
    assert [(one.text, one.kind, one.true) for one in check.statements[:3]] == [
        ("a large red circle", "existence", True),
        ("a blue ring", "existence", False),
        ("two squares", "count", True),
    ]
    check = check_caption("the circle is red and the star is to the right of the circle", SCENE)
    assert [(one.text, one.kind) for one in check.statements] == [
        ("the circle is red", "attribute"),
        ("the star is to the right of the circle", "relation"),
    ]


def test_places_near_a_border_pass_on_both_sides() -> None:
    between = scene(small_plain_red_ring=(36, 80))  # on the line between the left third and the middle one
    for spot in ("in the bottom left", "at the bottom", "on the left"):
        assert check_caption(f"a ring {spot}", between).true, spot
    for spot in ("in the bottom right", "on the right", "at the top", "in the middle"):
        assert not check_caption(f"a ring {spot}", between).true, spot


def changed(pattern: str, captions_of_scene: list[str], word) -> list[str]:
    """The captions with one word that fits `pattern` changed into `word(it)`."""
    return [
        caption[: found.start()] + word(found[0]) + caption[found.end() :]
        for caption in captions_of_scene
        for found in [re.search(rf"\b({pattern})\b", caption)]
        if found is not None
    ]


def test_captions_with_one_wrong_word_are_false() -> None:
    rng = np.random.default_rng(9)
    tried = 0
    for one in scenes(150, 9):
        texts = captions(one, rng)
        colour = next(name for name in COLOURS if name not in {thing.colour for thing in one.things})
        shape = next(name for name in SHAPES if name not in {thing.shape for thing in one.things})
        plurals = "|".join(PLURALS[name] for name in SHAPES)
        wrong = [
            *changed("|".join(COLOURS), texts, lambda _, colour=colour: colour),
            *changed("|".join(SHAPES), texts, lambda _, shape=shape: shape),
            *changed(plurals, texts, lambda _, shape=shape: PLURALS[shape]),
            *changed("two|three|four", texts, lambda word: NUMBERS[NUMBERS.index(word) + 1]),
        ]
        tried += len(wrong)
        for caption in wrong:
            check = check_caption(caption, one)
            assert check.parsed and not check.true, (caption, one)
    assert tried > 1000
