"""Noun phrases: a thing, or several alike, in words.

What is said of a thing is a set of `PROPERTIES`. The noun is "object" where the shape is not said.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations

import numpy as np

from .choice import mostly_first, pick, weighted
from .places import clear_field, clearly_at, maybe_at
from .scenes import Scene, Thing
from .words import NUMBERS, PLURALS, SIZE_WORDS, SPOT_PHRASES

PROPERTIES = ("shape", "colour", "size", "texture", "spot")
_EDGES = ("left", "right", "top", "bottom")


def noun_phrase(
    rng: np.random.Generator,
    thing: Thing,
    said: Collection[str],
    *,
    determiner: str = "a",
    count: int = 1,
    spot: str | None = None,
) -> str:
    """`thing` in words, such as "a large red circle with stripes on the left".

    Args:
        said: the properties to say, of `PROPERTIES`.
        determiner: "a" (a number where `count` is above one), "the", or any other; "" for none.
        count: how many such things; above one the noun is a plural.
        spot: where it is, with "spot" in `said`.
    """
    adjectives = []
    if "size" in said:
        adjectives.append(mostly_first(rng, SIZE_WORDS[thing.size], 0.8))
    texture = thing.texture if "texture" in said else None
    behind = ""
    if texture == "striped" and rng.random() < 0.15:
        texture, behind = None, " with stripes"
    words = [word for word in (texture, thing.colour if "colour" in said else None) if word]
    adjectives += words[::-1] if rng.random() < 0.15 else words
    noun = thing.shape if "shape" in said else "object"
    phrase = " ".join([*adjectives, noun if count == 1 else PLURALS[noun]])
    if determiner == "a":
        determiner = NUMBERS[count] if count > 1 else "an" if phrase[0] in "aeiou" else "a"
    if "spot" in said and spot is not None:
        behind += f" {mostly_first(rng, SPOT_PHRASES[spot])}"
    return f"{determiner} {phrase}{behind}".lstrip()


def named(rng: np.random.Generator) -> set[str]:
    """What is said of a thing: shape and colour, now and then with size, texture or both."""
    return {"shape", "colour", *weighted(rng, {(): 10, ("size",): 4, ("texture",): 4, ("size", "texture"): 1})}


def spot_of(rng: np.random.Generator, thing: Thing) -> str | None:
    """A true place of `thing` in the picture: mostly its field, sometimes only the edge; None if nothing is clear."""
    field = clear_field(thing)
    edges = [edge for edge in _EDGES if clearly_at(thing, edge)]
    if field is not None and (not edges or rng.random() < 0.85):
        return field
    return pick(rng, edges) if edges else None


def same(thing: Thing, other: Thing, said: Collection[str]) -> bool:
    """Whether the two have the same shape, colour, … as far as `said` (without "spot")."""
    return all(getattr(thing, name) == getattr(other, name) for name in said)


def unique_reference(
    rng: np.random.Generator, scene: Scene, thing: Thing, *, without: Collection[str] = (), most: int = 3
) -> tuple[str, frozenset[str]] | None:
    """Words after "the" that mean `thing` and nothing else in `scene`, and the properties in them.

    Few properties are likelier than many; the place alone is rare.

    Args:
        without: properties that must not be said.
        most: number of properties said.
    """
    spot = None
    if "spot" not in without:
        field = clear_field(thing)
        if field is not None and not any(maybe_at(other, field) for other in scene.things if other is not thing):
            spot = field
    weights: dict[frozenset[str], float] = {}
    properties = [name for name in PROPERTIES if name not in without and (name != "spot" or spot is not None)]
    for size in range(0 if len(scene.things) == 1 else 1, most + 1):
        for said in combinations(properties, size):
            plain = [name for name in said if name != "spot"]
            if "spot" in said or not any(other is not thing and same(thing, other, plain) for other in scene.things):
                weights[frozenset(said)] = _weight(said)
    if not weights:
        return None
    said = weighted(rng, weights)
    return noun_phrase(rng, thing, said, determiner="", spot=spot), said


def _weight(said: Sequence[str]) -> float:
    weight = (1.0, 6.0, 2.0, 1.0)[min(len(said), 3)]
    return weight * (0.25 if "spot" in said else 1.0) * (2.0 if "shape" in said else 1.0)


def listed(phrases: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]]) if len(phrases) > 1 else phrases[0]
