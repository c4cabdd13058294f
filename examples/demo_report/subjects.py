"""Pictures for the demo: fresh scenes of the generated world with what is true of them, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from blip2_hf.data.seeding import random_generator
from blip2_hf.data.shapes.captions import complete_caption
from blip2_hf.data.shapes.drawing import render
from blip2_hf.data.shapes.questions import questions
from blip2_hf.data.shapes.scenes import HELD_OUT, MOST_THINGS, TRAINED, Scene, draw_scene
from blip2_hf.image_loading import load_image

SHOWN = 384  # pixels of a picture in the report; the models get theirs at 96
# For pictures of which nothing is known.
GENERAL_QUESTIONS = (
    "how many objects are there?",
    "what color is the large object?",
    "what shape is the small object?",
    "is there a red object?",
)


@dataclass(frozen=True)
class Subject:
    """One picture.

    Attributes:
        title: a heading.
        note: what is special about it; "" for nothing.
        image: what the models see.
        shown: the same for the report, `SHOWN` pixels square.
        questions: to be asked, each with its true answer (None: not known).
        caption: a true sentence, to be found among those of the other pictures; None: not known.
        phrases: of single things, to be looked for.
        scene: what the picture shows; None: not known.
    """

    title: str
    note: str
    image: Image.Image
    shown: Image.Image
    questions: tuple[tuple[str, str | None], ...]
    caption: str | None = None
    phrases: tuple[str, ...] = ()
    scene: Scene | None = None


def fresh_subjects(count: int, seed: int, asked: int = 4) -> list[Subject]:
    """Newly drawn scenes of one, two, ... five things; every fifth has a shape in a colour that training never had."""
    return [_fresh(number, random_generator("demo", seed, number), asked) for number in range(count)]


def _fresh(number: int, rng: np.random.Generator, asked: int) -> Subject:
    things, unseen = number % MOST_THINGS + 1, number % MOST_THINGS == 2
    allowed, needed = (TRAINED | HELD_OUT, HELD_OUT) if unseen else (TRAINED, None)
    scene = draw_scene(rng, allowed=allowed, needed=needed)
    while len(scene.things) != things:
        scene = draw_scene(rng, allowed=allowed, needed=needed)
    new = next((thing for thing in scene.things if thing.combination in HELD_OUT), None)
    phrases = {f"a {thing.size} {thing.texture} {thing.colour} {thing.shape}": None for thing in scene.things}
    return Subject(
        title=f"Scene {number + 1}",
        note="" if new is None else f"no training picture had a {new.colour} {new.shape}",
        image=render(scene),
        shown=render(scene, SHOWN),
        questions=tuple((question.question, question.answer) for question in questions(scene, rng, asked)),
        caption=complete_caption(scene, rng),
        phrases=tuple(phrases)[:4],
        scene=scene,
    )


def own_subjects(paths: Sequence[str | Path], asked: Sequence[str] = ()) -> list[Subject]:
    """The user's pictures, stretched to squares in the report as they are for the models, so that the maps fit.

    Raises:
        ValueError: one cannot be read; `paths` is empty.
    """
    if not paths:
        raise ValueError("`paths` must name at least one picture, got none")
    questions = tuple((question, None) for question in (asked or GENERAL_QUESTIONS))
    subjects = []
    for path in paths:
        image = load_image(str(path))
        shown = image.resize((SHOWN, SHOWN), Image.Resampling.LANCZOS)
        subjects.append(Subject(title=Path(path).name, note="", image=image, shown=shown, questions=questions))
    return subjects
