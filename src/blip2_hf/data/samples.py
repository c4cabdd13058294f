"""What a source gives: one image with its captions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .skipped import SkippedSample


@dataclass(frozen=True, slots=True)
class ImageTextSample:
    """One image and what is said about it.

    Attributes:
        image: path, encoded bytes or a PIL image; None where the record has none (skipped when it is read).
        captions: captions as in the source; blank ones are dropped when the sample is used.
        image_id: name of the image, unique over all sources ("coco/139"); equal names mean the same image, which
            the contrastive losses count as positives. None if unknown.
        place: where the record stands, for messages; may be empty if the image is a path.
    """

    image: str | os.PathLike | bytes | Image.Image | None
    captions: tuple[str, ...]
    image_id: str | None = None
    place: str = ""

    @property
    def where(self) -> str:
        """A name for messages: the path, else the place, else the image id."""
        if isinstance(self.image, (str, os.PathLike)):
            return os.fspath(self.image)
        return self.place or self.image_id or "a sample without name"


# What reading a record gives: a sample, or the record of one that is malformed.
Entry = ImageTextSample | SkippedSample


def stable_id(name: str) -> int:
    """A number from 0 to 2**63 - 1 (fits int64) for an image's name, the same in every process and release.

    Two different names coincide with probability 2**-63. Lone surrogates, as `tarfile` gives for names that are not
    UTF-8, are allowed.
    """
    if not isinstance(name, str):
        raise ValueError(f"`name` must be a str, got {type(name).__name__}")
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def one_sample_per_caption(samples: Iterable[Entry]) -> list[Entry]:
    """Every caption as a sample of its own, with the image's id.

    An epoch then goes through all captions, as in the original code, not through one caption of each image. Malformed
    records stay, to be counted when they are met.
    """
    split: list[Entry] = []
    for sample in samples:
        if isinstance(sample, dict):
            split.append(sample)
        else:
            split += [
                ImageTextSample(sample.image, (caption,), sample.image_id, sample.place) for caption in sample.captions
            ]
    return split


def as_captions(value: Any, place: str) -> tuple[str, ...]:
    """A caption field as a tuple: a string, a list of strings, or None for none. None in a list is dropped.

    Raises:
        ValueError: anything else; `place` names the record and the field.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and all(caption is None or isinstance(caption, str) for caption in value):
        return tuple(caption for caption in value if caption is not None)
    raise ValueError(f"{place} must be a string or a list of strings, got {value!r:.100}")
