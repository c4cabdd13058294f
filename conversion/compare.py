"""Two traces, and two sets of weights, held against each other."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

import torch
from torch import nn

from blip2_hf.modeling.loading import _INSTRUCTBLIP_KEYS as INSTRUCTBLIP_KEYS
from conversion.sides import ORIGINAL, OURS, TOWER_PREFIX, OpenedSide, part_of
from conversion.traces import Trace

# What `transformers`' classes do not give (beginnings of places), and our parameters that they have no place for.
NOT_IN_TRANSFORMERS = ("end, ITC loss", "end, ITM loss", "end, ITG ", "Q-Former, captioning, ")
_KEYS_NOT_IN_TRANSFORMERS = re.compile(r"temperature$|lm_head\.")
_FLOOR = 1e-3  # of the usual length of a row: shorter ones are nothing but rounding
_DIGEST_PIECE = 2**24  # elements


@dataclass(frozen=True)
class Measure:
    """How far two results at one place are apart.

    Attributes:
        place: "tower, layer 3".
        error: the largest, over the positions, of |a - b| relative to |a| in the 2-norm; nan or inf if a number is.
    """

    place: str
    error: float

    @property
    def depth(self) -> str:
        return self.place.split(",")[0]


def measure(place: str, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None = None) -> Measure:
    """`a` and `b` of one shape, except that logits may have more words on one side.

    Args:
        mask: which positions [B, N] count; default all.
    """
    if place.endswith(" logits") or place == "end, logits":
        a, b = a[..., : b.shape[-1]], b[..., : a.shape[-1]]
    if a.shape != b.shape and a.ndim == b.ndim == 3:  # a side may leave out text that nothing reads any more
        shared = min(a.shape[1], b.shape[1])
        a, b, mask = a[:, :shared], b[:, :shared], None if mask is None else mask[:, :shared]
    if a.shape != b.shape:
        return Measure(place, float("inf"))
    if mask is not None:
        a, b = a[mask], b[mask]
    a, b = a.double().reshape(-1, a.shape[-1] if a.ndim else 1), b.double().reshape(-1, b.shape[-1] if b.ndim else 1)
    lengths = a.norm(dim=-1)
    usual = lengths.square().mean().sqrt()
    errors = (a - b).norm(dim=-1) / torch.maximum(lengths, _FLOOR * usual).clamp(min=torch.finfo(torch.float32).tiny)
    return Measure(place, float("nan") if errors.isnan().any() else errors.max().item())


def measures(a: Trace, b: Trace) -> list[Measure]:
    """Of all places that both have, in the order of `a`."""
    return [
        measure(place, states, b.places[place], a.masks.get(place, b.masks.get(place)))
        for place, states in a.places.items()
        if place in b.places
    ]


def only_one_has(a: Trace, b: Trace, engines: tuple[str, str]) -> list[str]:
    """Places of one side that the other should have, as sentences."""
    found = []
    for name, has, lacks, engine in (("B", a, b, engines[1]), ("A", b, a, engines[0])):
        places = [place for place in has.places if place not in lacks.places]
        if engine not in (OURS, ORIGINAL):
            places = [place for place in places if not place.startswith(NOT_IN_TRANSFORMERS)]
        if places:
            found.append(f"{name} has no {', no '.join(places[:4])}" + (" …" if len(places) > 4 else ""))
    return found


def divergence(a: Trace, b: Trace) -> torch.Tensor | None:
    """KL(A's next-token distribution || B's) at each real position, over the words that both have; None: no logits."""
    if "end, logits" not in a.places or "end, logits" not in b.places:
        return None
    one, other = a.places["end, logits"], b.places["end, logits"]
    words = min(one.shape[-1], other.shape[-1])
    mask = a.masks["end, logits"]
    logs = [logits[mask][:, :words].double().log_softmax(dim=-1) for logits in (one, other)]
    return (logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1).clamp(min=0.0)


def lose_added_words(a: Trace, b: Trace, labels: torch.Tensor | None) -> None:
    """Replaces a larger vocabulary's loss, as its added tokens get some probability, by that over the words of both."""
    if labels is None or any("end, logits" not in trace.places for trace in (a, b)):
        return
    words = min(trace.places["end, logits"].shape[-1] for trace in (a, b))
    for trace in (a, b):
        logits, targets = trace.places["end, logits"], labels.cpu()
        if logits.shape[-1] == words:
            continue
        if logits.shape[1] > targets.shape[1]:  # decoder-only: the queries before the text; each predicts the next
            targets = nn.functional.pad(targets, (logits.shape[1] - targets.shape[1], 0), value=-100)[:, 1:]
            logits = logits[:, :-1]
        loss = nn.functional.cross_entropy(logits[..., :words].flatten(0, 1), targets.flatten())
        trace.places["end, loss"] = loss


# -- weights -----------------------------------------------------------------------------------------------------------


