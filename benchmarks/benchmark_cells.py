"""Numbers as cells, rows as Markdown tables with dates and settings: what the tables of the benchmarks are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from benchmark_results import Results, Row

MISSING = "(not measured)"
DEVICES = ("cpu", "cuda", "meta")
BOTH = ("ours", "theirs")


def short(value: float | None) -> str:
    """Three digits, fewer if fewer were recorded, more of a whole number."""
    if value is None:
        return "–"
    recorded = len(str(float(value)).partition(".")[2])
    wanted = 2 - math.floor(math.log10(abs(value))) if value else 0
    return str(value) if isinstance(value, int) else f"{value:.{max(0, min(recorded, wanted))}f}"


def each(values: dict | None, names: Iterable[str] = BOTH, show: Callable[[float], str] = short) -> str:
    """As "ours / theirs"."""
    return "–" if not values else " / ".join(show(values[name]) for name in names)


def ratio_of(row: Row, peer: str | None = None, *, name: str = "time_ratio") -> str:
    """The median, and the smallest and largest of all rounds where they were recorded; "–" where it was not."""
    middle, extremes = row.get(name), row.get(f"{name}_range")
    if middle is None:
        return "–"
    if peer is not None:
        middle, extremes = middle[peer], extremes[peer] if extremes else None
    return f"{middle:.2f}" + (f" ({extremes[0]:.2f} to {extremes[1]:.2f})" if extremes else "")


def described(setting: dict) -> str:
    """Machine, versions and rounds, as far as they were recorded."""
    parts = [setting["device"]] if "device" in setting else []
    parts += [f"{setting['threads']} thread{'s' * (setting['threads'] > 1)}"] if "threads" in setting else []
    parts += [f"{name} {setting[name]}" for name in ("torch", "transformers", "pillow") if name in setting]
    rounds = setting.get("repeats")
    return ", ".join(parts + ([f"{rounds} round{'s' * (rounds > 1)}"] if rounds else []))


def table(columns: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], Sequence[str]]) -> str:
    """With a column of dates, and the settings below."""
    lines = [f"| {' | '.join((*columns, 'measured'))} |", "|" + "---|" * (len(columns) + 1)]
    lines += [f"| {' | '.join((*cells(row), row.when))} |" for row in rows]
    settings = dict.fromkeys(f"{row.date}: {described(row.setting)}." for row in rows)
    return "\n".join([*lines, "", *sorted(settings)])


def on_every_device(make: Callable[[str], str | None]) -> str:
    """The tables of all devices with results."""
    return "\n\n".join(filter(None, (make(device) for device in DEVICES))) or MISSING


def simple(
    results: Results,
    benchmark: str,
    case: Sequence[str],
    columns: Sequence[str],
    cells: Callable[[Row], Sequence[str]],
    *,
    needs: Sequence[str] = (),
    where: Callable[[Row], bool] = lambda row: True,
    order: Callable[[Row], object] | None = None,
) -> str:
    """A table of a benchmark's newest rows per device."""

    def make(device: str) -> str | None:
        rows = results.newest(benchmark, device, case, needs, where)
        return table(columns, sorted(rows, key=order) if order else rows, cells) if rows else None

    return on_every_device(make)
