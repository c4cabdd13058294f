"""Line charts of the findings as PNG, drawn with Pillow: means over seeds, in a band from the lowest to the highest."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from measured import Measured, number
from PIL import Image, ImageDraw, ImageFont
from result_tables import of_queries
from steps import FINDING_QUERIES, QUERIES

Colour = tuple[int, int, int]
Points = Mapping[float, Sequence[float]]  # values of all seeds at each place

INK, GREY, LIGHT, WHITE = (38, 42, 51), (112, 118, 130), (226, 229, 234), (255, 255, 255)
BLUE, ORANGE, GREEN, PURPLE = (38, 98, 196), (222, 112, 28), (30, 140, 90), (132, 66, 168)
_SCALE, _SMOOTH = 2, 2  # pixels per unit of the design; supersampling on top
_WIDTH, _HEIGHT = 430, 330  # of one panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 20, 40, 44  # around what is plotted
_FOOT = 20  # for one row of the legend
_ENTRY = 185  # of the legend, its width


@dataclass(frozen=True)
class Line:
    """One line of a panel."""

    name: str
    colour: Colour
    points: Points
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One chart: percent against `label`; `even`: the places stand at equal distances, as for 4, 8, 16, 32."""

    title: str
    label: str
    lines: Sequence[Line]
    even: bool = False