@dataclass
class WeightDifferences:
    """Weights that both sides have under the same names, where they are not the same.

    Attributes:
        compared: number of tensors of the same names.
        differing: names (of A) whose values or shapes differ.
        moved: of these, the names of A and of B that hold what A's holds.
        missing: "A" or "B" -> names that only the other side has.
        notes: differences that change nothing, as sentences.
    """

    compared: int = 0
    differing: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.differing and not any(self.missing.values())


def compare_weights(a: OpenedSide, b: OpenedSide, rounded) -> WeightDifferences | None:
    """Tensor by tensor, one pair in memory at a time; None for layouts whose names cannot be compared.

    Args:
        rounded: (name, tensor) -> the tensor in the precision in which both are compared.
    """
    if (a.engine == ORIGINAL) != (b.engine == ORIGINAL):
        return None
    names_a, names_b = _names(a), _names(b)
    result = WeightDifferences()
    digests: dict[str, tuple[str, str]] = {}
    for name in names_a.keys() & names_b.keys():
        one = rounded(name, a.read(names_a[name]))
        other = rounded(name, b.read(names_b[name]))
        result.compared += 1
        grown = _grown(name, one, other)
        if grown:
            result.notes.append(grown)
            rows = min(len(one), len(other))
            one, other = one[:rows], other[:rows]
        if one.dtype != other.dtype:
            narrower = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
            one, other = one.to(narrower), other.to(narrower)
        if one.shape != other.shape or not torch.equal(one, other):
            result.differing.append(name)
            digests[name] = _digest(one), _digest(other)
    result.differing.sort(key=_in_order)
    where = {digest: name for name, (_, digest) in digests.items()}
    result.moved = {name: where[digests[name][0]] for name in result.differing if digests[name][0] in where}
    for letter, has, own, lacks in (("B", a, names_a, b), ("A", b, names_b, a)):
        other_names = names_b if letter == "B" else names_a
        missing = sorted((name for name in own if name not in other_names), key=_in_order)
        if has.tower is not None:  # its file also holds the layers and heads that the original leaves out
            missing = [name for name in missing if not name.startswith(TOWER_PREFIX)]
        missing = _without_second_names(missing, has, own, other_names)
        if lacks.engine not in (OURS, ORIGINAL):
            beyond = [name for name in missing if _KEYS_NOT_IN_TRANSFORMERS.match(name)]
            if beyond:
                result.notes.append(f"{len(beyond)} parameters that transformers has no place for: {_some(beyond)}")
            missing = [name for name in missing if name not in beyond]
        result.missing[letter] = missing
    return result


def _names(side: OpenedSide) -> dict[str, str]:
    """Comparable name -> stored name."""
    if side.engine == ORIGINAL:
        of_tower = () if side.tower is None else side.tower.infos
        return {name: name for name in (*side.weights.infos, *(f"{TOWER_PREFIX}{name}" for name in of_tower))}
    found = {}
    for name in side.weights.infos:
        comparable = name
        for pattern, ours in INSTRUCTBLIP_KEYS.items():
            comparable = re.sub(pattern, ours, comparable)
        if not name.endswith(".position_ids"):
            found[comparable] = name
    return found


def _without_second_names(names: list[str], side: OpenedSide, own: dict[str, str], others: dict[str, str]) -> list[str]:
    """Leaves out those that hold what a name that both sides have holds as well: tied weights, stored twice."""
    if not names:
        return names
    infos = side.weights.infos
    shapes = {tuple(infos[own[name]].shape) for name in names}
    shared = [n for n in own if n in others and own[n] in infos and tuple(infos[own[n]].shape) in shapes]
    known = {_digest(side.read(own[name])) for name in shared}
    return [name for name in names if _digest(side.read(own[name])) not in known]


def _grown(name: str, one: torch.Tensor, other: torch.Tensor) -> str | None:
    """A vocabulary with rows added, for the image placeholder: the words that both have are compared."""
    if part_of(name) != "language model" or one.shape == other.shape or one.ndim != other.ndim:
        return None
    if one.shape[1:] != other.shape[1:]:
        return None
    return f"{name} has {len(one)} rows in A and {len(other)} in B; the first {min(len(one), len(other))} are compared"


def _digest(tensor: torch.Tensor) -> str:
    """Of shape and values, in float32."""
    state = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    for piece in tensor.reshape(-1).split(_DIGEST_PIECE):
        state.update(piece.float().contiguous().numpy().tobytes())
    return state.hexdigest()


def _in_order(name: str) -> list:
    """Layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _some(names: list[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def unexpected_keys(letter: str, side: OpenedSide, trace: Trace) -> list[str]:
    """What keeps a folder from being that of its model: parameters it lacks, or that there is no place for."""
    found = []
    beyond = [name for name in trace.surplus if not _KEYS_NOT_IN_TRANSFORMERS.match(name)]
    if side.engine not in (OURS, ORIGINAL) and trace.new:  # ours says itself what it lacks and may lack
        found.append(f"{letter} lacks {len(trace.new)} parameters: {_some(list(trace.new))}")
    if beyond:
        found.append(f"{letter} has {len(beyond)} parameters too many: {_some(beyond)}")
    return found
