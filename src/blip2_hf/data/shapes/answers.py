"""Answers questions about scenes by reading them: the truth for questions that were not made here, and a test of those.

Written apart from the makers of the questions; it shares with them only the words and the places.
"""

from __future__ import annotations

from .places import CLEAR, clear_field, offset
from .reading import Phrase, Reader, Unreadable
from .scenes import Scene, Thing
from .words import LARGER, NUMBERS, SMALLER

_NAMES = {"color": "colour", "shape": "shape", "size": "size", "texture": "texture"}


class _Unclear(Exception):
    """A reference to no thing or to several ones, or a relation that is not clear."""


def answer_question(question: str, scene: Scene) -> str | None:
    """The answer in the words of the world; None if the question is not of its grammar, or has no clear answer.

    Args:
        question: in the words of the world, with or without the question mark.
        scene: what the picture shows.
    """
    try:
        reader = Reader(question)
        answer = _answer(reader, scene)
        reader.end()
    except (Unreadable, _Unclear):
        return None
    return answer


def _answer(reader: Reader, scene: Scene) -> str:
    if reader.take("how many"):
        return _number(reader, scene)
    if reader.take("how large is", "how big is"):
        return _thing(reader, scene).size
    if reader.take("where is", "where in the picture is", "in which part of the picture is"):
        return _known(clear_field(_thing(reader, scene)))
    if reader.take("which is"):
        return _which(reader, scene)
    if reader.take("are there more"):
        first = reader.phrase(sorts=("bare",))
        reader.need("than")
        second = reader.phrase(sorts=("bare",))
        return _yes(len(first.possible(scene)) > len(second.possible(scene)))
    if reader.take("are there any"):
        return _yes(bool(reader.phrase(sorts=("bare",)).possible(scene)))
    if reader.take("is there", "do you see", "does the picture show"):
        return _yes(bool(reader.phrase(sorts=("some",)).possible(scene)))
    if reader.take("do"):
        return _same(reader, scene)
    if reader.take("is"):
        return _verified(reader, scene)
    reader.need("what", "which")
    return _property(reader, scene)


def _property(reader: Reader, scene: Scene) -> str:
    """After "what" or "which"."""
    name = reader.take(*_NAMES)
    if name is not None:
        if reader.take("does"):
            thing = _thing(reader, scene)
            reader.need("have")
        else:
            reader.need("is")
            thing = _beside(reader, scene) or _thing(reader, scene)
        return getattr(thing, _NAMES[name])
    reader.need("is")
    asked = reader.take(*(f"the {name} of" for name in _NAMES))
    if asked is not None:
        return getattr(_thing(reader, scene), _NAMES[asked.split()[1]])
    beside = _beside(reader, scene)
    return _thing(reader, scene).shape if beside is None else f"{beside.colour} {beside.shape}"


def _beside(reader: Reader, scene: Scene, among: list[Thing] | None = None) -> Thing | None:
    """The thing "above the star" if a relation comes next."""
    relation = reader.relation()
    if relation is None:
        return None
    anchor = _thing(reader, scene)
    things = [
        thing
        for thing in (scene.things if among is None else among)
        if thing is not anchor and offset(thing, relation, anchor) > 0
    ]
    if len(things) != 1 or offset(things[0], relation, anchor) < CLEAR:
        raise _Unclear
    return things[0]


def _thing(reader: Reader, scene: Scene) -> Thing:
    """The only thing that "the …" means; "the object above the star" is one, too."""
    phrase = reader.phrase(sorts=("the",))
    return _beside(reader, scene, phrase.possible(scene)) or _only(phrase, scene)


def _only(phrase: Phrase, scene: Scene) -> Thing:
    things = phrase.possible(scene)
    if len(things) != 1 or phrase.certain(scene) != things:
        raise _Unclear
    return things[0]


def _number(reader: Reader, scene: Scene) -> str:
    phrase = reader.phrase(sorts=("bare",))
    reader.need("are there", "can you see", "are in the picture")
    return NUMBERS[len(phrase.possible(scene))]


def _which(reader: Reader, scene: Scene) -> str:
    word = reader.need(*LARGER, *SMALLER)
    reader.need(",")
    first = _thing(reader, scene)
    reader.need("or")
    second = _thing(reader, scene)
    if first.size == second.size:
        raise _Unclear
    return (first if first.size == ("large" if word in LARGER else "small") else second).shape


def _same(reader: Reader, scene: Scene) -> str:
    first = _thing(reader, scene)
    reader.need("and")
    second = _thing(reader, scene)
    reader.need("have the same")
    name = _NAMES[reader.need(*_NAMES)]
    return _yes(getattr(first, name) == getattr(second, name))


def _verified(reader: Reader, scene: Scene) -> str:
    """After "is": "the star red", "the star large or small", "the star above the ring", …"""
    phrase = reader.phrase(sorts=("the",))
    thing = _only(phrase, scene)
    for either, relations in (
        ("to the left or to the right of", ("left", "right")),
        ("above or below", ("above", "below")),
    ):
        if reader.take(either):
            return _side(thing, relations, _thing(reader, scene))
    relation = reader.relation()
    if relation is not None:
        away = offset(thing, relation, _thing(reader, scene))
        if abs(away) < CLEAR:
            raise _Unclear
        return _yes(away > 0)
    word = reader.take(*LARGER, *SMALLER)
    if word is not None:
        reader.need("than")
        other = _thing(reader, scene)
        return _yes(thing.size != other.size and (thing.size == "large") == (word in LARGER))
    said = reader.next()
    trait = reader.trait()
    if trait is None:
        raise Unreadable
    if reader.take("or") is None:
        return _yes(getattr(thing, trait[0]) == trait[1])
    words = (said, reader.next())
    other = reader.trait()
    if other is None or other[0] != trait[0]:
        raise Unreadable
    values = dict(zip((trait[1], other[1]), words, strict=True))
    return _known(values.get(getattr(thing, trait[0])))


def _side(thing: Thing, relations: tuple[str, str], other: Thing) -> str:
    for relation in relations:
        if offset(thing, relation, other) >= CLEAR:
            return relation
    raise _Unclear


def _known(answer: str | None) -> str:
    if answer is None:
        raise _Unclear
    return answer


def _yes(so: bool) -> str:
    return "yes" if so else "no"
