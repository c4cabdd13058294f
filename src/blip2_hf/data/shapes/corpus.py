"""Text alone, in the language of the world: what language models are trained on before they ever meet a picture.

A document describes a scene that is never drawn, and often asks about it in the forms of the paper's prompts. So a
language model learns to answer from a description; the projected queries will later stand where that stood.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...presets import CAPTION_PROMPT, VQA_PROMPTS, fill
from .captions import captions
from .choice import pick, weighted
from .phrases import spot_of
from .questions import questions
from .scenes import COMBINATIONS, Scene, Thing, draw_scene

# How many questions follow a description. One is by far the most frequent: an answer mostly ends the text.
_QUESTIONS = {1: 16, 2: 2, 3: 1, 4: 1}
_FORMS = tuple(VQA_PROMPTS.values())  # "Question: … Answer:" and "Question: … Short answer:"


def corpus(rng: np.random.Generator) -> Iterator[str]:
    """Documents without end, each one line of text about a scene of its own.

    Most begin with a full description, notes that end with full stops. Then come one to four questions with answers,
    all in the same of the two forms, every answer but the last with a full stop behind it, as in conversations; or a
    caption after "a photo of". Others are captions alone. Scenes have all combinations of shape and colour, those that
    no training scene has as well: words alone do not hold them apart.

    Args:
        rng: where every choice comes from.
    """
    while True:
        yield document(draw_scene(rng, allowed=COMBINATIONS), rng)


def document(scene: Scene, rng: np.random.Generator) -> str:
    """One document of `corpus`, about `scene`."""
    kind = weighted(rng, {"asked": 5, "described": 6, "caption": 1})
    if kind == "caption":
        return captions(scene, rng, 1)[0]
    if kind == "described":
        return f"{description(scene, rng)} {CAPTION_PROMPT} {captions(scene, rng, 1)[0]}"
    asked = questions(scene, rng, weighted(rng, _QUESTIONS))
    form = pick(rng, _FORMS)
    turns = [f"{fill(form, one.question)} {one.answer}" for one in asked]
    return f"{description(scene, rng)} {'. '.join(turns)}"


def description(scene: Scene, rng: np.random.Generator) -> str:
    """Notes of every thing with all its properties and its place (unless that is between places), from left to right.

    They always read alike, say all and say it once: so a small model soon learns to look things up in them. Sentences
    in free wording took it many times as long. How to word things it learns from captions.
    """
    things = sorted(scene.things, key=lambda thing: thing.x)
    return " ".join(f"{_note(thing, spot_of(rng, thing))}." for thing in things)


def _note(thing: Thing, spot: str | None) -> str:
    words = (thing.size, thing.texture, thing.colour, thing.shape, spot)
    return " ".join(word for word in words if word)
