"""Maps over a picture: bright and warm where the map is high, dark where it is low."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Colours of a map's values from 0 to 1.
_STOPS = (
    (0.0, (10, 10, 34)),
    (0.35, (88, 24, 110)),
    (0.65, (222, 72, 74)),
    (0.85, (252, 168, 60)),
    (1.0, (252, 250, 190)),
)
_DARKEST, _OVERLAY = (
    0.62,
    ((0.0, 0.28), (0.6, 0.66), (1.0, 0.5)),
)  # light of the picture at 0; values, shares of the colours


def heat_overlay(picture: Image.Image, values: np.ndarray, side: int) -> Image.Image:
    """`picture` at `side` pixels under a coloured map.

    Args:
        picture: RGB, square.
        values: [h, w], not negative; scaled so that the highest is 1, unless all are equal.
    """
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    grown = Image.fromarray((255 * scaled).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    heat = np.asarray(grown, np.float32) / 255
    base = np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS), np.float32)
    grey = base.mean(axis=2, keepdims=True)
    dimmed = (0.5 * grey + 0.5 * base) * (_DARKEST + (1 - _DARKEST) * heat[..., None])
    share = np.interp(heat, *zip(*_OVERLAY, strict=True))[..., None]
    mixed = dimmed * (1 - share) + colours(heat) * share
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def colours(values: np.ndarray) -> np.ndarray:
    """Colours of values from 0 to 1, [..., 3], 0 to 255."""
    places = [place for place, _ in _STOPS]
    return np.stack([np.interp(values, places, [stop[channel] for _, stop in _STOPS]) for channel in range(3)], axis=-1)
