"""Pictures of coloured shapes with captions or questions, drawn here: data for the smoke recipes."""

import csv
from pathlib import Path

from PIL import Image, ImageDraw

SHAPES, COLOURS, SIZE = ("circle", "square"), ("red", "blue", "orange"), 112


def _draw(shape: str, colour: str) -> Image.Image:
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(picture)
    draw = pen.ellipse if shape == "circle" else pen.rectangle
    draw((SIZE // 4, SIZE // 4, 3 * SIZE // 4, 3 * SIZE // 4), fill=colour)
    return picture


def _write(folder: Path, columns: list[str], rows: dict[str, list[list[str]]]) -> None:
    folder.mkdir()
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", *columns])
        for name, texts in rows.items():
            _draw(*name.split("-")).save(folder / f"{name}.png")
            table.writerows([f"{name}.png", *text] for text in texts)


def _all() -> list[tuple[str, str]]:
    return [(shape, colour) for shape in SHAPES for colour in COLOURS]


def write_captions(folder: Path) -> str:
    """Six pictures with two captions each, as a folder that anybody's photos could be."""
    _write(folder, ["caption"], {f"{s}-{c}": [[f"a {c} {s}"], [f"a picture of a {s}"]] for s, c in _all()})
    return str(folder)


def write_questions(folder: Path) -> str:
    """Six pictures with two questions each."""
    rows = {f"{s}-{c}": [["what color is this ?", c], ["what shape is this ?", s]] for s, c in _all()}
    _write(folder, ["question", "answer"], rows)
    return str(folder)
