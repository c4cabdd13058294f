"""Scenes of the generated world for tests: drawn from a seed, or written down by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from blip2_hf.data.shapes.scenes import COMBINATIONS, SIZES, Scene, Thing, draw_scene

# A scene with all combinations of shape and colour, and the generator to go on with.
drawn = st.integers(0, 2**32 - 1).map(lambda seed: scene_of(np.random.default_rng(seed)))


def scene_of(rng: np.random.Generator) -> tuple[Scene, np.random.Generator]:
    return draw_scene(rng, allowed=COMBINATIONS), rng


def scenes(count: int, seed: int = 0) -> list[Scene]:
    """Scenes of training."""
    rng = np.random.default_rng(seed)
    return [draw_scene(rng) for _ in range(count)]


def thing(words: str, x: int, y: int) -> Thing:
    """ "large striped red circle" with its centre at (x, y)."""
    size, texture, colour, shape = words.split()
    return Thing(shape, colour, size, texture, x, y, SIZES[size][0])


def scene(**things: tuple[int, int]) -> Scene:
    """`large_striped_red_circle=(20, 30)` and so on."""
    return Scene(tuple(thing(words.replace("_", " "), *place) for words, place in things.items()), 0)
