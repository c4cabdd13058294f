"""The engine of the conversion: from a table and the shapes of all tensors to one step per target tensor.

A plan is made from names, shapes and dtypes alone, so it can be printed, checked and costed before a file is read; then
each step reads its inputs and makes one tensor, which bounds the memory. Inputs are named with the file they are in:
"bridge:query_tokens" (the checkpoint that is converted), "tower:blocks.0.norm1.weight", "llm:model.norm.weight".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import torch

from .rows import Relation, Row, Table, listed, read
from .tensor_values import equal, mean_row

Direction = Literal["to_ours", "from_ours"]
Get = Callable[[str], torch.Tensor]

BERT_POSITIONS = 512


class How(Enum):
    """How a target tensor comes about."""

    RENAMED = "renamed"
    RESHAPED = "reshaped"
    MERGED = "merged, zeros for the keys between"
    PARTED = "one of three parts"
    JOINED = "three parts in one"
    GROWN = "rows for added tokens, each the mean of all rows"
    CUT = "without the rows of added tokens"
    COUNTED = "generated: 0, 1, 2, …"
    FILLED = "generated: one number"


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Step:
    """How one target tensor comes about.

    Attributes:
        target: its name in the target.
        inputs: names of what it is made of, with their sources ("bridge:…", "tower:…", "llm:…").
        how: what is done with them.
        shape, dtype: of the result. The dtype is that of the first input (float32 if filled, int64 if counted).
        part: for PARTED: which of the three equal parts along the first axis.
        fill: for FILLED: the number.
    """

    target: str
    inputs: tuple[str, ...]
    how: How
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: int = 0
    fill: float = 0.0

    @property
    def nbytes(self) -> int:
        return TensorInfo(self.shape, self.dtype).nbytes


@dataclass(frozen=True)
class Check:
    """A source tensor that is dropped because its values are known: they must be what `step` makes.

    With a different number of rows (a grown vocabulary) the common ones are compared; of two precisions the coarser
    one counts.
    """

    name: str
    step: Step


@dataclass(frozen=True)
class Target:
    """The tensors that a target must have, e.g. those of a model on the meta device.

    Attributes:
        infos: shape and dtype by name.
        tied: second names of tensors, which files need not hold, and their first names.
    """

    infos: Mapping[str, TensorInfo]
    tied: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Conversion:
    """All that happens to the tensors.

    Attributes:
        steps: one per tensor of the target, in the order of the source.
        dropped: source tensors (with their source) that the target does not get, and why.
        generated: target tensors that no source has, and what they are.
        tied: second names in the target, and the step's target that they are; files hold a tensor once.
        absent: target tensors that are left out because nothing is known of them, and why.
        checks: values on which dropping rests; see `check`.
    """

    steps: list[Step] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    generated: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)


def plan(
    table: Table,
    infos: Mapping[str, TensorInfo],
    direction: Direction,
    target: Target | None = None,
    vocabulary: int | None = None,
    positions: int = BERT_POSITIONS,
) -> Conversion:
    """The conversion of all tensors in `infos`; every name of either side is accounted for.

    Args:
        table: rows of "theirs" and "ours", those of all sources together.
        infos: shape and dtype by name with source ("bridge:…", "tower:…", "llm:…"); from ours only "bridge:…".
        direction: "to_ours" or "from_ours".
        target: what the result must have: then missing tensors and other shapes are errors, too, the vocabulary grows
            to the target's, and what can be generated is. None: no more than the sources give.
        vocabulary: "from_ours": rows of the language model's vocabulary there, if ours has more (for the placeholder).
        positions: "from_ours": length of the buffer of positions where there are no position embeddings (stage 2).

    Raises:
        ValueError: listing the names that no row explains, target tensors that nothing becomes, other shapes; naming
            a tensor that lacks its counterpart.
    """
    if direction == "to_ours":
        conversion = _to_ours(table, infos, target)
    elif direction == "from_ours":
        conversion = _from_ours(table, infos, vocabulary, positions)
    else:
        raise ValueError(f"`direction` must be 'to_ours' or 'from_ours', got {direction!r}")
    if target is not None:
        _fit(conversion, table, target)
    return conversion


def apply(step: Step, get: Get) -> torch.Tensor:
    """The tensor that `step` makes; `get` reads one by its name with source. Works on the meta device.

    The result may share memory with what `get` returned.

    Raises:
        ValueError: if an input is not of the shape that was planned with.
    """
    if step.how is How.COUNTED:
        return torch.arange(step.shape[-1])[None]
    if step.how is How.FILLED:
        return torch.full(step.shape, step.fill, dtype=step.dtype)
    tensors = [get(name) for name in step.inputs]
    first = tensors[0]
    if step.how is How.MERGED:
        made = torch.cat([first, torch.zeros_like(first), tensors[1]])
    elif step.how is How.JOINED:
        made = torch.cat(tensors)
    elif step.how is How.PARTED:
        made = first.chunk(3)[step.part].clone()
    elif step.how is How.GROWN:
        new = step.shape[0] - len(first)
        made = torch.cat([first, mean_row(first).expand(new, *first.shape[1:])])
    elif step.how is How.CUT:
        made = first[: step.shape[0]].clone()
    else:
        made = first.reshape(step.shape) if step.how is How.RESHAPED else first
    if tuple(made.shape) != step.shape:
        raise ValueError(f"{step.target!r} must have shape {step.shape}, but {step.inputs} give {tuple(made.shape)}")
    return made


def check(rule: Check, get: Get) -> None:
    """Compares the values on which dropping a tensor rests; on the meta device the shapes only.

    Raises:
        ValueError: if they differ, so that something would be lost.
    """
    found, expected = get(rule.name), apply(rule.step, get)
    what = "0, 1, 2, …" if rule.step.how is How.COUNTED else bare(rule.step.inputs[0])
    rows = min(len(found), len(expected)) if found.ndim else None
    same = found.shape[1:] == expected.shape[1:]
    if same and not (found.is_meta or expected.is_meta):
        same = equal(found[:rows], expected[:rows]) if rows is not None else torch.equal(found, expected)
    if not same:
        raise ValueError(f"{bare(rule.name)!r} must be equal to {what}, and is not: it would be lost")


def bare(name: str) -> str:
    """A name without its source."""
    return name.split(":", 1)[1]


# -- to ours -----------------------------------------------------------------------------------------------------------


def _to_ours(table: Table, infos: Mapping[str, TensorInfo], target: Target | None) -> Conversion:
    conversion = Conversion()
    made: dict[str, Step] = {}
    tied: list[tuple[str, Row, dict[str, str]]] = []
    unexplained = []
    for name in sorted(infos, key=lambda name: not name.startswith("bridge:")):  # it has the last word
        source, plain = name.split(":", 1)
        row, values = _first_row((row for row in table if row.source == source), "theirs", plain)
        if row is None:
            unexplained.append(_said(name))
        elif row.how is Relation.TIED:
            tied.append((name, row, values))
        elif row.how is Relation.BUFFER:
            shape = infos[name].shape
            conversion.checks.append(Check(name, Step(plain, (), How.COUNTED, shape, torch.int64)))
            conversion.dropped[name] = row.why
        elif row.ours is None:
            conversion.dropped[name] = row.why
        else:
            for step in _steps_to_ours(name, row, values, infos, target):
                other = made.get(step.target)
                if other is None:
                    made[step.target] = step
                elif _source(other.inputs[0]) == source:
                    raise ValueError(f"{plain!r} would become {step.target!r}, which another key became already")
                else:
                    conversion.dropped |= dict.fromkeys(step.inputs, "the checkpoint that is converted has its own")
    if unexplained:
        raise ValueError(f"{len(unexplained)} keys of the source are not in the table: {listed(unexplained)}")
    for name, row, values in tied:
        if row.tied_to in made:
            conversion.checks.append(Check(name, made[row.tied_to]))
            conversion.dropped[name] = row.why
            if row.ours is not None:
                conversion.tied[row.ours.format(**values)] = row.tied_to
        elif row.alone:
            step = _renamed(name, row.ours.format(**values), infos, target)
            made[step.target] = step
        else:
            raise ValueError(f"{_their_name(table, row.tied_to)!r} is missing, which {bare(name)!r} needs")
    conversion.steps = list(made.values())
    return conversion


def _steps_to_ours(
    name: str, row: Row, values: dict[str, str], infos: Mapping[str, TensorInfo], target: Target | None
) -> Iterator[Step]:
    info = infos[name]
    ours = row.ours.format(**{"qkv": "{qkv}"} | values) if row.how is Relation.SPLIT else row.ours.format(**values)
    if row.how is Relation.MERGED:
        pair = [_required(f"{_source(name)}:{row.theirs.format(**values | {'qv': qv})}", infos, name) for qv in "qv"]
        if values["qv"] == "q":
            yield Step(ours, tuple(pair), How.MERGED, (3 * info.shape[0],), info.dtype)
    elif row.how is Relation.SPLIT:
        third = _third(name, info)
        for part, qkv in enumerate("qkv"):
            yield Step(ours.format(qkv=qkv), (name,), How.PARTED, third, info.dtype, part=part)
    elif row.how is Relation.RESHAPED:
        yield _reshaped(name, ours, info, (1,))
    elif row.how is Relation.VOCABULARY:
        yield _renamed(name, ours, infos, target)
    else:
        yield Step(ours, (name,), How.RENAMED, info.shape, info.dtype)


def _renamed(name: str, ours: str, infos: Mapping[str, TensorInfo], target: Target | None) -> Step:
    """A table of the vocabulary, with more rows where the target has more."""
    info, wanted = infos[name], None if target is None else target.infos.get(ours)
    if wanted is not None and wanted.shape[1:] == info.shape[1:] and wanted.shape[0] > info.shape[0]:
        return Step(ours, (name,), How.GROWN, wanted.shape, info.dtype)
    return Step(ours, (name,), How.RENAMED, info.shape, info.dtype)


# -- from ours ---------------------------------------------------------------------------------------------------------


def _from_ours(table: Table, infos: Mapping[str, TensorInfo], vocabulary: int | None, positions: int) -> Conversion:
    conversion = Conversion()
    made: dict[str, Step] = {}
    unexplained = []
    for name in infos:
        row, values = _first_row(table, "ours", bare(name))
        if row is None:
            unexplained.append(bare(name))
        elif row.how is Relation.TIED and _bridge(row.tied_to) in infos:
            shape = _rows_kept(row.tied_to, infos, vocabulary)
            conversion.checks.append(Check(name, _kept(row.theirs, row.tied_to, infos, shape)))
            conversion.dropped[name] = row.why
        elif row.how is Relation.TIED and not row.alone:
            raise ValueError(f"{row.tied_to!r} is missing, which {bare(name)!r} needs")
        elif row.theirs is None:
            conversion.dropped[name] = row.why
        else:
            for step in _steps_from_ours(name, row, values, infos, vocabulary):
                made[step.target] = step
    if unexplained:
        raise ValueError(f"{len(unexplained)} keys of ours are not in the table: {listed(unexplained)}")
    for row in table:
        if row.needs is None or _bridge(row.needs) not in infos:
            continue
        if row.how is Relation.BUFFER:
            known = infos.get(_bridge(row.tied_to))
            count = positions if known is None else known.shape[0]
            made[row.theirs] = Step(row.theirs, (), How.COUNTED, (1, count), torch.int64)
            conversion.generated[row.theirs] = row.why
        else:
            _required(_bridge(row.tied_to), infos, _bridge(row.ours or row.needs))
            made[row.theirs] = _kept(row.theirs, row.tied_to, infos, _rows_kept(row.tied_to, infos, vocabulary))
    conversion.steps = list(made.values())
    return conversion


def _steps_from_ours(
    name: str, row: Row, values: dict[str, str], infos: Mapping[str, TensorInfo], vocabulary: int | None
) -> Iterator[Step]:
    info = infos[name]
    if row.how is Relation.MERGED:
        third = _third(name, info)
        for qv, part in (("q", 0), ("v", 2)):
            yield Step(row.theirs.format(qv=qv, **values), (name,), How.PARTED, third, info.dtype, part=part)
    elif row.how is Relation.SPLIT:
        parts = [_required(_bridge(row.ours.format(**values | {"qkv": qkv})), infos, name) for qkv in "qkv"]
        if values["qkv"] == "q":
            whole = (3 * info.shape[0], *info.shape[1:])
            yield Step(row.theirs.format(**values), tuple(parts), How.JOINED, whole, info.dtype)
    elif row.how is Relation.RESHAPED:
        yield _reshaped(name, row.theirs.format(**values), info, ())
    elif row.how is Relation.VOCABULARY:
        yield _kept(row.theirs.format(**values), bare(name), infos, _rows_kept(bare(name), infos, vocabulary))
    else:
        yield Step(row.theirs.format(**values), (name,), How.RENAMED, info.shape, info.dtype)


def _rows_kept(ours: str, infos: Mapping[str, TensorInfo], vocabulary: int | None) -> tuple[int, ...]:
    rows, *rest = infos[_bridge(ours)].shape
    added = vocabulary is not None and ours.startswith("language_model.")
    return (min(rows, vocabulary) if added else rows, *rest)


def _kept(theirs: str, ours: str, infos: Mapping[str, TensorInfo], shape: tuple[int, ...]) -> Step:
    info = infos[_bridge(ours)]
    how = How.RENAMED if shape == info.shape else How.CUT
    return Step(theirs, (_bridge(ours),), how, shape, info.dtype)


# -- both --------------------------------------------------------------------------------------------------------------


def _fit(conversion: Conversion, table: Table, target: Target) -> None:
    """Adds what can be generated, and compares names and shapes with the target's."""
    steps = {step.target: step for step in conversion.steps}
    missing = []
    for name, info in target.infos.items():
        if name in steps or name in conversion.tied:
            continue
        row, _ = _first_row((row for row in table if row.theirs is None), "ours", name)
        if target.tied.get(name) in steps:
            conversion.tied[name] = target.tied[name]
        elif row is None:
            missing.append(name)
        elif row.fill is None:
            conversion.absent[name] = row.why
        else:
            conversion.generated[name] = f"{row.fill:g}: {row.why}"
            steps[name] = Step(name, (), How.FILLED, info.shape, torch.float32, fill=row.fill)
            conversion.steps.append(steps[name])
    conversion.tied = {second: first for second, first in conversion.tied.items() if second in target.infos}
    surplus = [name for name in steps if name not in target.infos]
    shapes = [
        f"{name} {list(step.shape)} instead of {list(target.infos[name].shape)}"
        for name, step in steps.items()
        if name in target.infos and step.shape != target.infos[name].shape
    ]
    kinds = {"which no source has": missing, "that the target has no place for": surplus, "of another shape": shapes}
    problems = [f"{len(names)} keys {kind}: {listed(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError("; ".join(problems))


def _first_row(rows: Iterable[Row], side: str, name: str) -> tuple[Row | None, dict[str, str]]:
    for row in rows:
        values = read(getattr(row, side), name)
        if values is not None:
            return row, values
    return None, {}


def _their_name(table: Table, ours: str) -> str:
    return next((row.theirs for row in table if row.ours == ours and row.theirs is not None), ours)


def _required(name: str, infos: Mapping[str, TensorInfo], because_of: str) -> str:
    if name not in infos:
        raise ValueError(f"{bare(name)!r} is missing, which {bare(because_of)!r} needs")
    return name


def _third(name: str, info: TensorInfo) -> tuple[int, ...]:
    if not info.shape or info.shape[0] % 3:
        raise ValueError(f"{bare(name)!r} must have three equal parts, got shape {info.shape}")
    return (info.shape[0] // 3, *info.shape[1:])


def _reshaped(name: str, other: str, info: TensorInfo, shape: tuple[int, ...]) -> Step:
    if torch.Size(info.shape).numel() != 1:
        raise ValueError(f"{bare(name)!r} must hold one number, got shape {info.shape}")
    return Step(other, (name,), How.RESHAPED, shape, info.dtype)


def _source(name: str) -> str:
    return name.split(":", 1)[0]


def _bridge(name: str | None) -> str:
    return f"bridge:{name}"


def _said(name: str) -> str:
    """A name for an error: with its source where that is not the checkpoint itself."""
    return bare(name) if name.startswith("bridge:") else name
