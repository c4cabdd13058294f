"""Scenes: what may be in one, what never is, and that a seed gives the same one always."""

from collections import Counter

import numpy as np
import pytest

from blip2_hf.data.shapes.drawing import owners
from blip2_hf.data.shapes.scenes import (
    COLOURS,
    COMBINATIONS,
    HELD_OUT,
    SHAPES,
    SIDE,
    SIZES,
    TEXTURES,
    TRAINED,
    VISIBLE,
    Scene,
    Thing,
    draw_scene,
)


def drawn(count: int, seed: int = 0, **options) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, **options) for _ in range(count)]


SCENES = drawn(600)


def thing(**changes) -> Thing:
    return Thing(
        **{"shape": "star", "colour": "red", "size": "small", "texture": "plain", "x": 40, "y": 50, "side": 18}
        | changes
    )


def test_the_world_is_as_large_as_promised() -> None:
    assert (len(SHAPES), len(COLOURS), len(SIZES), len(TEXTURES)) == (8, 8, 2, 2)


def test_a_seed_gives_the_same_scenes_and_another_one_others() -> None:
    assert drawn(20) == SCENES[:20]
    assert not set(drawn(20, seed=1)) & set(SCENES[:20])


def test_every_attribute_is_about_equally_frequent() -> None:
    things = [one for scene in SCENES for one in scene.things]
    for name, known in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("texture", TEXTURES)):
        found = Counter(getattr(one, name) for one in things)
        assert set(found) == set(known)
        assert min(found.values()) > 0.6 * len(things) / len(known)


def test_one_to_five_things_of_which_some_are_alike() -> None:
    counts = Counter(len(scene.things) for scene in SCENES)
    assert set(counts) == {1, 2, 3, 4, 5}
    assert counts[2] > counts[5] > 0.08 * len(SCENES)
    several = [Counter(one.shape for one in scene.things) for scene in SCENES if len(scene.things) > 1]
    assert sum(max(shapes.values()) > 1 for shapes in several) > 0.4 * len(several)


def test_things_lie_inside_and_most_of_each_is_seen() -> None:
    overlapping = 0
    for scene in SCENES:
        seen = owners(scene)
        for number, one in enumerate(scene.things):
            alone = np.count_nonzero(owners(Scene((one,), 0)) == 0)
            share = np.count_nonzero(seen == number) / alone
            assert share >= VISIBLE
            overlapping += share < 1
            assert one.side / 2 <= min(one.x, one.y)
            assert max(one.x, one.y) <= SIDE - one.side / 2
    assert overlapping > 20  # negative control: they do overlap


def test_things_of_one_colour_do_not_touch() -> None:
    for scene in SCENES:
        for number, one in enumerate(scene.things):
            for other in scene.things[:number]:
                if one.colour == other.colour:
                    assert max(abs(one.x - other.x), abs(one.y - other.y)) >= (one.side + other.side) / 2


def test_held_out_combinations_are_one_in_eight_and_hide_no_shape_and_no_colour() -> None:
    assert len(HELD_OUT) * 8 == len(COMBINATIONS)
    assert {shape for shape, _ in HELD_OUT} == set(SHAPES) == {shape for shape, _ in TRAINED}
    assert {colour for _, colour in HELD_OUT} == set(COLOURS) == {colour for _, colour in TRAINED}
    assert not HELD_OUT & {one.combination for scene in SCENES for one in scene.things}
    assert {one.combination for scene in SCENES for one in scene.things} == TRAINED


def test_needed_combinations_are_there_beside_allowed_ones() -> None:
    scenes = drawn(100, needed=HELD_OUT)
    numbers = [sum(one.combination in HELD_OUT for one in scene.things) for scene in scenes]
    assert set(numbers) == {1}
    assert len({len(scene.things) for scene in scenes}) == 5
    only = drawn(20, allowed={("ring", "blue")})
    assert {one.combination for scene in only for one in scene.things} == {("ring", "blue")}


@pytest.mark.parametrize("name", ["allowed", "needed"])
@pytest.mark.parametrize("given", [[], [("ring", "brown")]])
def test_unknown_or_no_combinations_are_refused(name: str, given: list) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        drawn(1, **{name: given})


@pytest.mark.parametrize(
    ("name", "value"),
    [("shape", "cube"), ("colour", "brown"), ("size", "huge"), ("texture", "dotted"), ("side", 30), ("x", 8)],
)
def test_a_thing_that_cannot_be_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        thing(**{name: value})


def test_a_scene_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="`things`"):
        Scene((), 0)
    with pytest.raises(ValueError, match="`things`"):
        Scene((thing(),) * 6, 0)
    with pytest.raises(ValueError, match="`background`"):
        Scene((thing(),), -1)
