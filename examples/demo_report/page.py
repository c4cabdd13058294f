"""The report as one HTML file, pictures inside."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from .heat import heat_overlay
from .report import Report, decimal, percent, phrase_label, scaled, statement
from .results import Asked, Described

_MAP_SIDE = 176  # pixels, twice what it is shown at
_STYLE = Path(__file__).with_name("page.css")


def write_page(report: Report, path: Path) -> None:
    """Writes the page; it needs no other file and no network."""
    facts = "".join(f"<li><b>{escape(number)}</b>{escape(label)}</li>" for number, label in report.facts)
    scenes = "\n".join(_scene(report, result) for result in report.results)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(report.title)}</title>
<style>
{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<h1>{escape(report.title)}</h1>
<p class="lead">{escape(report.introduction)}</p>
<ul class="facts">{facts}</ul>
{scenes}
{_ranking(report)}
<footer><span>Models: {escape(str(report.models))}</span><code>{escape(report.command)}</code></footer>
</main>
</body>
</html>
"""
    path.write_text(page, encoding="utf-8")


def _scene(report: Report, result: Described) -> str:
    subject = result.subject
    note = f'<p class="note">{escape(subject.note)}</p>' if subject.note else ""
    verdict = ""
    if result.true is not None:
        verdict = f'<p class="verdict {_class(result.true)}">{_mark(result.true)} {escape(statement(result))}</p>'
    numbers = [f'<figcaption class="number">{number + 1}</figcaption>' for number in result.queries]
    looked = f'<p class="label">{escape(report.queries)}</p>{_maps(result, result.query_maps, numbers)}'
    if subject.phrases:
        labels = [f"<figcaption>{escape(phrase_label(phrase))}</figcaption>" for phrase in subject.phrases]
        looked += '<p class="label phrases">What makes the picture match these words</p>'
        looked += _maps(result, result.phrase_maps, labels)
    return f"""<section class="card scene">
<div><h2>{escape(subject.title)}</h2><img src="{_inline(subject.shown)}" alt="{escape(subject.title)}">{note}</div>
<div><p class="label">Caption</p><p class="caption">{escape(result.caption) or "(nothing)"}</p>{verdict}
{"".join(_answer(asked) for asked in result.asked)}</div>
<div>{looked}</div>
</section>"""


def _answer(asked: Asked) -> str:
    (answer, probability), *others = asked.answers
    rest = " · ".join(f"{escape(other)} {percent(value)}" for other, value in others)
    mark = "" if asked.right is None else f'<span class="{_class(asked.right)}">{_mark(asked.right)}</span>'
    truth = f'<span class="small wrong">true: {escape(asked.truth)}</span>' if asked.right is False else ""
    return f"""<div class="qa"><div class="question">{escape(asked.question)}</div>
<div class="row">{mark}<b>{escape(answer) or "(nothing)"}</b>
<span class="bar"><i style="width: {100 * probability:.1f}%"></i></span><span>{escape(percent(probability))}</span>
{truth}<span class="small rest">{rest}</span></div></div>"""


def _class(right: bool) -> str:
    return "right" if right else "wrong"


def _mark(right: bool) -> str:
    return "✔" if right else "✘"


def _maps(result: Described, maps, captions: list[str]) -> str:
    figures = (
        f'<figure><img src="{_inline(heat_overlay(result.subject.shown, values, _MAP_SIDE), "JPEG")}" alt="">'
        f"{caption}</figure>"
        for values, caption in zip(maps, captions, strict=True)
    )
    return f'<div class="maps">{"".join(figures)}</div>'


def _ranking(report: Report) -> str:
    shown = [
        (_inline(result.subject.shown.resize((128, 128)), "JPEG"), result.subject.title) for result in report.results
    ]
    thumbnails = "".join(f'<th><img src="{picture}" alt="{escape(title)}"></th>' for picture, title in shown)
    count = len(report.results)
    grids = ((report.ranking.cosines, False), (report.ranking.probabilities, True))
    rows = "\n".join(
        f'<tr><th class="text">{escape(text)}</th>'
        + '<td class="gap"></td>'.join(_cells(scores, probabilities, row) for scores, probabilities in grids)
        + "</tr>"
        for row, text in enumerate(report.ranking.texts)
    )
    return f"""<section class="card"><h2>Texts against pictures</h2><p class="label">{escape(report.ranking_note)}</p>
<div class="grid"><table>
<tr><td class="none"></td><th class="name" colspan="{count}">ITC</th><td class="gap"></td>
<th class="name" colspan="{count}">ITM</th></tr>
<tr><td class="none"></td>{thumbnails}<td class="gap"></td>{thumbnails}</tr>
{rows}
</table></div></section>"""


def _cells(scores, probabilities: bool, row: int) -> str:
    strengths = scaled(scores, probabilities)[row].tolist()
    best, cells = int(scores[row].argmax()), []
    for column, strength in enumerate(strengths):
        value = float(scores[row, column])
        names = [
            name for name, so in (("own", column == row), ("best", column == best), ("strong", strength > 0.45)) if so
        ]
        label = percent(value) if probabilities else decimal(value)
        cells.append(
            f'<td class="{" ".join(names)}" style="--strength: {0.07 + 0.93 * strength:.3f}">{escape(label)}</td>'
        )
    return "".join(cells)


def _inline(picture: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 88} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
