"""What a caption claims of a scene, and whether it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .places import maybe_at, maybe_related
from .reading import Phrase
from .scenes import Scene, Thing


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        text: the words that make it.
        kind: "existence", "count", "relation", "position", "attribute" or "comparison".
        phrases: its noun phrases. The claim holds only where all of them are `counted`.
    """

    text: str
    kind: str
    phrases: tuple[Phrase, ...]

    def holds(self, scene: Scene) -> bool:
        raise NotImplementedError


@dataclass(frozen=True)
class There(Claim):
    """There is `phrases[0]`, standing in all `relations` to `phrases[1]` if that is given."""

    relations: tuple[str, ...] = ()

    def holds(self, scene: Scene) -> bool:
        if not all(phrase.counted(scene) for phrase in self.phrases):
            return False
        return not self.relations or _related(scene, self.phrases[0], self.relations, self.phrases[1])


@dataclass(frozen=True)
class Together(Claim):
    """The things of a list are different ones."""

    parts: tuple[There, ...]

    def holds(self, scene: Scene) -> bool:
        slots: list[tuple[Phrase, tuple[str, ...]]] = []  # a thing to find, and how the one before it relates to it
        for part in self.parts:
            for number, phrase in enumerate(part.phrases):
                slots += [(phrase, part.relations if number else ())] * (phrase.count or 1)
        return _assigned(scene, slots, [])


@dataclass(frozen=True)
class Total(Claim):
    """There are `number` things, and `listed`, the number of those that were named, is as large."""

    number: int
    listed: int

    def holds(self, scene: Scene) -> bool:
        return len(scene.things) == self.number == self.listed


@dataclass(frozen=True)
class Has(Claim):
    """All that `phrases[0]` means has `traits` and, if given, is at `spot`."""

    traits: tuple[tuple[str, str], ...] = ()
    spot: str | None = None

    def holds(self, scene: Scene) -> bool:
        (subject,) = self.phrases
        if not subject.counted(scene):
            return False
        things = subject.possible(scene)
        if subject.sort == "all" and len(things) != len(subject.certain(scene)):
            return False
        fitting = [
            all(getattr(thing, name) == value for name, value in self.traits)
            and (self.spot is None or maybe_at(thing, self.spot))
            for thing in things
        ]
        return all(fitting) if subject.sort == "all" else any(fitting)


@dataclass(frozen=True)
class Some(Claim):
    """`number` of all things have `traits`; None: all of them."""

    number: int | None
    traits: tuple[tuple[str, str], ...]

    def holds(self, scene: Scene) -> bool:
        fitting = sum(all(getattr(thing, name) == value for name, value in self.traits) for thing in scene.things)
        return fitting == (len(scene.things) if self.number is None else self.number)


@dataclass(frozen=True)
class Related(Claim):
    """`phrases[0]` stands in all `relations` to `phrases[1]`."""

    relations: tuple[str, ...]

    def holds(self, scene: Scene) -> bool:
        first, second = self.phrases
        counted = first.counted(scene) and second.counted(scene)
        return counted and _related(scene, first, self.relations, second)


@dataclass(frozen=True)
class Compared(Claim):
    """The two things have the same `name`, or the first one is of the size `larger` and the other of the other size."""

    name: str
    first_size: str | None = None
    same: bool = True

    def holds(self, scene: Scene) -> bool:
        first, second = self.phrases
        if not (first.counted(scene) and second.counted(scene)):
            return False
        return any(self._so(a, b) for a in first.possible(scene) for b in second.possible(scene) if a is not b)

    def _so(self, a: Thing, b: Thing) -> bool:
        if self.first_size is not None and a.size != self.first_size:
            return False
        return (getattr(a, self.name) == getattr(b, self.name)) == self.same


@dataclass(frozen=True)
class More(Claim):
    """There are more of `phrases[0]` than of `phrases[1]`, and some of both."""

    def holds(self, scene: Scene) -> bool:
        first, second = (len(phrase.possible(scene)) for phrase in self.phrases)
        return first > second > 0


def _related(scene: Scene, first: Phrase, relations: tuple[str, ...], second: Phrase) -> bool:
    """Whether as many things as `first` says stand in all `relations` to one thing that `second` means."""
    return any(
        sum(a is not b and _so(a, relations, b) for a in first.possible(scene)) >= (first.count or 1)
        for b in second.possible(scene)
    )


def _so(thing: Thing, relations: tuple[str, ...], other: Thing) -> bool:
    return all(maybe_related(thing, relation, other) for relation in relations)


def _assigned(scene: Scene, slots: Sequence[tuple[Phrase, tuple[str, ...]]], taken: list[Thing]) -> bool:
    """Whether different things can be found for the `slots` that are left."""
    if len(taken) == len(slots):
        return True
    phrase, relations = slots[len(taken)]
    for thing in phrase.possible(scene):
        if any(thing is other for other in taken) or (relations and not _so(taken[-1], relations, thing)):
            continue
        if _assigned(scene, slots, [*taken, thing]):
            return True
    return False
