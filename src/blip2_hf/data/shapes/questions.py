"""Questions about a scene and their answers, made so that whoever does not see the picture cannot do well.

Answers are balanced for every wording: an absent thing that is asked about is as likely as a present one, of two
things to be compared either may come first, and a reference ("the striped star") never holds what is asked. They are
words of the world: "red", "star", "red star", "large", "three", "yes", "top left", "above".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .choice import by_weight
from .scene_questions import comparison, count_of, existence, relation
from .scenes import Scene
from .thing_questions import colour, place, shape, size, texture

Maker = Callable[[np.random.Generator, Scene], tuple[str, str] | None]
_MAKERS: dict[str, tuple[Maker, float]] = {
    "colour": (colour, 1.4),
    "shape": (shape, 1.4),
    "size": (size, 0.7),
    "texture": (texture, 0.7),
    "position": (place, 0.7),
    "count": (count_of, 1.2),
    "existence": (existence, 1.2),
    "comparison": (comparison, 1.5),
    "relation": (relation, 1.6),
}
KINDS = tuple(_MAKERS)
_TRIES = 30  # rounds through all kinds without anything new


@dataclass(frozen=True)
class Question:
    """A question, its answer and which of `KINDS` it is."""

    question: str
    answer: str
    kind: str


def questions(scene: Scene, rng: np.random.Generator, count: int = 6) -> list[Question]:
    """Questions about `scene`, none twice, of different kinds as far as possible.

    Not every kind is possible in every scene: one thing has no relation to another.

    Args:
        scene: what to ask about.
        rng: where every choice comes from.
        count: how many, at least one.

    Raises:
        ValueError: for a `count` below one, or more than can be told apart.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count!r}")
    found: dict[str, Question] = {}
    tries = 0
    while tries < _TRIES:
        tries += 1
        for kind in by_weight(rng, {kind: weight for kind, (_, weight) in _MAKERS.items()}):
            made = _MAKERS[kind][0](rng, scene)
            if made is not None and made[0] not in found:
                found[made[0]] = Question(*made, kind)
                tries = 0
            if len(found) == count:
                return list(found.values())
    raise ValueError(f"`count` must be smaller for this scene: got {count}, found {len(found)} questions")
