"""The report as one picture."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .canvas import Canvas, Colour
from .heat import heat_overlay
from .report import Report, decimal, percent, phrase_label, scaled, statement
from .results import Asked, Described

_WIDTH, _SCALE = 1280, 1.5
_MARGIN, _PAD, _GAP = 40, 26, 28
_CARD = _WIDTH - 2 * _MARGIN
_SCENE, _MAP, _MAPS, _MAP_GAP = 296, 88, 4, 8  # sides of scene and map, maps in a row
_RIGHT = _MAPS * _MAP + (_MAPS - 1) * _MAP_GAP
_MIDDLE = _CARD - 2 * _PAD - _SCENE - _RIGHT - 2 * _GAP
_TEXTS = 400  # width of the texts beside the grid

PAPER, CARD, LINE = (246, 245, 241), (255, 255, 255), (228, 226, 219)
INK, MUTED, FAINT = (27, 32, 46), (99, 105, 120), (236, 235, 230)
ACCENT, RIGHT, WRONG = (67, 56, 202), (21, 128, 61), (190, 38, 28)


def draw_report(report: Report) -> Image.Image:
    """The whole report, about 1,900 pixels wide."""
    canvas = Canvas(_WIDTH, 700 + 520 * len(report.results) + 80 * len(report.ranking.texts), _SCALE, PAPER)
    y = _header(canvas, report, 50)
    for result in report.results:
        y = _card(canvas, y, lambda onto, top, result=result: _result(onto, top, report, result))
    y = _card(canvas, y, lambda onto, top: _ranking(onto, top, report))
    canvas.text(_MARGIN, y + 14, f"Models: {report.models}", 12, MUTED)
    canvas.text(_WIDTH - _MARGIN, y + 14, report.command, 12, MUTED, anchor="rs")
    return canvas.cropped(y + 46)


def _card(canvas: Canvas, y: float, draw) -> float:
    """A white box around what `draw` draws; it is measured first."""
    scratch = Canvas(_WIDTH, 900, 1.0, CARD)
    height = draw(scratch, _PAD) + _PAD
    canvas.frame(_MARGIN, y, _CARD, height, 16, LINE, CARD, 1)
    draw(canvas, y + _PAD)
    return y + height + 22


def _header(canvas: Canvas, report: Report, y: float) -> float:
    canvas.text(_MARGIN, y + 30, report.title, 38, INK, bold=True)
    y = canvas.paragraph(_MARGIN, y + 50, report.introduction, 16.5, MUTED, width=860)
    x = float(_MARGIN)
    for number, label in report.facts:
        size = canvas.width(number, 22, bold=True)
        width = max(size, canvas.width(label, 13)) + 34
        canvas.frame(x, y + 16, width, 66, 12, LINE, CARD, 1)
        canvas.text(x + 17, y + 46, number, 22, INK, bold=True)
        canvas.text(x + 17, y + 68, label, 13, MUTED)
        x += width + 12
    return y + 108


# -- one picture ------------------------------------------------------------------------------------------------------


def _result(canvas: Canvas, y: float, report: Report, result: Described) -> float:
    left = _MARGIN + _PAD
    bottoms = [
        _shown(canvas, left, y, result),
        _said(canvas, left + _SCENE + _GAP, y, result),
        _looked(canvas, _MARGIN + _CARD - _PAD - _RIGHT, y, report, result),
    ]
    return max(bottoms)


def _shown(canvas: Canvas, x: float, y: float, result: Described) -> float:
    subject = result.subject
    canvas.paragraph(x, y, subject.title, 17, INK, width=_SCENE, bold=True, most=1)
    y += 32
    canvas.picture(x, y, _SCENE, subject.shown, 10)
    y += _SCENE + 10
    if subject.note:
        width = canvas.width(subject.note, 12) + 20
        canvas.box(x, y, width, 23, 11.5, (238, 236, 252))
        canvas.text(x + 10, y + 16, subject.note, 12, ACCENT)
        y += 30
    return y


def _said(canvas: Canvas, x: float, y: float, result: Described) -> float:
    canvas.text(x, y + 13, "Caption", 13, MUTED)
    y = canvas.paragraph(x, y + 23, result.caption or "(nothing)", 20, INK, width=_MIDDLE, bold=True)
    if result.true is not None:
        canvas.mark(x, y + 4, 17, result.true, RIGHT if result.true else WRONG)
        canvas.text(x + 24, y + 17.5, statement(result), 13.5, RIGHT if result.true else WRONG)
        y += 26
    y += 20
    for asked in result.asked:
        y = _answer(canvas, x, y, asked) + 14
    return y - 14


def _answer(canvas: Canvas, x: float, y: float, asked: Asked) -> float:
    y = canvas.paragraph(x, y, asked.question, 15, MUTED, width=_MIDDLE, most=2)
    (answer, probability), *others = asked.answers
    end = x
    if asked.right is not None:
        canvas.mark(x, y + 4, 17, asked.right, RIGHT if asked.right else WRONG)
        end = x + 24
    label = canvas.lines(answer or "(nothing)", 16, 116, bold=True)[0]
    canvas.text(end, y + 18, label, 16, INK, bold=True)
    bar, width = x + 142, 120
    canvas.box(bar, y + 8, width, 9, 4.5, FAINT)
    canvas.box(bar, y + 8, max(9.0, width * probability), 9, 4.5, ACCENT)
    end = canvas.text(bar + width + 10, y + 17, percent(probability), 13.5, INK) + 14
    rest = [f"{other} {percent(value)}" for other, value in others]
    if asked.right is False:
        end = canvas.text(end, y + 17, f"true: {asked.truth}", 13.5, WRONG) + 12
        rest = rest[:1]
    if rest:
        space = x + _MIDDLE - end
        line = " · ".join(rest)
        while rest and canvas.width(line, 12.5) > space:
            rest.pop()
            line = " · ".join(rest)
        canvas.text(end, y + 17, line, 12.5, MUTED)
    return y + 24


def _looked(canvas: Canvas, x: float, y: float, report: Report, result: Described) -> float:
    canvas.text(x, y + 13, report.queries, 13, MUTED)
    y += 24
    y = _maps(canvas, x, y, result.subject.shown, result.query_maps, [f"{number + 1}" for number in result.queries])
    if not result.subject.phrases:
        return y
    canvas.text(x, y + 21, "What makes the picture match these words", 13, MUTED)
    labels = [phrase_label(phrase) for phrase in result.subject.phrases]
    return _maps(canvas, x, y + 32, result.subject.shown, result.phrase_maps, labels)


def _maps(canvas: Canvas, x: float, y: float, picture: Image.Image, maps: np.ndarray, labels: list[str]) -> float:
    """Rows of maps; short labels are numbers in a corner, others stand below."""
    below = max(map(len, labels)) > 3
    bottom = y
    for index, (values, label) in enumerate(zip(maps, labels, strict=True)):
        row, column = divmod(index, _MAPS)
        left, top = x + column * (_MAP + _MAP_GAP), y + row * (_MAP + _MAP_GAP)
        canvas.picture(left, top, _MAP, heat_overlay(picture, values, round(_MAP * canvas.scale)), 7)
        if below:
            bottom = max(bottom, canvas.paragraph(left, top + _MAP + 5, label, 11.5, MUTED, width=_MAP, most=3))
        else:
            canvas.text(left + 7, top + 16, label, 11, (255, 255, 255), bold=True)
            bottom = top + _MAP
    return bottom


# -- the grid ---------------------------------------------------------------------------------------------------------


def _ranking(canvas: Canvas, y: float, report: Report) -> float:
    ranking, x = report.ranking, _MARGIN + _PAD
    canvas.text(x, y + 16, "Texts against pictures", 17, INK, bold=True)
    y = canvas.paragraph(x, y + 28, report.ranking_note, 13, MUTED, width=_CARD - 2 * _PAD) + 14
    count, inner = len(report.results), _CARD - 2 * _PAD
    cell = min(72.0, (inner - _TEXTS - 44) / (2 * count))
    blocks = [x + inner - 2 * count * cell - 44, x + inner - count * cell]
    for left, name in zip(blocks, ("ITC", "ITM"), strict=True):
        canvas.text(left + 2, y + 12, name, 14, INK, bold=True)
        for column, result in enumerate(report.results):
            canvas.picture(left + column * cell + 3, y + 22, cell - 6, result.subject.shown, 7)
    y += 22 + cell
    row = min(cell, 56.0)
    grids = ((blocks[0], ranking.cosines, False), (blocks[1], ranking.probabilities, True))
    for number, text in enumerate(ranking.texts):
        lines = canvas.lines(text, 13.5, blocks[0] - x - 26)
        height = max(row, 18 * min(3, len(lines)) + 10)
        top = y + height / 2 - 9 * min(3, len(lines)) - 1
        canvas.paragraph(x, top, text, 13.5, INK, width=blocks[0] - x - 26, most=3)
        for left, scores, probabilities in grids:
            _cells(canvas, left, y, cell, height, scores, number, probabilities)
        y += height
    return y


def _cells(
    canvas: Canvas,
    left: float,
    y: float,
    cell: float,
    height: float,
    scores: np.ndarray,
    row: int,
    probabilities: bool,
) -> None:
    strengths = scaled(scores, probabilities)[row]
    best = int(scores[row].argmax())
    for column, strength in enumerate(strengths.tolist()):
        fill = _mixed(FAINT, ACCENT, strength)
        x, own = left + column * cell, column == row
        if own:
            canvas.frame(x + 1, y + 1, cell - 2, height - 2, 9, INK, fill, 2)
        else:
            canvas.box(x + 3, y + 3, cell - 6, height - 6, 7, fill)
        colour = (255, 255, 255) if strength > 0.45 else INK
        value = float(scores[row, column])
        label = percent(value) if probabilities else decimal(value)
        canvas.text(
            x + cell / 2, y + height / 2, label, min(13.5, cell / 4.2), colour, bold=column == best, anchor="mm"
        )
        if column == best:
            canvas.box(x + cell / 2 - 2.5, y + height / 2 + 11, 5, 5, 2.5, colour)


def _mixed(first: Colour, second: Colour, share: float) -> Colour:
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
