"""Reading the world's noun phrases: "two large striped circles", "the red object in the top left".

A `Reader` goes through the words of a text from left to right and never back, but for what a caller tries and undoes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .places import clearly_at, maybe_at
from .scenes import COLOURS, TEXTURES, Scene, Thing
from .words import NUMBERS, PLURALS, RELATION_PHRASES, SIZE_WORDS, SPOT_PHRASES

Number = TypeVar("Number", int, np.ndarray)
_WORDS = re.compile(r"[a-z]+|,")
_NOT_READ = re.compile(r"[^a-z, .?]")
_TRAITS = {
    **{word: ("size", size) for size, words in SIZE_WORDS.items() for word in words},
    **{colour: ("colour", colour) for colour in COLOURS},
    **{texture: ("texture", texture) for texture in TEXTURES},
}
_NOUNS = {noun: (noun, False) for noun in PLURALS} | {plural: (noun, True) for noun, plural in PLURALS.items()}


def _by_length(phrases: dict[str, tuple[str, ...]]) -> list[tuple[list[str], str]]:
    """The words of every phrase and its meaning, longer phrases first."""
    pairs = [(phrase.split(), meaning) for meaning, alike in phrases.items() for phrase in alike]
    return sorted(pairs, key=lambda pair: -len(pair[0]))


_SPOTS = _by_length(SPOT_PHRASES)
_RELATIONS = _by_length(RELATION_PHRASES)
_VERTICAL = ("above", "below")


class Unreadable(Exception):
    """The text is not of this grammar."""


@dataclass(frozen=True)
class Phrase:
    """What a noun phrase says of things.

    Attributes:
        traits: pairs such as ("colour", "red"), sorted; ("shape", ...) is missing for "object".
        spot: the place, or None.
        sort: "some" ("a", "an"), "number" ("two", "one": no more and no less), "the", "all" ("both", "all three"),
            or "bare".
        count: how many things; None where a plural does not say it.
    """

    traits: tuple[tuple[str, str], ...]
    spot: str | None
    sort: str
    count: int | None

    def possible(self, scene: Scene) -> list[Thing]:
        """The things that it may mean."""
        return [thing for thing in scene.things if self._fits(thing) and (not self.spot or maybe_at(thing, self.spot))]

    def certain(self, scene: Scene) -> list[Thing]:
        """The things that it means whatever one thinks of places near a border."""
        return [
            thing for thing in scene.things if self._fits(thing) and (not self.spot or clearly_at(thing, self.spot))
        ]

    def counted(self, scene: Scene) -> bool:
        """Whether there are as many such things as it says."""
        return bool(self.agrees(len(self.possible(scene)), len(self.certain(scene))))

    def agrees(self, possible: Number, certain: Number) -> bool | np.ndarray:
        """Whether it speaks of as many things as there are possible and certain ones; for arrays an array."""
        if self.count is None:
            return possible > 0
        if self.sort == "some":
            return possible >= self.count
        return (certain <= self.count) & (self.count <= possible)

    def _fits(self, thing: Thing) -> bool:
        return all(getattr(thing, name) == value for name, value in self.traits)


class Reader:
    """The words of `text` and how far they have been read.

    Raises:
        Unreadable: for marks other than commas, and a full stop or question mark at the end.
    """

    def __init__(self, text: str) -> None:
        text = text.lower().strip().rstrip(".?")
        if _NOT_READ.search(text) or "." in text or "?" in text:
            raise Unreadable(text)
        self.words: list[str] = _WORDS.findall(text)
        self.place = 0

    def take(self, *phrases: str) -> str | None:
        """Reads the first of `phrases` that comes next, and returns it; else reads nothing and returns None."""
        for phrase in phrases:
            words = phrase.split()
            if self.words[self.place : self.place + len(words)] == words:
                self.place += len(words)
                return phrase
        return None

    def need(self, *phrases: str) -> str:
        """As `take`.

        Raises:
            Unreadable: if none of `phrases` comes next.
        """
        taken = self.take(*phrases)
        if taken is None:
            raise Unreadable(" ".join(self.words))
        return taken

    def next(self) -> str:
        """The next word, unread; "" at the end."""
        return self.words[self.place] if self.place < len(self.words) else ""

    def end(self) -> None:
        """Raises `Unreadable` if there are more words."""
        if self.place != len(self.words):
            raise Unreadable(" ".join(self.words))

    def since(self, place: int) -> str:
        """The words read since `place`."""
        return " ".join(self.words[place : self.place]).replace(" ,", ",")

    def spot(self) -> str | None:
        """ "in the top left", …: the key of `SPOT_PHRASES`."""
        return self._meaning(_SPOTS)

    def relation(self) -> str | None:
        """ "to the left of", "above", …: the key of `RELATION_PHRASES`."""
        return self._meaning(_RELATIONS)

    def relations(self) -> tuple[str, ...]:
        """A relation, or two as in "above and to the left of"; none if what comes next is no relation."""
        first = self.relation()
        place = self.place
        if first not in _VERTICAL or not self.take("and"):
            return () if first is None else (first,)
        second = self.relation()
        if second is None or second in _VERTICAL:
            self.place = place
            return (first,)
        return first, second

    def trait(self) -> tuple[str, str] | None:
        """An adjective: a property and its value."""
        trait = _TRAITS.get(self.next())
        if trait is not None:
            self.place += 1
        return trait

    def phrase(self, *, sorts: Iterable[str] = ("some", "number", "the", "all")) -> Phrase:
        """A noun phrase with one of the determiners `sorts`, see `Phrase`.

        Raises:
            Unreadable: if what comes next is none, or singular and plural are mixed up.
        """
        sort, count = self._determiner()
        article = self.words[self.place - 1] if sort == "some" else ""
        if sort not in sorts or (article and (article == "an") != (self.next()[:1] in tuple("aeiou"))):
            raise Unreadable(" ".join(self.words))
        traits: dict[str, str] = {}
        while (trait := self.trait()) is not None:
            if trait[0] in traits:
                raise Unreadable(" ".join(self.words))
            traits.update([trait])
        noun, plural = _NOUNS.get(self.next(), ("", False))
        if not noun or plural != (sort in ("all", "bare") or count not in (1, None)):
            raise Unreadable(" ".join(self.words))
        self.place += 1
        if noun != "object":
            traits["shape"] = noun
        if "texture" not in traits and self.take("with stripes"):
            traits["texture"] = "striped"
        return Phrase(tuple(sorted(traits.items())), self.spot(), sort, count)

    def _determiner(self) -> tuple[str, int | None]:
        if self.take("a", "an"):
            return "some", 1
        if self.take("the"):
            return "the", 1
        if self.take("both"):
            return "all", 2
        if self.take("all"):
            return "all", self._number()
        number = self._number()
        return ("bare", None) if number is None else ("number", number)

    def _number(self) -> int | None:
        word = self.next()
        if word not in NUMBERS[1:]:
            return None
        self.place += 1
        return NUMBERS.index(word)

    def _meaning(self, phrases: list[tuple[list[str], str]]) -> str | None:
        for words, meaning in phrases:
            if self.words[self.place : self.place + len(words)] == words:
                self.place += len(words)
                return meaning
        return None
