"""Small trained models describe five scenes that were drawn a moment ago; the report is demo/report.html and .png.

Command: `make demo` (or `python examples/demo.py`; `--images FILE ...` for pictures of your own, of drawn shapes).
Hardware: any CPU, no network. Duration: under a minute.
Expected result: captions, answers with their probabilities beside the true ones, maps of where the queries look,
texts ranked against pictures.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from pathlib import Path

from demo_report.page import write_page
from demo_report.picture import draw_report
from demo_report.report import Report, percent, statement
from demo_report.results import Described, Models, describe
from demo_report.subjects import fresh_subjects, own_subjects
from transformers.utils import logging

_MOST = 8  # pictures: the grid of more cannot be read


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", nargs="+", metavar="FILE", help=f"your own pictures, at most {_MOST}")
    parser.add_argument("--questions", nargs="+", metavar="TEXT", help="to ask about your own pictures")
    parser.add_argument("--scenes", type=int, default=5, metavar="N", help=f"to draw, at most {_MOST} (default: 5)")
    parser.add_argument("--seed", type=int, help="of the scenes (default: others each time)")
    parser.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="(default: demo)")
    parser.add_argument("--caption-model", default="blip2-tiny-opt", metavar="MODEL", help="(default: %(default)s)")
    parser.add_argument("--answer-model", default="blip2-tiny-opt-vqa", metavar="MODEL", help="(default: %(default)s)")
    parser.add_argument("--match-model", default="blip2-tiny-itm", metavar="MODEL", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if not 1 <= args.scenes <= _MOST:
        parser.error(f"argument --scenes: must be 1 to {_MOST}, got {args.scenes}")
    if args.images and len(args.images) > _MOST:
        parser.error(f"argument --images: at most {_MOST}, got {len(args.images)}")
    if args.questions and not args.images:
        parser.error("argument --questions: is for --images; those about drawn scenes are drawn, too")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    logging.disable_progress_bar()
    models = Models(args.caption_model, args.answer_model, args.match_model)
    seed = secrets.randbelow(100_000) if args.seed is None else args.seed
    if args.images:
        try:
            subjects = own_subjects(args.images, args.questions or ())
        except ValueError as error:
            print(f"demo: {error}", file=sys.stderr)
            return 2
        command = "python examples/demo.py --images …"
    else:
        subjects = fresh_subjects(args.scenes, seed)
        command = f"python examples/demo.py --seed {seed}"
        print(f"{len(subjects)} scenes that no model has seen ({command} draws them again)\n")
    start = time.perf_counter()
    results, ranking = describe(subjects, models)
    report = Report(results, ranking, models, not args.images, command, time.perf_counter() - start)
    for result in results:
        print_result(result)
    for number, label in report.facts:
        print(f"{number:>8}  {label}")
    args.output.mkdir(parents=True, exist_ok=True)
    write_page(report, args.output / "report.html")
    draw_report(report).save(args.output / "report.png", optimize=True)
    print(f"\n{args.output / 'report.html'}\n{args.output / 'report.png'}")
    return 0


def print_result(result: Described) -> None:
    """A picture in a few lines."""
    subject = result.subject
    print(f"{subject.title}{f' ({subject.note})' if subject.note else ''}")
    print(f"  caption: {result.caption or '(nothing)'}")
    if result.true is not None:
        print(f"           ({statement(result)})")
    for asked in result.asked:
        answer, probability = asked.answers[0]
        verdict = {None: "", True: "   right", False: f"   WRONG, it is {asked.truth}"}[asked.right]
        print(f"  {asked.question:<52} {answer or '(nothing)':<14} {percent(probability):>6}{verdict}")
    print()


if __name__ == "__main__":
    raise SystemExit(main())
