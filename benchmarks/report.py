"""Writes the newest results into the documentation.

    python benchmarks/report.py [--check] [FILE ...]

In each file (default: those of `DOCUMENTS`), what stands between `<!-- benchmarks:NAME -->` and
`<!-- /benchmarks:NAME -->` is replaced, NAME being a table of benchmark_tables.py. With `--check` nothing is written:
the exit status is 1 if a file is not what would be written.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmark_results import FOLDER, Results
from benchmark_tables import TABLES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("docs/performance.md", "docs/checkpoints.md", "README.md")
_MARK = re.compile(r"<!-- (/?)benchmarks:([\w-]+) -->")


def filled(text: str, results: Results, place: str) -> str:
    """`text` with the tables between their marks.

    Raises:
        ValueError: a mark without its other half, an unknown name, no mark at all.
    """
    marks = list(_MARK.finditer(text))
    if not marks:
        raise ValueError(f"{place}: no <!-- benchmarks:NAME --> was found")
    parts, position = [], 0
    for first, second in zip(marks[::2], [*marks[1::2], None], strict=False):
        if first[1] or second is None or not second[1] or second[2] != first[2]:
            raise ValueError(f"{place}: {first[0]} has no other half")
        if first[2] not in TABLES:
            raise ValueError(f"{place}: benchmarks:{first[2]} must be one of {', '.join(TABLES)}")
        parts.append(f"{text[position : first.end()]}\n{TABLES[first[2]](results)}\n")
        position = second.start()
    return "".join(parts) + text[position:]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="*", type=Path, default=[ROOT / name for name in DOCUMENTS], metavar="FILE")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the result files")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something would change")
    args = parser.parse_args(argv)
    results, changed = Results(args.results), []
    for document in args.documents:
        text = document.read_text(encoding="utf-8")
        new = filled(text, results, str(document))
        if new == text:
            continue
        changed.append(str(document))
        if not args.check:
            document.write_text(new, encoding="utf-8", newline="\n")
    print("\n".join(changed) if changed else "nothing to change")
    if args.check and changed:
        sys.exit(1)


if __name__ == "__main__":
    main()
