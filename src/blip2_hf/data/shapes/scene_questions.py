"""Questions about the whole scene: how many, whether there is, comparisons, relations. Makers give question and answer.

All answers are balanced for each wording, see `questions`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import numpy as np

from .choice import mostly_first, pick, weighted
from .phrases import unique_reference
from .places import clearly_related, offset
from .scenes import HELD_OUT, TRAINED, Scene, Thing
from .words import LARGER, NUMBERS, PLURALS, RELATION_PHRASES, SMALLER, VALUES

Rng = np.random.Generator
Asked = tuple[str, str]
Words = tuple[Thing, Thing, str, str]
Traits = tuple[tuple[str, str], ...]  # such as (("colour", "red"), ("shape", "circle"))

# Which properties are named by what is counted, and by what is or is not there, with their weights.
_COUNTED: dict[tuple[str, ...], float] = {
    (): 1.0,
    ("shape",): 1.6,
    ("colour",): 1.6,
    ("size",): 0.8,
    ("texture",): 0.8,
    ("texture", "shape"): 0.4,
    ("size", "shape"): 0.4,
}
_EXISTENT: dict[tuple[str, ...], float] = {
    ("shape",): 2.0,
    ("colour",): 2.0,
    ("colour", "shape"): 3.0,
    ("texture", "shape"): 1.0,
    ("size", "shape"): 1.0,
    ("texture", "colour"): 0.7,
    ("size", "colour"): 0.7,
    ("size", "texture"): 0.4,
}
# Weights of the numbers that can be asked for, the rarer the heavier.
_COUNTS = (1.0, 1.2, 4.0, 8.0, 16.0, 32.0)
_TRIES = 5
_SAME_COLOUR = 0.5  # share of pairs of different colours that is used: about as many as there are of the same one
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def count_of(rng: Rng, scene: Scene) -> Asked:
    """How many objects, red objects, circles, striped circles …"""
    names = weighted(rng, _COUNTED)
    by_number: dict[int, list[Traits]] = {}
    for traits in _all_traits(names):
        by_number.setdefault(_number(scene, traits), []).append(traits)
    even = names not in ((), ("size",), ("texture",))  # else each number is frequent enough by itself
    number = weighted(rng, {found: _COUNTS[found] if even else len(alike) for found, alike in by_number.items()})
    what = _words(pick(rng, by_number[number]), plural=True)
    forms = (f"how many {what} are there?", f"how many {what} can you see?", f"how many {what} are in the picture?")
    return mostly_first(rng, forms), NUMBERS[number]


def existence(rng: Rng, scene: Scene) -> Asked | None:
    """Whether there is such a thing, or whether the thing is so."""
    answer = pick(rng, ("yes", "no"))
    if rng.random() < 0.35:
        return _verified(rng, scene, answer)
    names = weighted(rng, _EXISTENT)
    traits = _present(rng, scene, names) if answer == "yes" else _absent(rng, scene, names)
    if traits is None:
        return None
    what = _words(traits)
    one = f"{'an' if what[0] in 'aeiou' else 'a'} {what}"
    forms = (
        f"is there {one}?",
        f"do you see {one}?",
        f"does the picture show {one}?",
        f"are there any {_words(traits, plural=True)}?",
    )
    return mostly_first(rng, forms, 0.5), answer


def comparison(rng: Rng, scene: Scene) -> Asked | None:
    """Two things or two kinds of things compared."""
    return _made(rng, scene, _COMPARISONS)


def relation(rng: Rng, scene: Scene) -> Asked | None:
    """How two things lie to each other, or what lies there."""
    return _made(rng, scene, _RELATIONS)


def _verified(rng: Rng, scene: Scene, answer: str) -> Asked | None:
    """Is the star red? A combination that is in no training scene is asked about only beside others of that sort."""
    thing = pick(rng, scene.things)
    name = weighted(rng, {"colour": 2.0, "size": 1.0, "texture": 1.0})
    reference = _reference(rng, scene, thing, name)
    if reference is None:
        return None
    value = getattr(thing, name)
    if answer == "no":
        others = [other for other in VALUES[name] if other != value]
        if name == "colour":
            unseen = _has_unseen(scene) and rng.random() < 0.5
            others = [other for other in others if unseen or (thing.shape, other) in TRAINED]
        value = pick(rng, others)
    return f"is {reference} {value}?", answer


def _larger(rng: Rng, scene: Scene) -> Asked | None:
    """Is the circle larger than the star?"""
    found = _pair(rng, scene, lambda a, b: a.size != b.size, "size")
    if found is None:
        return None
    first, second, a, b = found
    word = weighted(rng, {LARGER[0]: 2.0, LARGER[1]: 1.0, SMALLER[0]: 1.5})
    right = first.size == ("small" if word in SMALLER else "large")
    return f"is {a} {word} than {b}?", "yes" if right else "no"


def _which(rng: Rng, scene: Scene) -> Asked | None:
    """Which is larger, the circle or the star?"""
    found = _pair(rng, scene, lambda a, b: a.size != b.size and a.shape != b.shape, "size")
    if found is None:
        return None
    first, second, a, b = found
    if not {first.shape, second.shape} <= {*a.split(), *b.split()}:
        return None
    word = weighted(rng, {LARGER[0]: 2.0, LARGER[1]: 1.0, SMALLER[0]: 1.5})
    wanted = "small" if word in SMALLER else "large"
    return f"which is {word}, {a} or {b}?", first.shape if first.size == wanted else second.shape


def _same(rng: Rng, scene: Scene) -> Asked | None:
    """Do the circle and the star have the same size?"""
    name = weighted(rng, {"size": 1.0, "texture": 1.0, "colour": 1.0})
    found = _pair(rng, scene, lambda a, b: True, name)
    if found is None:
        return None
    first, second, a, b = found
    same = getattr(first, name) == getattr(second, name)
    if name == "colour" and not same and rng.random() > _SAME_COLOUR:
        return None  # different colours are more frequent than equal ones
    return f"do {a} and {b} have the same {'color' if name == 'colour' else name}?", "yes" if same else "no"


def _more(rng: Rng, scene: Scene) -> Asked | None:
    """Are there more circles than stars?"""
    name = weighted(rng, {"shape": 2.0, "colour": 2.0, "size": 1.0, "texture": 1.0})
    counts = {value: _number(scene, ((name, value),)) for value in VALUES[name]}
    pairs = [(a, b) for a in counts for b in counts if counts[a] != counts[b] and counts[a] and counts[b]]
    if not pairs:
        return None
    a, b = pick(rng, pairs)
    text = f"are there more {_words(((name, a),), plural=True)} than {_words(((name, b),), plural=True)}?"
    return text, "yes" if counts[a] > counts[b] else "no"


def _is_beside(rng: Rng, scene: Scene) -> Asked | None:
    """Is the circle to the left of the star?"""
    found = _related_pair(rng, scene)
    if found is None:
        return None
    relation, a, b = found
    answer = pick(rng, ("yes", "no"))
    words = mostly_first(rng, RELATION_PHRASES[relation if answer == "yes" else _OPPOSITE[relation]])
    return f"is {a} {words} {b}?", answer


def _which_side(rng: Rng, scene: Scene) -> Asked | None:
    """Is the circle to the left or to the right of the star?"""
    found = _related_pair(rng, scene)
    if found is None:
        return None
    relation, a, b = found
    if relation in ("left", "right"):
        return f"is {a} to the left or to the right of {b}?", relation
    return f"is {a} above or below {b}?", relation


def _what_is(rng: Rng, scene: Scene) -> Asked | None:
    """What is to the left of the star? The one thing there, clearly, and no other even nearly."""
    anchor = pick(rng, scene.things)
    relation = pick(rng, tuple(RELATION_PHRASES))
    others = [thing for thing in scene.things if thing is not anchor]
    there = [thing for thing in others if offset(thing, relation, anchor) > 0]
    if len(there) != 1 or not clearly_related(there[0], relation, anchor):
        return None
    reference = _reference(rng, scene, anchor, "spot")
    if reference is None:
        return None
    words = mostly_first(rng, RELATION_PHRASES[relation])
    thing = there[0]
    forms = {
        f"what is {words} {reference}?": f"{thing.colour} {thing.shape}",
        f"what shape is {words} {reference}?": thing.shape,
        f"what color is the object {words} {reference}?": thing.colour,
    }
    form = weighted(rng, dict(zip(forms, (2.0, 1.0, 1.0), strict=True)))
    return form, forms[form]


def _related_pair(rng: Rng, scene: Scene) -> tuple[str, str, str] | None:
    """A relation and words for two things that are clearly in it."""
    found = _pair(rng, scene, lambda a, b: True, "spot")
    if found is None:
        return None
    first, second, a, b = found
    relations = [name for name in RELATION_PHRASES if clearly_related(first, name, second)]
    return (pick(rng, relations), a, b) if relations else None


def _pair(rng: Rng, scene: Scene, fits: Callable[[Thing, Thing], bool], without: str) -> Words | None:
    """Two things in any order and words for them that do not say the property `without`."""
    pairs = [(a, b) for a in scene.things for b in scene.things if a is not b and fits(a, b)]
    if not pairs:
        return None
    first, second = pick(rng, pairs)
    a, b = (_reference(rng, scene, thing, without) for thing in (first, second))
    return None if a is None or b is None else (first, second, a, b)


def _reference(rng: Rng, scene: Scene, thing: Thing, without: str) -> str | None:
    found = unique_reference(rng, scene, thing, without=(without, "spot"), most=2)
    return None if found is None else f"the {found[0]}"


def _present(rng: Rng, scene: Scene, names: tuple[str, ...]) -> Traits:
    thing = pick(rng, scene.things)
    return tuple((name, getattr(thing, name)) for name in names)


def _absent(rng: Rng, scene: Scene, names: tuple[str, ...]) -> Traits | None:
    """Properties that no thing has; half of the time one of them, but not all, is that of a thing.

    Combinations that are never in training scenes are asked for as often as they are there: not at all in those.
    """
    thing = pick(rng, scene.things)
    absent = [traits for traits in _all_traits(names) if not _number(scene, traits)]
    if "colour" in names and "shape" in names:
        pool = TRAINED if thing.combination in TRAINED else HELD_OUT
        absent = [traits for traits in absent if (dict(traits)["shape"], dict(traits)["colour"]) in pool]
    if len(names) > 1 and rng.random() < 0.5:
        near = [traits for traits in absent if any(getattr(thing, name) == value for name, value in traits)]
        absent = near or absent
    return pick(rng, absent) if absent else None


def _has_unseen(scene: Scene) -> bool:
    return any(thing.combination in HELD_OUT for thing in scene.things)


def _made(rng: Rng, scene: Scene, makers: dict[Callable[[Rng, Scene], Asked | None], float]) -> Asked | None:
    """A question of one of `makers`, which is given several tries.

    No other maker takes over: where one cannot ask, the answers of the others are not balanced. (Two things that can
    not be asked "which is larger" have the same size.) For the same reason `_same` has one try.
    """
    maker = weighted(rng, makers)
    for _ in range(1 if maker is _same else _TRIES):
        made = maker(rng, scene)
        if made is not None:
            return made
    return None


@cache
def _all_traits(names: tuple[str, ...]) -> tuple[Traits, ...]:
    return tuple(tuple(zip(names, values, strict=True)) for values in product(*(VALUES[name] for name in names)))


def _number(scene: Scene, traits: Traits) -> int:
    return sum(all(getattr(thing, name) == value for name, value in traits) for thing in scene.things)


def _words(traits: Traits, *, plural: bool = False) -> str:
    """ "striped circles", "red object"; properties stand in the order in which they are given, the shape last."""
    noun = dict(traits).get("shape", "object")
    adjectives = [value for name, value in traits if name != "shape"]
    return " ".join([*adjectives, PLURALS[noun] if plural else noun])


_COMPARISONS: dict[Callable[[Rng, Scene], Asked | None], float] = {_larger: 1.5, _which: 1, _same: 1.5, _more: 1}
_RELATIONS: dict[Callable[[Rng, Scene], Asked | None], float] = {_is_beside: 1, _which_side: 1, _what_is: 2}
