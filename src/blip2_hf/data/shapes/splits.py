"""The splits of the generated world. An example is a function of split, number and seed alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..seeding import random_generator
from .captions import captions
from .questions import Question, questions
from .scenes import HELD_OUT, TRAINED, Scene, draw_scene

CAPTIONS = 5  # of a scene
QUESTIONS = 6

# Number of scenes. All but the last hold no combination of `HELD_OUT`; there, every scene holds at least one.
SPLITS = {"train": 30_000, "val": 500, "test": 1_000, "combinations": 500}
_IDS = 10_000_000  # of a split: image ids are COCO's, whole numbers that no two splits share


@dataclass(frozen=True)
class Example:
    """A scene with what is said and asked about it.

    Attributes:
        image_id: a number that no other example of the world has, whatever its split.
        scene: what the picture shows.
        captions: true sentences.
        questions: with their answers.
    """

    image_id: int
    scene: Scene
    captions: tuple[str, ...]
    questions: tuple[Question, ...]


def example(split: str, number: int, seed: int) -> Example:
    """Example `number` of a split; the first ones do not depend on how many follow.

    Raises:
        ValueError: an unknown split, a number that is negative or too large.
    """
    image_id = _image_id(split, number)
    scene = split_scene(split, number, seed)
    # A generator for each: other wording or other questions leave the rest as it was.
    said = captions(scene, random_generator("shapes", "captions", seed, split, number), CAPTIONS)
    asked = questions(scene, random_generator("shapes", "questions", seed, split, number), QUESTIONS)
    return Example(image_id, scene, tuple(said), tuple(asked))


def split_scene(split: str, number: int, seed: int) -> Scene:
    """The scene of `example`.

    Raises:
        ValueError: as `example`.
    """
    _image_id(split, number)
    needed = HELD_OUT if split == "combinations" else None
    allowed = TRAINED if needed is None else TRAINED | HELD_OUT
    return draw_scene(random_generator("shapes", "scene", seed, split, number), allowed=allowed, needed=needed)


def _image_id(split: str, number: int) -> int:
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {tuple(SPLITS)}, got {split!r}")
    if not 0 <= number < _IDS - 1:
        raise ValueError(f"`number` of an example must be from 0 to {_IDS - 2}, got {number}")
    return list(SPLITS).index(split) * _IDS + number + 1
