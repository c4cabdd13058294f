"""Outlines of the generated world's shapes, as anti-aliased masks.

An outline is a function of two arrays, the coordinates u (right) and v (down) in the unit box [-0.5, 0.5]², and says
which points lie inside. Masks average it over a grid of points in each pixel, in NumPy alone, so that the same scene
gives the same bytes whatever the version of the drawing library.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

STRIPE = 3.0  # width of a stripe, in pixels of a picture at its own size; a small thing has three dark ones
DARK = 0.42  # of the colour, in the dark stripes

_POINTS = 8  # per pixel and axis
_STAR_RADII = (0.54, 0.23)
_STAR_DOWN = 0.045  # of the centre: a star reaches higher than low, and would stand out of its box


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u * u + v * v <= 0.25


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) <= 0.44


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (v <= 0.44) & (2 * np.abs(u) <= v + 0.5)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points: one sector of 36 degrees from a tip to a notch, and its mirror images."""
    outer, inner = _STAR_RADII
    v = v - _STAR_DOWN
    angle = np.abs(np.mod(np.arctan2(u, -v) + math.pi / 5, 2 * math.pi / 5) - math.pi / 5)
    radius = np.hypot(u, v)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    notch = (inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5))
    return (notch[0] - outer) * across - notch[1] * (along - outer) >= 0


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return (np.minimum(u, v) <= 0.16) & (np.maximum(u, v) <= 0.48)


def _diamond(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(u) / 0.38 + np.abs(v) / 0.5 <= 1


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    squared = u * u + v * v
    return (squared <= 0.25) & (squared >= 0.25**2)


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x, y = u * 2.36, 0.13 - v * 2.3
    bulge = x * x + y * y - 1
    return bulge * bulge * bulge <= x * x * y * y * y


OUTLINES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "diamond": _diamond,
    "ring": _ring,
    "heart": _heart,
}


@lru_cache(maxsize=4096)
def mask(shape: str, side: float, left: float, top: float, stripe: float | None) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel a thing covers, and how much of its colour is seen there.

    Args:
        shape: a key of `OUTLINES`.
        side: of the thing's box, in pixels.
        left, top: of the box in the mask, in pixels from 0 to 1.
        stripe: width of the diagonal stripes, in pixels; None: a plain thing.

    Returns:
        Two uint8 arrays [n, n], n the least whole number of pixels that holds the box, of which 255 means all: the
        covered share, and the share times the tone (1, in dark stripes `DARK`). They are shared: not writable.
    """
    count = math.ceil(max(left, top) + side)
    points = (np.arange(count * _POINTS) + 0.5) / _POINTS
    u, v = ((points - left) / side - 0.5)[None, :], ((points - top) / side - 0.5)[:, None]
    inside = OUTLINES[shape](u, v).astype(np.float32)
    tone = inside
    if stripe is not None:
        across = (u + v) * side * math.sqrt(0.5) / (2 * stripe)
        tone = inside * np.where(np.mod(across + 0.25, 1) < 0.5, np.float32(DARK), np.float32(1))
    return _averaged(inside, count), _averaged(tone, count)


def _averaged(values: np.ndarray, count: int) -> np.ndarray:
    means = values.reshape(count, _POINTS, count, _POINTS).mean(axis=(1, 3))
    rounded = np.floor(means * 255 + 0.5).astype(np.uint8)
    rounded.flags.writeable = False
    return rounded
