"""Rows of the rename tables: what their files call a tensor, what we call it, and what happens in between.

Placeholders in names: `{n}` a layer number, `{p}` weight or bias, `{qv}` q or v, `{qkv}` q, k or v, `{rest}` anything.
Of several rows that explain a name the first counts, so that a table may end with a row for everything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Literal

# Where a tensor comes from: the checkpoint that is converted, the tower's own file, the language model's own files.
Source = Literal["bridge", "tower", "llm"]


class Relation(Enum):
    """What happens to a tensor between the two names."""

    RENAMED = "the same tensor under the other name"
    VOCABULARY = "the same rows; there may be more of them on one side, for tokens that were added"
    RESHAPED = "the same number: a scalar there, [1] here"
    MERGED = "biases of queries and values there, one vector with zeros for the keys between them here"
    SPLIT = "queries, keys and values in one tensor there, in three here"
    TIED = "a second name of a tensor: checked and dropped, made again on the way back where their files have it"
    BUFFER = "no parameter: checked and dropped on the way to us, generated on the way back"
    DROPPED = "on one side only: dropped there, on the other side generated or left out"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        theirs: name or names there; None where they have none.
        ours: name or names here; None where we have none.
        how: what else is done.
        why: the reason, where something is dropped, generated, merged or repeated.
        source: which of the files has their name.
        language: "opt" or "t5" where only models with that language model have the name.
        tied_to: for TIED: our name of the tensor whose second name this is; for BUFFER: of the one with its length.
        needs: for TIED and BUFFER: our tensor with which their files have this name, too; None: they never have.
        alone: for TIED: whether it may be there without the tensor that it is tied to; it then keeps its name.
        fill: for DROPPED without `theirs`: the number that ours is filled with; None: ours is left out.
    """

    theirs: str | None
    ours: str | None
    how: Relation = Relation.RENAMED
    why: str = ""
    source: Source = "bridge"
    language: str | None = None
    tied_to: str | None = None
    needs: str | None = None
    alone: bool = False
    fill: float | None = None


Table = tuple[Row, ...]

_PLACEHOLDERS = {"n": r"\d+", "p": "weight|bias", "qv": "q|v", "qkv": "q|k|v", "rest": ".+"}


@cache
def _pattern(names: str) -> re.Pattern:
    expression = re.escape(names)
    for placeholder, values in _PLACEHOLDERS.items():
        expression = expression.replace(rf"\{{{placeholder}\}}", f"(?P<{placeholder}>{values})")
    return re.compile(expression)


def read(names: str | None, name: str) -> dict[str, str] | None:
    """The placeholders' values if `name` is one of `names` (a cell of a table), else None."""
    if names is None or not name.startswith(names.partition("{")[0]):  # most rows, at no cost
        return None
    match = _pattern(names).fullmatch(name)
    return None if match is None else match.groupdict()


def listed(names: Iterable[str]) -> str:
    """All names, those that differ in their numbers only as one: "blocks.{0…38}.norm1.weight"."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "{}", name), []).append(
            tuple(re.findall(r"(?<=\.)(\d+)(?=\.)", name))
        )
    texts = []
    for form, numbers in groups.items():
        if len(numbers) == 1 or form.count("{}") != 1:
            texts += [form.format(*values) for values in numbers]
        else:
            values = sorted(int(value) for (value,) in numbers)
            whole = values == list(range(values[0], values[-1] + 1))
            texts.append(
                form.format("{" + (f"{values[0]}…{values[-1]}" if whole else ", ".join(map(str, values))) + "}")
            )
    return ", ".join(texts)
