"""Captions of a scene: true sentences in lower case, with variety of wording and content.

There are two sorts. Complete ones name every thing; partial ones say how two things lie to each other, compare them,
count, or say something about one of them. As people do, they name shape and colour, and only now and then size, texture
and place. `grammar` reads all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .choice import mostly_first, pick, shuffled, weighted
from .listing import described, number_of
from .phrases import listed, named, noun_phrase, same, unique_reference
from .places import clear_field, clearly_related
from .scenes import SHAPES, Scene, Thing
from .words import LARGER, NUMBERS, PLURALS, RELATION_PHRASES, SIZE_WORDS, SMALLER, SPOT_PHRASES, VALUES

SHORTEST, LONGEST = 8, 24  # words of a caption; at least 8 tokens are what the paper's captioning generates
_COMPLETE = 0.4  # least share of captions that name every thing
_TRIES = 300  # for one caption; scenes of one thing have few
_SHOWS = ("the picture shows", "this picture shows")
_HERE = ("in the picture", "in this picture")

Rng = np.random.Generator


def captions(scene: Scene, rng: np.random.Generator, count: int = 5) -> list[str]:
    """True sentences about `scene`, all different, in random order.

    Of more than one, at least two in five name all things. All have 8 to 24 words, no capital letters and no mark but
    commas.

    Args:
        scene: what to describe.
        rng: where every choice comes from.
        count: how many, at least one.

    Raises:
        ValueError: for a `count` below one, or more than can be told apart.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count!r}")
    complete = math.ceil(_COMPLETE * count) if count > 1 else 0
    found: list[str] = []
    tries = 0
    while len(found) < count:
        tries += 1
        if tries > _TRIES:
            raise ValueError(f"`count` must be smaller for this scene: got {count}, found {len(found)} captions")
        naming_all = len(found) < complete or rng.random() < _COMPLETE
        caption = weighted(rng, _NAMING_ALL if naming_all else _PARTIAL)(rng, scene)
        if caption is not None and caption not in found and SHORTEST <= len(caption.split()) <= LONGEST:
            found.append(caption)
            tries = 0
    return shuffled(rng, found)