class _Canvas:
    def __init__(self, width: float, height: float) -> None:
        self.unit = _SCALE * _SMOOTH
        self.image = Image.new("RGB", (round(width * self.unit), round(height * self.unit)), WHITE)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, size: float, colour: Colour, anchor: str) -> float:
        """Returns its width."""
        font = ImageFont.load_default(size * self.unit)
        self.draw.text((x * self.unit, y * self.unit), text, fill=colour, font=font, anchor=anchor)
        return font.getlength(text) / self.unit

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, thick: float, dashed: bool = False) -> None:
        dots = [(x * self.unit, y * self.unit) for x, y in points]
        width = max(1, round(thick * self.unit))
        if not dashed:
            self.draw.line(dots, fill=colour, width=width, joint="curve")
            return
        for (x, y), (u, v) in zip(dots, dots[1:], strict=False):
            length = max(1e-6, ((u - x) ** 2 + (v - y) ** 2) ** 0.5)
            step, on = 7 * self.unit / length, 4 * self.unit / length
            start = 0.0
            while start < 1:
                end = min(1.0, start + on)
                ends = [(x + (u - x) * at, y + (v - y) * at) for at in (start, end)]
                self.draw.line(ends, fill=colour, width=width)
                start += step

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        box = [(value + sign * radius) * self.unit for sign in (-1, 1) for value in (x, y)]
        self.draw.ellipse(box, fill=colour)

    def band(self, points: Sequence[tuple[float, float]], colour: Colour) -> None:
        """A filled area, mixed with what is there."""
        dots = [(x * self.unit, y * self.unit) for x, y in points]
        left, top = (int(min(dot[axis] for dot in dots)) for axis in (0, 1))
        size = tuple(int(max(dot[axis] for dot in dots)) - start + 1 for axis, start in ((0, left), (1, top)))
        layer = Image.new("L", size, 0)
        ImageDraw.Draw(layer).polygon([(x - left, y - top) for x, y in dots], fill=46)
        self.image.paste(colour, (left, top), layer)

    def finished(self) -> Image.Image:
        size = (self.image.width // _SMOOTH, self.image.height // _SMOOTH)
        return self.image.resize(size, Image.Resampling.BOX)


def draw(panels: Sequence[Panel]) -> Image.Image:
    """The panels side by side, with one legend for all."""
    names = {line.name: line for panel in panels for line in panel.lines}
    width = _WIDTH * len(panels)
    columns = int((width - _LEFT) / _ENTRY)
    canvas = _Canvas(width, _HEIGHT + 4 + _FOOT * -(-len(names) // columns))
    for column, panel in enumerate(panels):
        _panel(canvas, panel, column * _WIDTH)
    for place, line in enumerate(names.values()):
        x, y = _LEFT + _ENTRY * (place % columns), _HEIGHT + _FOOT * (place // columns + 0.5) - 4
        canvas.line([(x, y), (x + 22, y)], line.colour, 2, line.dashed)
        canvas.text(x + 28, y, line.name, 11, INK, "lm")
    return canvas.finished()


def _panel(canvas: _Canvas, panel: Panel, left: float) -> None:
    places = sorted({place for line in panel.lines for place in line.points})
    x0, x1, y0, y1 = left + _LEFT, left + _WIDTH - _RIGHT, float(_TOP), float(_HEIGHT - _BOTTOM)

    def across(place: float) -> float:
        share = (places.index(place) + 0.5) / len(places) if panel.even else place / max(places)
        return x0 + share * (x1 - x0)

    def down(value: float) -> float:
        return y1 - value / 100 * (y1 - y0)

    canvas.text(x0, _TOP - 16, panel.title, 13, INK, "lb")
    for value in range(0, 101, 20):
        canvas.line([(x0, down(value)), (x1, down(value))], LIGHT if value else GREY, 0.8)
        canvas.text(x0 - 6, down(value), str(value), 10, GREY, "rm")
    for place in places if panel.even else _ticks(max(places)):
        canvas.text(across(place), y1 + 6, f"{place:,.0f}", 10, GREY, "ma")
    canvas.text((x0 + x1) / 2, y1 + 24, panel.label, 11, GREY, "ma")
    for line in panel.lines:
        rows = [(across(place), values) for place, values in sorted(line.points.items())]
        if any(len(values) > 1 for _, values in rows):
            upper = [(x, down(max(values))) for x, values in rows]
            canvas.band([*upper, *[(x, down(min(values))) for x, values in reversed(rows)]], line.colour)
        means = [(x, down(statistics.mean(values))) for x, values in rows]
        if len(means) > 1:
            canvas.line(means, line.colour, 2, line.dashed)
        for x, y in means:
            canvas.dot(x, y, 2.6, line.colour)


def _ticks(most: float) -> list[float]:
    """Four to eight round places from 0 to `most`."""
    step = next(s for power in range(12) for s in (10**power, 2 * 10**power, 5 * 10**power) if most / s <= 8)
    return [float(step * number) for number in range(int(most / step) + 1)]


# -- figures ---------------------------------------------------------------------------------------------------------


def _collected(rows: Sequence[tuple[float, float | None]]) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for place, value in rows:
        if value is not None:
            found.setdefault(place, []).append(100 * value)
    return found


def stage1(run: Measured) -> Image.Image | None:
    """The paper's figure 5: stage 2 with and without stage 1, at the checkpoints of both; None where not measured."""
    runs = (
        ("stage2", "OPT, with stage 1", BLUE, False),
        ("stage2-without-stage1", "OPT, without", BLUE, True),
        ("stage2-t5", "T5, with stage 1", ORANGE, False),
        ("stage2-t5-without-stage1", "T5, without", ORANGE, True),
    )
    panels = []
    for key, title in (("answered", "unseen questions answered, zero-shot, %"), ("true", "captions wholly true, %")):
        lines = []
        for model, name, colour, dashed in runs:
            curves = [run.curve(f"findings/{seed}/{model}") for seed in run.seeds()]
            points = _collected([(one["step"], number(one, key)) for curve in curves for one in curve])
            if points:
                lines.append(Line(name, colour, points, dashed))
        panels.append(Panel(title, "steps of stage 2", lines))
    return draw(panels) if all(panel.lines for panel in panels) else None


def queries(run: Measured) -> Image.Image | None:
    """Retrieval and generation by the number of queries; None where not measured."""

    def line(name: str, colour: Colour, measure, dashed: bool = False) -> Line:
        rows = [
            (count, measure(*(f"findings/{seed}/{model}" for model in of_queries(count))))
            for count in sorted({QUERIES, *FINDING_QUERIES})
            for seed in run.seeds()
        ]
        return Line(name, colour, _collected(rows), dashed)

    lines = [
        line("TR@1, re-ranked", BLUE, lambda one, two: run.metric("retrieval", "test", one, "reranked", "txt_r1")),
        line("IR@1, re-ranked", GREEN, lambda one, two: run.metric("retrieval", "test", one, "reranked", "img_r1")),
        line("questions, zero-shot", ORANGE, lambda one, two: run.metric("vqa", "test", two, "overall")),
        line("captions true", PURPLE, lambda one, two: number(run.truth("test", two), "true")),
    ]
    lines = [one for one in lines if one.points]
    return draw([Panel("after short runs, unseen scenes, %", "queries", lines, even=True)]) if lines else None


FIGURES = {"stage1": stage1, "queries": queries}


def save(image: Image.Image, path: Path) -> None:
    """As a PNG with a palette: a few tens of kilobytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(128, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)
