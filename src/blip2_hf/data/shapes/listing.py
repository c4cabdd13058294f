"""Lists of all things of a scene."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .choice import shuffled, weighted
from .phrases import named, noun_phrase, same, spot_of
from .scenes import Thing
from .words import NUMBERS, PLURALS


def described(rng: np.random.Generator, things: Sequence[Thing], everything: Sequence[Thing], words: int) -> list[str]:
    """Noun phrases for all of `things` in at most about `words` words, mostly from the left to the right.

    Shape and colour are always said; now and then size or texture of all, or the places of some, where there is room.
    Things that are alike in what is said share a phrase with their number: that many, and no more, are in the scene.

    Args:
        things: what to describe.
        everything: all things of the scene.
        words: how many words the phrases may have, together with an "and" before the last one.
    """
    said = {"shape", "colour"}
    for name in sorted(named(rng) - said):
        if _length(_groups(things, everything, said | {name}), said | {name}) <= words:
            said.add(name)
    groups = _groups(sorted(things, key=lambda thing: thing.x), everything, said)
    if rng.random() < 0.2:
        groups = shuffled(rng, groups)
    left = words - _length(groups, said)
    spots: dict[int, str] = {}
    for number in shuffled(rng, range(len(groups)))[: weighted(rng, {0: 6, 1: 3, 2: 1})]:
        spot = spot_of(rng, groups[number][0]) if len(groups[number]) == 1 else None
        if spot is not None and left >= 4:
            spots[number] = spot
            left -= 4
    return [
        noun_phrase(
            rng, group[0], said | ({"spot"} if number in spots else set()), count=len(group), spot=spots.get(number)
        )
        for number, group in enumerate(groups)
    ]


def _groups(things: Sequence[Thing], everything: Sequence[Thing], said: set[str]) -> list[list[Thing]]:
    """Things alike in `said` together, unless the scene has more of them than are to be described."""
    groups: list[list[Thing]] = []
    for thing in things:
        for group in groups:
            if same(group[0], thing, said):
                group.append(thing)
                break
        else:
            groups.append([thing])
    whole = []
    for group in groups:
        if len(group) == 1 or len(group) == sum(same(group[0], other, said) for other in everything):
            whole.append(group)
        else:
            whole.extend([thing] for thing in group)
    return whole


def _length(groups: list[list[Thing]], said: set[str]) -> int:
    return len(groups) * (1 + len(said)) + (len(groups) > 1)


def number_of(things: Sequence[Thing]) -> str:
    """ "three objects", "one object"."""
    return f"{NUMBERS[len(things)]} {'object' if len(things) == 1 else PLURALS['object']}"
