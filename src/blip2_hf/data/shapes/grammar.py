"""Checks captions against scenes: reads every statement of a caption and says whether it is true.

The grammar is that of `captions`, somewhat wider, and written without it:

    caption   := [frame] list | clause {("and" | ", while") (clause | rest)} | "there are more" things "than" things
    frame     := "there is" | "the picture shows" | "you can see" | ..., each with or without "only"
    list      := [number "objects" ","] item {("," | "and" | "with") item} ["and nothing else"]
    item      := thing [["is"] relation ["and" relation] thing | "is" (adjectives | place)]
    clause    := subject "is" rest | thing "and" thing "are the same size"
    rest      := adjectives | place | relation thing | "larger than" thing | "as large as" thing | ...

A number claims that there are so many and no more; "a" claims that there is one at least; "the" that there is one
only; the things of a list are different ones; "only", "nothing else" and "three objects, ..." claim that nothing is
missing. What can not be read is not true.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .claims import Claim, Compared, Has, More, Related, Some, There, Together, Total
from .reading import Phrase, Reader, Unreadable
from .scenes import Scene
from .words import LARGER, NUMBERS, SIZE_WORDS, SMALLER

_PROMPTS = ("a photo of", "a picture of")
_SHOWS = ("the picture shows", "this picture shows", "you can see")
_HERE = ("in the picture", "in this picture")
_SAME = {"size": "size", "color": "colour", "shape": "shape", "texture": "texture"}


@dataclass(frozen=True)
class Statement:
    """A part of a caption, what sort of claim it is (see `claims.Claim`), and whether it is true."""

    text: str
    kind: str
    true: bool


@dataclass(frozen=True)
class CaptionCheck:
    """What a caption says of a scene.

    Attributes:
        parsed: whether the caption is of the world's grammar.
        statements: what it states; none if it is not parsed.
        true: whether it is parsed and every statement is true.
    """

    parsed: bool
    statements: list[Statement]
    true: bool


def check_caption(caption: str, scene: Scene) -> CaptionCheck:
    """Every statement of `caption`, and whether it is true of `scene`.

    Args:
        caption: lower or upper case, with or without "a photo of" and a full stop.
        scene: what the picture shows.
    """
    claims = read_caption(caption)
    if claims is None:
        return CaptionCheck(False, [], False)
    statements = [Statement(claim.text, claim.kind, claim.holds(scene)) for claim in claims]
    return CaptionCheck(True, statements, all(statement.true for statement in statements))


def read_caption(caption: str) -> list[Claim] | None:
    """The claims of `caption`; None if it is not of the world's grammar."""
    try:
        reader = Reader(caption)
        reader.take(*_PROMPTS)
        claims = _caption(reader)
        reader.end()
    except Unreadable:
        return None
    return claims


def _caption(reader: Reader) -> list[Claim]:
    start = reader.place
    if reader.take("there are more"):
        first = reader.phrase(sorts=("bare",))
        reader.need("than")
        second = reader.phrase(sorts=("bare",))
        reader.take(*_HERE)
        return [More(reader.since(start), "comparison", (first, second))]
    frame = reader.take("there is", "there are", *_SHOWS)
    if frame is None and reader.next() in ("the", "both", "all"):
        return _clauses(reader)
    only = reader.take("only") is not None
    here = reader.place
    claims = _list(reader, only)
    if frame in ("there is", "there are"):
        word = reader.words[here]
        if (frame == "there is") != (word in ("a", "an", "one")):
            raise Unreadable(reader.since(start))
    return claims


def _list(reader: Reader, only: bool) -> list[Claim]:
    start = reader.place
    number = _header(reader)
    head = reader.since(start).rstrip(",")
    if number is not None:
        shared = _some(reader)
        if shared is not None:
            return [Total(head, "count", (), number, number), shared]
    parts = [_item(reader)]
    nothing_else = False
    while not nothing_else and _connected(reader):
        nothing_else = reader.take("nothing else") is not None
        if not nothing_else:
            parts.append(_item(reader))
    reader.take(*_HERE)
    claims: list[Claim] = list(parts)
    text = reader.since(start)
    if len(parts) > 1:
        claims.append(Together(text, "count", (), tuple(parts)))
    listed = sum(phrase.count or 1 for part in parts for phrase in part.phrases)
    if number is not None:
        claims.append(Total(head, "count", (), number, listed))
    elif only or nothing_else:
        claims.append(Total(text, "count", (), listed, listed))
    return claims


