"""Text alone, in the language of the world: what language models are trained on before they ever meet a picture.

A document describes a scene that is never drawn, and often asks about it in the forms of the paper's prompts. So a
language model learns to answer from a description; the projected queries will later stand where that stood.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...presets import CAPTION_PROMPT, VQA_PROMPTS, fill
from .captions import captions, complete_caption
from .choice import mostly_first, pick, shuffled, weighted
from .phrases import noun_phrase, spot_of
from .questions import questions
from .scenes import COMBINATIONS, Scene, draw_scene
from .words import VALUES

# How many questions follow a description. One is by far the most frequent: an answer mostly ends the text.
_QUESTIONS = {0: 4, 1: 12, 2: 2, 3: 1, 4: 1}
_ONE_SENTENCE = 0.2  # of the descriptions
_FORMS = tuple(VQA_PROMPTS.values())  # "Question: … Answer:" and "Question: … Short answer:"


def corpus(rng: np.random.Generator) -> Iterator[str]:
    """Documents without end, each one line of text about a scene of its own.

    Most begin with a full description in one to five sentences that end with a full stop. None to four questions
    with answers follow, all in the same of the two forms; every answer but the last ends with a full stop, as in
    conversations. Others are captions, bare or after "a photo of", with or without a description before. Scenes have
    all combinations of shape and colour, those that no training scene has as well: words alone do not hold them apart.

    Args:
        rng: where every choice comes from.
    """
    while True:
        yield document(draw_scene(rng, allowed=COMBINATIONS), rng)


def document(scene: Scene, rng: np.random.Generator) -> str:
    """One document of `corpus`, about `scene`."""
    kind = weighted(rng, {"asked": 7, "photo": 2, "caption": 1})
    if kind == "caption":
        return captions(scene, rng, 1)[0]
    if kind == "photo":
        photo = f"{CAPTION_PROMPT} {captions(scene, rng, 1)[0]}"
        return photo if rng.random() < 0.5 else f"{description(scene, rng)} {photo}"
    number = weighted(rng, _QUESTIONS)
    asked = questions(scene, rng, number) if number else []
    form = pick(rng, _FORMS)
    turns = [f"{fill(form, one.question)} {one.answer}" for one in asked]
    return " ".join([description(scene, rng), ". ".join(turns)]).rstrip()


def description(scene: Scene, rng: np.random.Generator) -> str:
    """One to five sentences that name every thing with all its properties, and mostly its place.

    Sometimes it is one sentence, a caption that names all things.
    """
    if rng.random() < _ONE_SENTENCE:
        return f"{complete_caption(scene, rng)}."
    return " ".join(f"{_sentence(scene, number, rng)}." for number in shuffled(rng, range(len(scene.things))))


def _sentence(scene: Scene, number: int, rng: np.random.Generator) -> str:
    thing = scene.things[number]
    spot = spot_of(rng, thing)
    phrase = noun_phrase(rng, thing, {*VALUES, "spot"}, spot=spot)
    forms = (phrase, f"there is {phrase}", f"you can see {phrase}")
    return mostly_first(rng, forms)
