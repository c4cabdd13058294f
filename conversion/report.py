"""What a comparison found, and how it is printed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from conversion.compare import Measure, WeightDifferences

_SHOWN = 8


@dataclass(frozen=True)
class Report:
    """Result of `conversion.verify.verify`.

    Attributes:
        a, b: the sides and what computed them.
        setting: what both were run on.
        tolerance: the largest error of equal results.
        measures: of each place that both have, in the order of the computation.
        local: errors of B's places when each of its layers is given A's input; only if a place differs.
        losses: by name, of A and of B, where both have it.
        divergence: of the language model's next-token distribution, KL(A || B) in nats: mean, maximum and number of
            positions; None: there is none.
        weights: None: the layouts have no names in common.
        problems: why the sides are not equal, beside the measures and the weights.
        notes: what was left out or rounded.
    """

    a: str
    b: str
    setting: str = ""
    tolerance: float = 0.0
    measures: tuple[Measure, ...] = ()
    local: tuple[Measure, ...] = ()
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    divergence: tuple[float, float, int] | None = None
    weights: WeightDifferences | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether all that was compared is equal, and nothing is missing that should be there."""
        same_weights = self.weights is None or self.weights.equal
        return bool(self.measures) and not self.problems and same_weights and self.first_divergence is None

    @property
    def first_divergence(self) -> str | None:
        """The first place with another result, such as "tower, layer 3"."""
        return next((m.place for m in self.measures if not m.error <= self.tolerance), None)

    @property
    def culprits(self) -> tuple[str, ...]:
        """The places that give another result for the same input: every layer that is not the other side's."""
        differing = [m.place for m in self.local if not m.error <= self.tolerance]
        inner = [place for place in differing if not place.startswith("end,")]
        return tuple(inner or differing)

    def __str__(self) -> str:
        lines = [f"A: {self.a}", f"B: {self.b}"]
        if self.setting:
            lines.append(self.setting)
        lines += self._table() + self._weights()
        for name, (one, other) in self.losses.items():
            lines.append(f"{name}: {one:.6f} and {other:.6f}")
        if self.divergence is not None:
            mean, largest, count = self.divergence
            lines.append(f"KL of the next token: mean {mean:.2e}, maximum {largest:.2e} nats, {count} positions")
        lines += [f"note: {note}" for note in self.notes]
        if self.equal:
            return "\n".join([*lines, f"EQUAL (tolerance {self.tolerance:g})"])
        lines += [f"problem: {problem}" for problem in self.problems]
        lines.append("NOT EQUAL" + (f": first at {self.first_divergence}" if self.first_divergence else ""))
        if self.culprits:
            lines.append(f"other results for the same input: {_some(self.culprits)}")
        return "\n".join(lines)

    def _table(self) -> list[str]:
        """The largest error at each depth."""
        rows = []
        for depth in dict.fromkeys(m.depth for m in self.measures):
            own = [m for m in self.measures if m.depth == depth]
            worst = max(own, key=lambda m: float("inf") if m.error != m.error else m.error)
            rows.append(f"{depth:15} {len(own):3} places, largest error {worst.error:.1e} at {worst.place}")
        return rows

    def _weights(self) -> list[str]:
        if self.weights is None:
            return ["weights: not compared by name, the layouts have none in common"] if self.measures else []
        found, same = self.weights, self.weights.compared - len(self.weights.differing)
        lines = [f"weights: {found.compared} tensors of the same names, {same} of them equal"]
        if found.differing:
            lines.append(f"  differing: {_some(found.differing)}")
        layers = dict.fromkeys((_layer(name), _layer(other)) for name, other in found.moved.items())
        lines += [f"  {one} of A is {other} of B" for one, other in list(layers)[:_SHOWN]]
        lines += [f"  missing in {side}: {_some(names)}" for side, names in found.missing.items() if names]
        return lines


def _layer(name: str) -> str:
    """The name up to the number of a layer, or the whole name."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name


def _some(names: list[str] | tuple[str, ...]) -> str:
    return "; ".join(names[:_SHOWN]) + (f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