def _header(reader: Reader) -> int | None:
    """ "three objects," before what they are."""
    start = reader.place
    for number, word in enumerate(NUMBERS[1:], start=1):
        if reader.take(f"{word} object{'s' if number > 1 else ''}"):
            reader.take(*_HERE)
            if reader.take(","):
                return number
    reader.place = start
    return None


def _some(reader: Reader) -> Some | None:
    """ "two of them striped" """
    start = reader.place
    word = reader.take(*(f"{number} of them" for number in ("all", "both", *NUMBERS[1:])))
    if word is None:
        return None
    reader.take("are", "is")
    traits = _adjectives(reader)
    number = None if word.startswith(("all", "both")) else NUMBERS.index(word.split()[0])
    return Some(reader.since(start), "count", (), number, traits)


def _item(reader: Reader) -> There:
    start = reader.place
    first = reader.phrase(sorts=("some", "number"))
    kind = "count" if first.sort == "number" else "existence"
    copula = reader.take("is" if first.count == 1 else "are")
    relations = reader.relations()
    if not relations:
        if copula:
            first = _with(reader, first)
        return There(reader.since(start), kind, (first,))
    second = reader.phrase(sorts=("some", "number", "the"))
    return There(reader.since(start), "relation", (first, second), relations)


def _with(reader: Reader, phrase: Phrase) -> Phrase:
    """`phrase` with the place or the adjectives that come next: "is in the middle", "is large and red"."""
    spot = reader.spot()
    traits = () if spot is not None else _adjectives(reader)
    if (spot and phrase.spot) or {name for name, _ in traits} & {name for name, _ in phrase.traits}:
        raise Unreadable(" ".join(reader.words))
    return replace(phrase, traits=tuple(sorted([*phrase.traits, *traits])), spot=spot or phrase.spot)


def _connected(reader: Reader) -> bool:
    comma = reader.take(",")
    word = reader.take("and", "with", "while")
    return bool(comma or word)


def _clauses(reader: Reader) -> list[Claim]:
    claims: list[Claim] = []
    subject: Phrase | None = None
    while not claims or _connected(reader):
        start = reader.place
        if subject is None or reader.next() in ("the", "both", "all"):
            subject = reader.phrase(sorts=("the", "all"))
            reader.take(*_HERE)
            if subject.sort == "the" and reader.take("and"):
                claims.append(_alike(reader, start, subject))
                subject = None
                continue
            reader.need("is" if subject.sort == "the" else "are")
        else:
            reader.take("is" if subject.sort == "the" else "are")
        claims.append(_predicate(reader, start, subject))
    return claims


def _alike(reader: Reader, start: int, subject: Phrase) -> Claim:
    other = reader.phrase(sorts=("the",))
    reader.need("are the same", "have the same")
    name = _SAME[reader.need(*_SAME)]
    return Compared(reader.since(start), "comparison", (subject, other), name)


def _predicate(reader: Reader, start: int, subject: Phrase) -> Claim:
    """What is said of `subject`, which was read from `start` on."""
    spot = reader.spot()
    if spot is not None:
        return Has(reader.since(start), "position", (subject,), (), spot)
    relations = reader.relations()
    if relations:
        other = reader.phrase(sorts=("the", "some"))
        return Related(reader.since(start), "relation", (subject, other), relations)
    compared = reader.take(*LARGER, *SMALLER, "as", "the same")
    if compared is None:
        traits = _adjectives(reader)
        return Has(reader.since(start), "attribute", (subject,), traits)
    return _comparison(reader, start, subject, compared)


def _comparison(reader: Reader, start: int, subject: Phrase, word: str) -> Compared:
    name, size, same = "size", None, False
    if word in LARGER or word in SMALLER:
        size = "large" if word in LARGER else "small"
        reader.need("than")
    elif word == "as":
        adjective = reader.need(*(adjective for words in SIZE_WORDS.values() for adjective in words))
        size = next(size for size, words in SIZE_WORDS.items() if adjective in words)
        same = True
        reader.need("as")
    else:
        name, same = _SAME[reader.need(*_SAME)], True
        reader.need("as")
    other = reader.phrase(sorts=("the",))
    return Compared(reader.since(start), "comparison", (subject, other), name, size, same)


def _adjectives(reader: Reader) -> tuple[tuple[str, str], ...]:
    """ "large", "large and red", "large, red and striped". A comma or "and" before anything else stays unread."""
    traits: dict[str, str] = {}
    while True:
        trait = reader.trait()
        if trait is None or trait[0] in traits:
            raise Unreadable(" ".join(reader.words))
        traits.update([trait])
        place = reader.place
        if not reader.take(",", "and"):
            break
        after = reader.place
        if reader.trait() is None:
            reader.place = place
            break
        reader.place = after
    return tuple(sorted(traits.items()))
