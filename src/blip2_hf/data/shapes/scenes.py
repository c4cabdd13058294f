"""Scenes of the generated world: what is in a picture, before it is drawn or described.

A picture of `SIDE` pixels holds one to five things on a noisy background. A thing has a shape, a colour, one of two
sizes and one of two textures. Things may overlap a little: later ones lie on top, and at least `VISIBLE` of each is
seen. Every choice comes from the given generator.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from .outlines import OUTLINES, mask

SIDE = 96  # of a picture, in the pixels that `Thing` is measured in
SHAPES = tuple(OUTLINES)
COLOURS = {
    "red": (214, 30, 30),
    "yellow": (252, 218, 28),
    "green": (30, 160, 50),
    "cyan": (40, 214, 226),
    "blue": (36, 72, 228),
    "purple": (132, 36, 178),
    "pink": (255, 134, 192),
    "white": (250, 250, 250),
}
SIZES = {"small": (16, 18, 20), "large": (28, 30, 32, 34)}  # sides in pixels, even: a box ends at pixel edges
TEXTURES = ("plain", "striped")
MOST_THINGS = 5
VISIBLE = 0.8  # least share of a thing's pixels that no later thing covers

_COUNTS = (0.15, 0.28, 0.25, 0.18, 0.14)  # probabilities of one to five things
_ALIKE = 0.3  # probability that a thing takes the shape of an earlier one, and likewise its colour: things to count
_APART = 0.7  # least distance of two centres, in mean sides: nothing inside a ring
_GAP = 2  # pixels between the boxes of two things of one colour
_PLACES = 60  # to try for one thing
_MARGIN = 1  # pixels between a thing's box and the edge

COMBINATIONS = frozenset((shape, colour) for shape in SHAPES for colour in COLOURS)
HELD_OUT = frozenset(
    (shape, tuple(COLOURS)[(3 * number + 1) % len(COLOURS)]) for number, shape in enumerate(SHAPES)
)  # each shape once and each colour once, one combination in eight: never in a training scene
TRAINED = COMBINATIONS - HELD_OUT


@dataclass(frozen=True)
class Thing:
    """One thing of a scene.

    Attributes:
        shape, colour, size, texture: of `SHAPES`, `COLOURS`, `SIZES`, `TEXTURES`.
        x, y: centre in pixels of a picture of `SIDE`, from its left and from its top.
        side: of the box around it, in the same pixels; one of `SIZES[size]`.

    Raises:
        ValueError: an unknown attribute, a side that is not of the size, a box that leaves the picture.
    """

    shape: str
    colour: str
    size: str
    texture: str
    x: int
    y: int
    side: int

    def __post_init__(self) -> None:
        for name, known in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("texture", TEXTURES)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {tuple(known)}, got {getattr(self, name)!r}")
        if self.side not in SIZES[self.size]:
            raise ValueError(f"`side` of a {self.size} thing must be one of {SIZES[self.size]}, got {self.side!r}")
        for name in ("x", "y"):
            if not self.side / 2 <= getattr(self, name) <= SIDE - self.side / 2:
                raise ValueError(f"`{name}` must keep a box of {self.side} inside {SIDE}, got {getattr(self, name)!r}")

    @property
    def combination(self) -> tuple[str, str]:
        return self.shape, self.colour


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        things: from the lowest to the topmost, at least one and at most `MOST_THINGS`.
        background: seed of the noise behind them, not negative.

    Raises:
        ValueError: no thing or too many, a negative seed.
    """

    things: tuple[Thing, ...]
    background: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.things) <= MOST_THINGS:
            raise ValueError(f"`things` must be 1 to {MOST_THINGS}, got {len(self.things)}")
        if self.background < 0:
            raise ValueError(f"`background` must not be negative, got {self.background}")


def draw_scene(
    rng: np.random.Generator,
    *,
    allowed: Collection[tuple[str, str]] | None = None,
    needed: Collection[tuple[str, str]] | None = None,
) -> Scene:
    """A scene drawn at random.

    Args:
        rng: where every choice comes from.
        allowed: (shape, colour) combinations that things may have; None: `TRAINED`, all but those held out.
        needed: combinations of which at least one thing has one; None: no such wish. They need not be in `allowed`.

    Raises:
        ValueError: no combination or an unknown one.
    """
    choices = _checked(TRAINED if allowed is None else allowed, "allowed")
    count = 1 + int(rng.choice(len(_COUNTS), p=_COUNTS))
    special = None if needed is None else (int(rng.integers(count)), _checked(needed, "needed"))
    things: list[Thing] = []
    owners = np.full((SIDE, SIDE), -1, dtype=np.int8)
    areas: list[int] = []
    for number in range(count):
        pool = choices if special is None or special[0] != number else special[1]
        shape, colour = _combination(rng, pool, things)
        thing = _placed(rng, shape, colour, things, owners, areas)
        if thing is None:  # no room: the scene has fewer things
            if special is None or special[0] < number:
                break
            return draw_scene(rng, allowed=allowed, needed=needed)
        things.append(thing)
    return Scene(tuple(things), int(rng.integers(2**31)))


def _checked(combinations: Collection[tuple[str, str]], name: str) -> list[tuple[str, str]]:
    if not combinations or not COMBINATIONS.issuperset(combinations):
        unknown = sorted(set(combinations) - COMBINATIONS)
        raise ValueError(f"`{name}` must hold (shape, colour) combinations of the world, got {unknown or 'none'}")
    return sorted(combinations)  # a set's order is not the same in each process


def _combination(rng: np.random.Generator, choices: list[tuple[str, str]], things: list[Thing]) -> tuple[str, str]:
    if things:
        like = things[int(rng.integers(len(things)))]
        same_shape, same_colour = rng.random(2) < _ALIKE
        alike = [
            (shape, colour)
            for shape, colour in choices
            if (not same_shape or shape == like.shape) and (not same_colour or colour == like.colour)
        ]
        choices = alike or choices
    return choices[int(rng.integers(len(choices)))]


def _placed(
    rng: np.random.Generator,
    shape: str,
    colour: str,
    things: list[Thing],
    owners: np.ndarray,
    areas: list[int],
) -> Thing | None:
    """A thing on a free place, drawn into `owners` (what each pixel shows) and `areas` (pixels of each thing)."""
    size = ("small", "large")[int(rng.integers(2))]
    texture = TEXTURES[int(rng.integers(2))]
    side = SIZES[size][int(rng.integers(len(SIZES[size])))]
    half = side // 2
    inside = mask(shape, side, 0, 0, None)[0] > 127
    for x, y in rng.integers(half + _MARGIN, SIDE - half - _MARGIN + 1, size=(_PLACES, 2)).tolist():
        if any(_too_near(t, colour, x, y, side) for t in things):
            continue
        box = owners[y - half : y + half, x - half : x + half]
        after = np.where(inside, np.int8(len(things)), box)
        if things and not _all_visible(owners, box, after, areas):
            continue
        box[:] = after
        areas.append(int(inside.sum()))
        return Thing(shape, colour, size, texture, x, y, side)
    return None


def _too_near(other: Thing, colour: str, x: int, y: int, side: int) -> bool:
    """Whether centres are too near, or boxes of one colour touch: their outlines would run into one another."""
    across, down, mean = abs(x - other.x), abs(y - other.y), (side + other.side) / 2
    return across**2 + down**2 < (_APART * mean) ** 2 or (colour == other.colour and max(across, down) < mean + _GAP)


def _all_visible(owners: np.ndarray, box: np.ndarray, after: np.ndarray, areas: list[int]) -> bool:
    for number, area in enumerate(areas):
        lost = np.count_nonzero(box == number) - np.count_nonzero(after == number)
        if lost and np.count_nonzero(owners == number) - lost < VISIBLE * area:
            return False
    return True
