"""Trains and evaluates everything on the generated world, from nothing, with the public example scripts.

    python examples/shapes/run_all.py --output-dir shapes                 # hours on two CPU cores, minutes on a GPU
    python examples/shapes/run_all.py --output-dir shapes --quick         # a tiny pass, to see that everything runs
    python examples/shapes/run_all.py --output-dir shapes --only stage1   # a group or a step and nothing else
    python examples/shapes/run_all.py --output-dir shapes --list          # the commands

Each step is marked in done/ with its command and its seconds; started again, the run goes on with the first one that is
not, and that one with its last checkpoint. The findings of the paper (--only findings, --seeds 3) are not part of the
whole run unless --findings is given. Tables, figures and model cards (results/, shipped/) are made anew each time:
--only results. The group easy-vqa needs the package of that name (pip install easy-vqa) and is left out without it.
docs/shapes.md says more.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from easy_vqa_files import missing
from steps import EXAMPLES, GROUPS, Settings, Step, all_steps


def marker(folder: Path, step: Step) -> Path:
    return folder / "done" / f"{step.name.replace('/', '.')}.json"


def command(step: Step) -> list[str]:
    """What is run in the folder of the run."""
    return [sys.executable, str(EXAMPLES / step.script), *step.options]


def identity(step: Step) -> list[str]:
    """The command as it is marked: without what is of this machine."""
    return [step.script, *(option.replace(str(EXAMPLES), "examples") for option in step.options)]


def is_done(folder: Path, step: Step) -> bool:
    """Whether the step is marked as done, and need not be run again.

    Raises:
        ValueError: with another command: the results would not be those of this one.
    """
    path = marker(folder, step)
    if step.always or not path.is_file():
        return False
    before = json.loads(path.read_text(encoding="utf-8"))["command"]
    if before != identity(step):
        raise ValueError(
            f"{path} is of another command, {shlex.join(before)}, not {shlex.join(identity(step))}: remove it and what "
            "the step wrote to run it again, or give another `--output-dir`"
        )
    return True


def run_step(folder: Path, step: Step) -> None:
    """
    Raises:
        SystemExit: if the command fails, with its exit code.
    """
    started = time.monotonic()
    print(f"== {step.name}: {shlex.join([step.script, *step.options])}", flush=True)
    parts = [str(EXAMPLES), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    paths = os.pathsep.join(os.path.abspath(part) for part in parts)
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": paths}
    code = subprocess.run(command(step), cwd=folder, env=environment, check=False).returncode
    if code:
        print(f"{step.name} ended with {code}", file=sys.stderr)
        raise SystemExit(code)
    path = marker(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = round(time.monotonic() - started, 1)
    path.write_text(json.dumps({"command": identity(step), "seconds": seconds}, indent=1) + "\n", encoding="utf-8")
    print(f"== {step.name}: {seconds:.0f} s", flush=True)


def chosen(steps: list[Step], only: list[str], findings: bool) -> list[Step]:
    """The steps that are asked for: groups, names, or all.

    Raises:
        ValueError: for what is neither.
    """
    if unknown := sorted(set(only) - set(GROUPS) - {step.name for step in steps}):
        raise ValueError(f"`only` must be groups ({', '.join(GROUPS)}) or names of steps (--list), got {unknown}")
    if only:
        return [step for step in steps if step.group in only or step.name in only]
    left_out = set() if findings else {"findings"}
    if reason := missing():
        print(f"== easy-vqa is left out: {reason}", file=sys.stderr)
        left_out.add("easy-vqa")
    return [step for step in steps if step.group not in left_out]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help=f"names, or of {', '.join(GROUPS)}")
    parser.add_argument("--quick", action="store_true", help="a tiny pass through everything")
    parser.add_argument("--findings", action="store_true", help="the paper's findings, too")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each finding")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of autocast")
    parser.add_argument("--workers", type=int, default=1, help="processes that make the batches")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    arguments = parser.parse_args(argv)
    settings = Settings(
        device=arguments.device,
        precision=arguments.precision,
        quick=arguments.quick,
        seeds=arguments.seeds,
        workers=arguments.workers,
    )
    steps = chosen(all_steps(settings), arguments.only, arguments.findings)
    folder = Path(arguments.output_dir).resolve()
    if arguments.list:
        for step in steps:
            print(f"{step.group} {step.name}: {shlex.join([step.script, *step.options])}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, start=1):
        if is_done(folder, step):
            print(f"== {step.name}: done before ({number}/{len(steps)})", flush=True)
        else:
            run_step(folder, step)
            print(f"{number}/{len(steps)} steps", flush=True)


if __name__ == "__main__":
    main()
