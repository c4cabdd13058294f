"""Pictures of scenes, at any size, and maps of what is seen where.

A picture is the same whatever its size: things are measured in shares of it, and the noise of the background is drawn
for `SIDE` pixels and then enlarged. All arithmetic on pixels is on integers.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from .outlines import STRIPE, mask
from .scenes import COLOURS, SIDE, Scene, Thing

_CLOUDS = 7  # grid of the background's slow changes
_BLOTCHES = 24  # grid of its faster ones
_GRAIN = 4  # step of the grain, of which there are three levels
_STEP = 4  # of the background's values: a third less to store, and not to be seen


def render(scene: Scene, side: int = SIDE) -> Image.Image:
    """The picture of `scene`, RGB, `side` x `side` pixels.

    Raises:
        ValueError: a `side` under 16 pixels.
    """
    return Image.fromarray(picture(scene, side))


def picture(scene: Scene, side: int = SIDE) -> np.ndarray:
    """As `render`, as an array: uint8 [side, side, 3]."""
    pixels = _background(scene.background, _checked_side(side))
    for thing in scene.things:
        rows, columns, cover, tone = _on_picture(thing, side)
        part = pixels[rows, columns].astype(np.int32)
        part *= 255 - cover[:, :, None].astype(np.int32)
        part += tone[:, :, None].astype(np.int32) * np.array(COLOURS[thing.colour], np.int32)
        part += 127
        part //= 255
        pixels[rows, columns] = part
    return pixels


def owners(scene: Scene, side: int = SIDE) -> np.ndarray:
    """Which thing each pixel shows: int8 [side, side], the index in `scene.things`, -1 for the background.

    A pixel is a thing's where it covers at least half of it.
    """
    found = np.full((_checked_side(side), side), -1, dtype=np.int8)
    for number, thing in enumerate(scene.things):
        rows, columns, cover, _ = _on_picture(thing, side)
        found[rows, columns][cover > 127] = number
    return found


def patch_owners(scene: Scene, patch: int, side: int = SIDE) -> np.ndarray:
    """Share of each patch that shows each thing: float32 [1 + things, side / patch, side / patch].

    The first row is the background, row 1 + i the thing `scene.things[i]`; the shares of a patch add up to 1.

    Raises:
        ValueError: a `patch` that does not divide `side`.
    """
    if patch < 1 or side % patch:
        raise ValueError(f"`patch` must divide `side` {side}, got {patch}")
    count = side // patch
    blocks = owners(scene, side).reshape(count, patch, count, patch)
    numbers = np.arange(-1, len(scene.things), dtype=np.int8).reshape(-1, 1, 1, 1, 1)
    return (blocks[None] == numbers).sum(axis=(2, 4), dtype=np.int32).astype(np.float32) / np.float32(patch * patch)


def _checked_side(side: int) -> int:
    if side < 16:
        raise ValueError(f"`side` must be at least 16 pixels, got {side}")
    return side


def _on_picture(thing: Thing, side: int) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """Rows and columns of the part of the picture around `thing`, and its mask there."""
    scale = side / SIDE
    left, top = (thing.x - thing.side / 2) * scale, (thing.y - thing.side / 2) * scale
    column, row = math.floor(left), math.floor(top)
    stripe = STRIPE * scale if thing.texture == "striped" else None
    cover, tone = mask(thing.shape, thing.side * scale, round(left - column, 6), round(top - row, 6), stripe)
    height, width = min(len(cover), side - row), min(len(cover), side - column)
    return slice(row, row + height), slice(column, column + width), cover[:height, :width], tone[:height, :width]


def _background(seed: int, side: int) -> np.ndarray:
    """Grey-brown clouds with blotches and a slight grain, uint8 [side, side, 3]."""
    rng = np.random.default_rng(seed)
    grey = rng.integers(96, 146)
    warmth = rng.integers(0, 25)
    base = np.array([grey + warmth, grey, grey - warmth])
    clouds = base + rng.integers(-26, 27, size=(_CLOUDS, _CLOUDS, 1)) + rng.integers(-7, 8, size=(_CLOUDS, _CLOUDS, 3))
    blotches = rng.integers(0, 25, size=(_BLOTCHES, _BLOTCHES))
    grain = rng.integers(0, 3, size=(SIDE, SIDE), dtype=np.uint8) * np.uint8(_GRAIN)
    pixels = _enlarged(clouds, side).astype(np.int16)
    pixels += (_enlarged(blotches, side).astype(np.int16) + _enlarged(grain, side) - 12 - _GRAIN)[:, :, None]
    pixels -= pixels % _STEP
    return pixels.astype(np.uint8)  # was between 96 - 24 - 26 - 7 - 24 and 145 + 24 + 26 + 7 + 24, also after overshoot


def _enlarged(values: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(values.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC))
