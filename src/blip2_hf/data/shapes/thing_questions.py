"""Questions about one thing: its colour, shape, size, texture and place. Each maker gives question and answer."""

from __future__ import annotations

import numpy as np

from .choice import mostly_first, pick
from .phrases import unique_reference
from .places import clear_field
from .scenes import Scene, Thing
from .words import SIZE_WORDS

Rng = np.random.Generator
Asked = tuple[str, str]


def colour(rng: Rng, scene: Scene) -> Asked | None:
    found = _thing(rng, scene, "colour")
    if found is None:
        return None
    thing, reference = found
    forms = ("what color is {}?", "what is the color of {}?", "which color does {} have?")
    return mostly_first(rng, forms).format(reference), thing.colour


def shape(rng: Rng, scene: Scene) -> Asked | None:
    found = _thing(rng, scene, "shape")
    if found is None:
        return None
    thing, reference = found
    forms = ("what shape is {}?", "what is the shape of {}?", "which shape does {} have?", "what is {}?")
    return mostly_first(rng, forms, 0.4).format(reference), thing.shape


def size(rng: Rng, scene: Scene) -> Asked | None:
    found = _thing(rng, scene, "size")
    if found is None:
        return None
    thing, reference = found
    large, small = (mostly_first(rng, SIZE_WORDS[name], 0.8) for name in ("large", "small"))
    forms = (f"is {{}} {large} or {small}?", f"is {{}} {small} or {large}?", "what size is {}?", "how large is {}?")
    form = pick(rng, forms)
    words = {"large": large, "small": small} if " or " in form else {}
    return form.format(reference), words.get(thing.size, thing.size)


def texture(rng: Rng, scene: Scene) -> Asked | None:
    found = _thing(rng, scene, "texture")
    if found is None:
        return None
    thing, reference = found
    forms = (
        "is {} plain or striped?",
        "is {} striped or plain?",
        "what texture does {} have?",
        "what is the texture of {}?",
    )
    return pick(rng, forms).format(reference), thing.texture


def place(rng: Rng, scene: Scene) -> Asked | None:
    """In which of the nine fields the thing is."""
    things = [thing for thing in scene.things if clear_field(thing) is not None]
    found = _thing(rng, scene, "spot", things)
    if found is None:
        return None
    thing, reference = found
    field = clear_field(thing)
    forms = ("where is {}?", "where in the picture is {}?", "in which part of the picture is {}?")
    return mostly_first(rng, forms).format(reference), str(field)


def _thing(rng: Rng, scene: Scene, asked: str, things: list[Thing] | None = None) -> tuple[Thing, str] | None:
    """A thing and words for it that do not say what is `asked`."""
    things = list(scene.things) if things is None else things
    if not things:
        return None
    thing = pick(rng, things)
    found = unique_reference(rng, scene, thing, without=(asked,))
    return None if found is None else (thing, f"the {found[0]}")
