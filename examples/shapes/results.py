"""Tables and figures of what a run has measured (run_all.py): as files, and in the documentation.

    python examples/shapes/results.py --run-dir shapes --output-dir shapes/results
    python examples/shapes/results.py --run-dir shapes --output-dir shapes/results --docs docs/shapes.md README.md

In a document, what stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->` is replaced, NAME being one of
the tables (result_tables.py) or "figure-" and one of the figures (result_figures.py), whose PNG is then written to
figures/ beside the document. What has not been measured is named as such.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from measured import Measured
from PIL import Image
from result_figures import FIGURES, save
from result_tables import MISSING, NONE, TABLES

_MARK = re.compile(r"<!-- (/?)results:([\w-]+) -->")
_FIGURE = "figure-"
_ABOUT = {
    "stage1": "Stage 2 with and without stage 1: answers and captions at eight steps",
    "queries": "Retrieval, answers and captions with 4, 8, 16 and 32 queries",
}


def sections(text: str, place: str) -> list[tuple[str, int, int]]:
    """Name, start and end of what stands between marks.

    Raises:
        ValueError: a mark without its other half, an unknown name.
    """
    found, opened = [], None
    known = {*TABLES, *(_FIGURE + name for name in FIGURES)}
    for mark in _MARK.finditer(text):
        closes, name = bool(mark[1]), mark[2]
        if name not in known:
            raise ValueError(f"{place}: results:{name} must be one of {', '.join(sorted(known))}")
        if closes != (opened is not None) or (closes and opened[0] != name):
            raise ValueError(f"{place}: {mark[0]} has no other half")
        if closes:
            found.append((name, opened[1], mark.start()))
            opened = None
        else:
            opened = (name, mark.end())
    if opened is not None:
        raise ValueError(f"{place}: <!-- results:{opened[0]} --> has no other half")
    return found


def filled(text: str, content: Callable[[str], str], place: str) -> str:
    """`text` with `content(name)` between the marks of each name.

    Raises:
        ValueError: as `sections`.
    """
    for name, start, end in reversed(sections(text, place)):
        text = f"{text[:start]}\n{content(name)}\n{text[end:]}"
    return text


def shortened(text: str) -> str:
    """A table without the rows that hold nothing measured; they are named below it."""
    kept, unmeasured = [], []
    for line in text.splitlines():
        first, *cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and MISSING in cells and set(cells) <= {MISSING, NONE}:
            unmeasured.append(first)
        else:
            kept.append(line)
    if not unmeasured:
        return text
    if sum(line.startswith("|") for line in kept) == 2:  # the header alone
        return f"({MISSING})"
    return "\n".join([*kept, "", f"{MISSING.capitalize()}: {'; '.join(unmeasured)}."])


def fill(document: Path, run: Measured, images: Mapping[str, Image.Image | None]) -> None:
    """Puts the results into a document, and those of the figures that it shows beside it."""

    def content(name: str) -> str:
        if not name.startswith(_FIGURE):
            return shortened(TABLES[name](run))
        name = name.removeprefix(_FIGURE)
        if (image := images[name]) is None:
            return f"({MISSING})"
        save(image, document.parent / "figures" / f"{name}.png")
        return f"![{_ABOUT[name]}](figures/{name}.png)"

    text = document.read_text(encoding="utf-8")
    document.write_text(filled(text, content, str(document)), encoding="utf-8", newline="\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run-dir", required=True, help="--output-dir of run_all.py")
    parser.add_argument("--output-dir", required=True, help="for tables.md and the figures")
    parser.add_argument("--docs", nargs="*", default=[], metavar="FILE", help="documents to fill in")
    arguments = parser.parse_args(argv)
    run, folder = Measured(Path(arguments.run_dir)), Path(arguments.output_dir)
    tables = [f"## {name}\n\n{make(run)}\n" for name, make in TABLES.items()]
    if run.limited:  # of --quick: they show that everything runs, and nothing else
        note = f"Of the first few items only, so no results: {', '.join(sorted(run.limited))}\n"
        tables.insert(0, note)
        if arguments.docs:
            raise ValueError(f"`docs` take whole evaluations, got some of the first few items: {sorted(run.limited)}")
    for document in map(Path, arguments.docs):  # before anything is drawn
        sections(document.read_text(encoding="utf-8"), str(document))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text("\n".join(tables), encoding="utf-8", newline="\n")
    images = {name: make(run) for name, make in FIGURES.items()}
    for name, image in images.items():
        if image is None:
            print(f"figure {name}: {MISSING}")
        else:
            save(image, folder / f"{name}.png")
    for document in arguments.docs:
        fill(Path(document), run, images)
    print(
        f"{folder / 'tables.md'}: {len(TABLES)} tables, {sum(text.count(MISSING) for text in tables)} numbers {MISSING}"
    )


if __name__ == "__main__":
    main()
