"""How well captions and scenes of the world can be matched at best: captions of one scene are true of others, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .claims import Claim, There, Total
from .grammar import read_caption
from .places import clearly_at, maybe_at
from .reading import Phrase
from .scenes import Scene, Thing


@dataclass(frozen=True)
class OracleRecall:
    """Expected recall at 1, in percent, of whoever knows exactly which captions fit which scenes, and guesses the rest.

    Attributes:
        text_at_1: a caption is chosen for each scene.
        image_at_1: a scene is chosen for each caption.
    """

    text_at_1: float
    image_at_1: float


def oracle_recall(captions: Sequence[Sequence[str]], scenes: Sequence[Scene]) -> OracleRecall:
    """The recall that the ambiguity of captions leaves.

    A caption that fits n scenes belongs to each of them with probability 1/n. For a scene the oracle takes the fitting
    caption that fits fewest scenes. It reads captions as those of `captions` are meant: a list names all things.

    Args:
        captions: those of each scene.
        scenes: as many.

    Raises:
        ValueError: for none, or another number of scenes than of lists of captions.
    """
    if not scenes or len(captions) != len(scenes):
        raise ValueError(f"`captions` must hold one list for each of `scenes`, got {len(captions)} for {len(scenes)}")
    texts = [caption for alike in captions for caption in alike]
    owners = np.repeat(np.arange(len(scenes)), [len(alike) for alike in captions])
    fits = fitting(texts, scenes, lists_are_complete=True)
    share = 1 / np.maximum(fits.sum(axis=1), 1)
    chosen = np.where(fits, share[:, None], 0.0).max(axis=0)
    return OracleRecall(100 * float(chosen.mean()), 100 * float((share * fits[np.arange(len(texts)), owners]).mean()))


def fitting(captions: Sequence[str], scenes: Sequence[Scene], *, lists_are_complete: bool = False) -> np.ndarray:
    """Which captions are true of which scenes, bool [captions, scenes], as `check_caption` says for each pair.

    Args:
        captions, scenes: any.
        lists_are_complete: a caption that lists things is true only where there are no others.
    """
    index = _Index(scenes)
    fits = np.zeros((len(captions), len(scenes)), dtype=bool)
    for row, caption in zip(fits, captions, strict=True):
        claims = read_caption(caption)
        if claims is None:
            continue
        if lists_are_complete:
            claims = _complete(claims)
        candidates = np.ones(len(scenes), dtype=bool)
        for claim in claims:
            if isinstance(claim, Total):
                candidates &= index.totals == claim.number
            for phrase in claim.phrases:
                candidates &= index.counted(phrase)
        for number in np.flatnonzero(candidates):
            row[number] = all(claim.holds(scenes[number]) for claim in claims)
    return fits


def _complete(claims: list[Claim]) -> list[Claim]:
    parts = [claim for claim in claims if isinstance(claim, There)]
    if not parts or (len(parts) == 1 and parts[0].relations):
        return claims
    number = sum(phrase.count or 1 for part in parts for phrase in part.phrases)
    return [*claims, Total("", "count", (), number, number)]


class _Index:
    """In which scenes a phrase speaks of the right number of things; kept for phrases that come again."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.totals = np.array([len(scene.things) for scene in scenes])
        self.owners = np.repeat(np.arange(len(scenes)), self.totals)
        self.things = [thing for scene in scenes for thing in scene.things]
        self.parts: dict[tuple, np.ndarray] = {}
        self.known: dict[Phrase, np.ndarray] = {}

    def counted(self, phrase: Phrase) -> np.ndarray:
        """`Phrase.counted` of each scene, bool [scenes]."""
        if phrase not in self.known:
            fits = np.ones(len(self.things), dtype=bool)
            for name, value in phrase.traits:
                fits &= self._part((name, value), lambda thing, name=name, value=value: getattr(thing, name) == value)
            possible = certain = fits
            if phrase.spot is not None:
                possible = fits & self._part(("maybe", phrase.spot), lambda thing: maybe_at(thing, phrase.spot))
                certain = fits & self._part(("clearly", phrase.spot), lambda thing: clearly_at(thing, phrase.spot))
            self.known[phrase] = phrase.agrees(self._sums(possible), self._sums(certain))
        return self.known[phrase]

    def _part(self, key: tuple[str, str], fits: Callable[[Thing], bool]) -> np.ndarray:
        if key not in self.parts:
            self.parts[key] = np.array([fits(thing) for thing in self.things])
        return self.parts[key]

    def _sums(self, fits: np.ndarray) -> np.ndarray:
        return np.bincount(self.owners, weights=fits, minlength=len(self.totals)).astype(int)
