"""Images made in memory, and their files."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@lru_cache
def photo(width: int, height: int) -> Image.Image:
    """Smooth colours, sharp edges and some grain, as in a photo."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(9 * x + 4 * y), np.cos(7 * y - 3 * x), np.sin(25 * x * y)]
    pixels = np.stack(waves, axis=-1) * 80 + 128
    pixels += 60 * ((np.floor(x * 31) + np.floor(y * 23)) % 2)[..., None] - 30
    pixels += np.random.default_rng(1).normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def exif_with(orientation) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif
