"""Where a thing is in the picture, and how two things lie to each other.

Both are matters of degree. Writers of captions and questions say it only where it is clear; readers also let it pass
a few pixels beyond that, so that nobody is called wrong over a pixel.
"""

from __future__ import annotations

from .scenes import SIDE, Thing

# Columns and rows: the centres of things lie between about 1/10 and 9/10 of the side, so thirds of that.
_LOW, _HIGH = SIDE * 3 / 8, SIDE * 5 / 8
_UNCLEAR = SIDE / 32  # px on either side of these lines where writers name neither part
_PASSES = SIDE / 16  # px beyond these lines that readers let pass
_PARTS = {  # column and row; None: any
    "top left": ("left", "top"),
    "top": (None, "top"),
    "top right": ("right", "top"),
    "left": ("left", None),
    "middle": ("middle", "middle"),
    "right": ("right", None),
    "bottom left": ("left", "bottom"),
    "bottom": (None, "bottom"),
    "bottom right": ("right", "bottom"),
}

CLEAR = 15  # px between two centres on an axis from which on writers say "left of", "above", …
_RELATED = 10  # px from which on readers accept it


def offset(thing: Thing, relation: str, other: Thing) -> float:
    """How far the centre of `thing` lies to the side `relation` of `other`'s, in pixels; negative: opposite side.

    Args:
        relation: "left", "right", "above" or "below".
    """
    return {
        "left": other.x - thing.x,
        "right": thing.x - other.x,
        "above": other.y - thing.y,
        "below": thing.y - other.y,
    }[relation]


def clearly_related(thing: Thing, relation: str, other: Thing) -> bool:
    """Whether a writer may say that `thing` is `relation` (of) `other`."""
    return offset(thing, relation, other) >= CLEAR


def maybe_related(thing: Thing, relation: str, other: Thing) -> bool:
    """Whether a reader accepts it."""
    return offset(thing, relation, other) >= _RELATED


def clearly_at(thing: Thing, spot: str) -> bool:
    """Whether a writer may say that `thing` is at `spot`, a key of `SPOT_PHRASES`; "left" is any row of the left."""
    return _at(thing, spot, -_UNCLEAR)


def maybe_at(thing: Thing, spot: str) -> bool:
    """Whether a reader accepts that `thing` is at `spot`."""
    return _at(thing, spot, _PASSES)


def clear_field(thing: Thing) -> str | None:
    """The one of the nine fields in which `thing` clearly is; None between two of them."""
    for spot, (column, row) in _PARTS.items():
        if _in(thing.x, column or "middle", -_UNCLEAR) and _in(thing.y, row or "middle", -_UNCLEAR):
            return spot
    return None


def _at(thing: Thing, spot: str, slack: float) -> bool:
    column, row = _PARTS[spot]
    return (column is None or _in(thing.x, column, slack)) and (row is None or _in(thing.y, row, slack))


def _in(place: float, part: str, slack: float) -> bool:
    if part == "middle":
        return _LOW - slack <= place <= _HIGH + slack
    return place <= _LOW + slack if part in ("left", "top") else place >= _HIGH - slack