def complete_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One that names every thing."""
    while True:
        caption = weighted(rng, _NAMING_ALL)(rng, scene)
        if caption is not None and SHORTEST <= len(caption.split()) <= LONGEST:
            return caption


def _list(rng: Rng, scene: Scene) -> str:
    things = scene.things
    frame = weighted(rng, {"": 9, "is": 5, "shows": 3, "see": 2, "only": 2, "else": 1, "number": 3})
    room = LONGEST - {"": 0, "is": 2, "shows": 3, "see": 3, "only": 3, "else": 2, "number": 4}[frame]
    phrases = described(rng, things, things, room)
    if frame == "else":
        return listed([*phrases, "nothing else"])
    text = listed(phrases)
    are = "is" if phrases[0].split()[0] in ("a", "an") else "are"
    if frame == "":
        return text
    if frame == "is":
        return f"there {are} {text}"
    if frame == "only":
        return f"there {are} only {text}"
    if frame == "number":
        number = "there is only one object" if len(things) == 1 else f"there are {number_of(things)}"
        return f"{mostly_first(rng, (number, number_of(things)))}, {text}"
    return f"{'you can see' if frame == 'see' else mostly_first(rng, _SHOWS)} {text}"


def _related_list(rng: Rng, scene: Scene) -> str | None:
    """How two things lie to each other, and all others."""
    pair = _clear_pair(rng, scene)
    if pair is None:
        return None
    first, relation, second = pair
    others = [thing for thing in scene.things if thing is not first and thing is not second]
    text = f"{noun_phrase(rng, first, named(rng))} {relation} {noun_phrase(rng, second, named(rng))}"
    if not others:
        return text
    room = LONGEST - len(text.split()) - 1
    return f"{text}, {mostly_first(rng, ('and', 'with'))} {listed(described(rng, others, scene.things, room))}"


def _related(rng: Rng, scene: Scene) -> str | None:
    pair = _clear_pair(rng, scene)
    if pair is None:
        return None
    first, relation, second = pair
    if rng.random() < 0.5:
        a, b = (noun_phrase(rng, thing, named(rng)) for thing in (first, second))
        return pick(rng, (f"{a} {relation} {b}", f"{a} is {relation} {b}", f"there is {a} {relation} {b}"))
    a, b = _reference(rng, scene, first), _reference(rng, scene, second)
    return None if a is None or b is None else f"the {a} is {relation} the {b}"


def _predicated(rng: Rng, scene: Scene) -> str | None:
    """The other properties of one thing or of two."""
    clauses = []
    for thing in shuffled(rng, scene.things)[: int(rng.integers(1, 3))]:
        found = unique_reference(rng, scene, thing)
        if found is None:
            return None
        reference, said = found
        field = clear_field(thing)
        adjectives = [_adjective(rng, thing, name) for name in ("size", "colour", "texture") if name not in said]
        if field is not None and "spot" not in said and (not adjectives or rng.random() < 0.5):
            clauses.append(f"the {reference} is {mostly_first(rng, SPOT_PHRASES[field])}")
        elif adjectives:
            clauses.append(f"the {reference} is {listed(shuffled(rng, adjectives))}")
        else:
            return None
    return mostly_first(rng, (" and ", ", while ")).join(clauses)


def _shared(rng: Rng, scene: Scene) -> str | None:
    """What all things, or all of a kind, have in common."""
    options = []
    for shape in (None, *SHAPES):
        things = [thing for thing in scene.things if shape in (None, thing.shape)]
        names = [name for name in ("size", "colour", "texture") if all(same(things[0], t, [name]) for t in things[1:])]
        if len(things) > 1 and names:
            options.append((shape, things, names))
    if not options:
        return None
    shape, things, common = pick(rng, options)
    adjectives = listed(shuffled(rng, [_adjective(rng, things[0], name) for name in common]))
    if shape is None and rng.random() < 0.4:
        return f"{number_of(things)} in the picture, {'both' if len(things) == 2 else 'all'} of them {adjectives}"
    who = ("both",) if len(things) == 2 else (f"all {NUMBERS[len(things)]}", "all")
    return f"{mostly_first(rng, who)} {PLURALS[shape or 'object']} {pick(rng, _HERE)} are {adjectives}"


def _compared(rng: Rng, scene: Scene) -> str | None:
    if len(scene.things) < 2:
        return None
    first, second = shuffled(rng, scene.things)[:2]
    a, b = (_reference(rng, scene, thing, without=("size",)) for thing in (first, second))
    if a is None or b is None:
        return None
    if first.size != second.size:
        return f"the {a} is {mostly_first(rng, LARGER if first.size == 'large' else SMALLER)} than the {b}"
    if rng.random() < 0.5:
        return f"the {a} and the {b} are the same size"
    return f"the {a} is as {mostly_first(rng, SIZE_WORDS[first.size])} as the {b}"


def _more(rng: Rng, scene: Scene) -> str | None:
    name = weighted(rng, {"shape": 2.0, "colour": 2.0, "size": 1.0, "texture": 1.0})
    counts = {value: sum(getattr(t, name) == value for t in scene.things) for value in VALUES[name]}
    present = [value for value, number in counts.items() if number]
    pairs = [(a, b) for a in present for b in present if counts[a] > counts[b]]
    if not pairs:
        return None
    a, b = (PLURALS[value] if name == "shape" else f"{value} objects" for value in pick(rng, pairs))
    return f"there are more {a} than {b} {pick(rng, _HERE)}"


def _counted(rng: Rng, scene: Scene) -> str | None:
    """How many things there are of each shape, colour, size or texture."""
    name = weighted(rng, {"shape": 3.0, "colour": 2.0, "size": 1.0, "texture": 1.0})
    parts = []
    for value in shuffled(rng, VALUES[name]):
        number = sum(getattr(thing, name) == value for thing in scene.things)
        if number:
            noun = value if name == "shape" else "object"
            adjective = "" if name == "shape" else f"{value} "
            parts.append((number, f"{NUMBERS[number]} {adjective}{noun if number == 1 else PLURALS[noun]}"))
    are = "is" if parts[0][0] == 1 else "are"
    text = listed([part for _, part in parts])
    if rng.random() < 0.25 and len(parts) > 1 and name != "shape":
        number, part = parts[0]
        return f"{number_of(scene.things)} in the picture, {NUMBERS[number]} of them {part.split()[1]}"
    if rng.random() < 0.4 and len(scene.things) > 1:
        return f"there are {number_of(scene.things)}, {text}"
    return pick(rng, (f"there {are} {text} {pick(rng, _HERE)}", f"the picture shows {text}", f"you can see {text}"))


def _adjective(rng: Rng, thing: Thing, name: str) -> str:
    return mostly_first(rng, SIZE_WORDS[thing.size], 0.8) if name == "size" else getattr(thing, name)


def _reference(rng: Rng, scene: Scene, thing: Thing, without: tuple[str, ...] = ()) -> str | None:
    found = unique_reference(rng, scene, thing, without=(*without, "spot"))
    return None if found is None else found[0]


def _clear_pair(rng: Rng, scene: Scene) -> tuple[Thing, str, Thing] | None:
    """Two things and how the first lies to the second, in words; in a quarter of the cases along both axes."""
    if len(scene.things) < 2:
        return None
    first, second = shuffled(rng, scene.things)[:2]
    names = [name for name in RELATION_PHRASES if clearly_related(first, name, second)]
    if not names:
        return None
    if len(names) == 2 and rng.random() < 0.25:  # as they are listed: the horizontal one first
        return first, f"{names[1]} and {mostly_first(rng, RELATION_PHRASES[names[0]])}", second
    return first, mostly_first(rng, RELATION_PHRASES[pick(rng, names)]), second


_NAMING_ALL: dict[Callable[[Rng, Scene], str | None], float] = {_list: 3, _related_list: 1}
_PARTIAL: dict[Callable[[Rng, Scene], str | None], float] = {
    _related: 6,
    _predicated: 3,
    _shared: 1,
    _compared: 1,
    _more: 1,
    _counted: 2,
}
