"""Converts a checkpoint: the original's `.pth`, `transformers`' BLIP-2 or InstructBLIP, or ours, into another layout.

    python conversion/convert.py blip2_pretrained_opt2.7b.pth --to blip2-opt-2.7b \\
        --tower eva_vit_g.pth --llm facebook/opt-2.7b --dtype float16

docs/checkpoints.md has a command for every released checkpoint. Exit codes: 0 done; 1 it could not be done, or what was
made is not equal to its source; 2 wrong arguments. Nothing is written over, and an unfinished or unequal result never
gets the target's name.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script, from wherever
    ROOT = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(ROOT)]  # in place of this folder, whose modules have common names
    sys.path.append(str(ROOT / "src"))

if TYPE_CHECKING:
    from conversion.job import Job


class NotEqual(Exception):
    """What was made is not equal to what it was made from."""


def build_parser() -> argparse.ArgumentParser:
    """The options; docs/checkpoints.md explains them at length."""
    parser = argparse.ArgumentParser(
        prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help=".pth file of the original, folder, Hub id or short name")
    add("--to", required=True, type=Path, metavar="DIR", help="folder to make (--layout lavis: .pth file)")
    add("--layout", choices=("ours", "transformers", "lavis"), default="ours", help="of the result (default: ours)")
    add("--model", metavar="NAME", help="released checkpoint that SOURCE is, if its names and shapes do not tell")
    add("--config", metavar="FILE", help="config.json for a .pth of shapes that were never released")
    add("--tower", metavar="PATH", help="file or folder of the frozen tower, for a .pth without it")
    add("--llm", metavar="PATH", help="folder or Hub id of the language model, for a .pth of stage 2")
    add("--text", metavar="PATH", help="folder or Hub id of BERT, for the tokenizer (default: bert-base-uncased)")
    dtypes = ("float32", "float16", "bfloat16")
    add("--dtype", choices=dtypes, help="of tower and language model (default: as in their files)")
    add("--trained-dtype", choices=dtypes, help="of everything else (default: as in SOURCE)")
    add("--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="of a file of weights (default: 5GB)")
    add("--bridge-only", action="store_true", help="--layout lavis: without the frozen tower")
    add("--push-to-hub", metavar="ID", help="upload the finished folder to this repository")
    add("--dry-run", action="store_true", help="print the plan and stop: nothing is written")
    add("--no-verify", action="store_true", help="do not run both models to compare them")
    add("--verbose", action="store_true", help="show warnings and tracebacks of the libraries")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Raises:
        SystemExit: for `--help` (0) and wrong arguments (2), as argparse does it.
    """
    args = build_parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, _stop) if _in_main_thread() else None
    try:
        return _run(args)
    except NotEqual as error:
        _say_error(error)
        return 1
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        if args.verbose:
            raise
        _say_error(error)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _run(args: argparse.Namespace) -> int:
    with _quiet(args.verbose):
        from conversion.job import Request, prepare
        from conversion.plan_text import plan_text
        from conversion.precisions import DTYPES
        from conversion.writing import check_target, unfinished_beside

        request = Request(
            source=args.source,
            to=args.to,
            layout=args.layout,
            model=args.model,
            config=args.config,
            llm=args.llm,
            tower=args.tower,
            text=args.text,
            dtype=None if args.dtype is None else DTYPES[args.dtype],
            trained_dtype=None if args.trained_dtype is None else DTYPES[args.trained_dtype],
            max_shard_bytes=args.max_shard_size,
            bridge_only=args.bridge_only,
            push_to_hub=args.push_to_hub,
        )
        job = prepare(request)
        print(plan_text(job), flush=True)
        for left in unfinished_beside(request.to):
            print(f"note: {left} is left over from a run that was killed, or belongs to one at work")
        if args.dry_run:
            print("dry run: nothing was written")
            return 0
        check_target(request.to, job.space)
        _convert(job, verified=not args.no_verify)
        print(f"done: {request.to}", flush=True)
        if request.push_to_hub is not None:
            print(f"uploaded: {_upload(request.to, request.push_to_hub)}")
    return 0


def _convert(job: Job, verified: bool) -> None:
    from conversion.results import write_folder, write_lavis_file
    from conversion.writing import finished_file_or_nothing, finished_or_nothing

    place = finished_file_or_nothing if job.request.layout == "lavis" else finished_or_nothing
    write = write_lavis_file if job.request.layout == "lavis" else write_folder
    job.run_checks()
    with place(job.request.to) as made:
        write(job, made, _progress)
        if verified:
            _verify(job, made)


def _verify(job: Job, made: Path) -> None:
    from conversion.results import can_run, read_back, sides
    from conversion.verify import verify

    if job.request.layout == "lavis":
        read_back(job, made)
        print("converted back: every tensor is equal bit for bit")
    if not can_run(job):
        print("not run: give what the file lacks (`--tower`, `--llm`) to compare the models")
        return
    print("running both models …", flush=True)
    report = verify(*sides(job, made))
    print(str(report).replace(str(made), str(job.request.to)), flush=True)
    if not report.equal:
        raise NotEqual("what was made is not equal to its source; it was removed (`--no-verify` would keep it)")


def _upload(folder: Path, repo_id: str) -> str:
    from blip2_hf.hub import push_folder

    try:
        return str(push_folder(folder, repo_id))
    except Exception as error:  # of the Hub's client and of the library it speaks HTTP with
        raise RuntimeError(f"{folder} is finished, but was not uploaded to {repo_id}: {error}") from error


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{100 * done // max(total, 1):3d} % written", end=end, file=sys.stderr, flush=True)


def _size(text: str) -> int:
    from conversion.writing import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _quiet(verbose: bool) -> Any:
    from blip2_hf.cli.common import quiet_libraries

    return quiet_libraries(argparse.Namespace(verbose=verbose))


def _say_error(error: BaseException) -> None:
    from blip2_hf.cli.common import one_line

    print(f"convert: {one_line(error)}", file=sys.stderr, flush=True)


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def _stop(*_: object) -> None:
    raise SystemExit(143)  # so that what is unfinished is removed


if __name__ == "__main__":
    sys.exit(main())
