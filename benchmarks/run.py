"""Runs the benchmarks, each in a process of its own.

    python benchmarks/run.py [--device cpu|cuda] [--threads 2] [--only NAME ...] [--output-dir benchmarks/results]
    python benchmarks/run.py --quick

Appends what a benchmark prints to DATE-NAME-DEVICE.jsonl in the output directory once it has succeeded; then
`python benchmarks/report.py` puts the newest results into the documentation. The whole takes hours on a CPU, and other
programs on the machine spoil it.

With `--quick`, small inputs and one round: about two minutes that show that every script runs and that its outputs
equal those of the peer. Nothing is written, as such times say nothing. The exit status is 1 if a benchmark fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmark_results import FOLDER

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Benchmark:
    """A script with its options; a script may be here more than once."""

    script: str
    device: str  # where the result belongs: "cpu", "cuda", or "meta" for what is counted without any
    options: str | None = ""  # of a whole run; None: not part of it
    quick: str | None = "--small --repeats 1"  # of a quick run

    @property
    def name(self) -> str:
        return self.script.removesuffix("_cases").replace("_", "-")  # (a script called profile would hide Python's)

    def command(self, *, quick: bool, threads: int | None) -> list[str]:
        options = (self.quick if quick else self.options) or ""
        command = [sys.executable, str(HERE / f"{self.script}.py"), *options.split()]
        if self.device != "meta" and threads is not None:
            command += ["--threads", str(threads)]
        return command + (["--device", "cuda"] if self.device == "cuda" else [])


ALL_ANSWERS = "--cases vqa-short vqa caption questions"
FEW_PAIRS = "--small --repeats 1 --images 16 --texts 40 --k 8 --sample 1"
FULL_STEP = (
    "--dtype bfloat16 --batch-sizes 64 --largest 1024 --models blip2-opt-2.7b blip2-flan-t5-xl blip2-flan-t5-xxl"
)
FULL_ANSWERS = (
    "--dtype bfloat16 --cases vqa-short vqa caption --batch-sizes 8 64 --models blip2-opt-2.7b blip2-flan-t5-xl "
    "--compile default"
)
FEW_ANSWERS = "--small --repeats 1 --dtype bfloat16 --cases caption --batch-sizes 2 --models blip2-opt-2.7b"
WHOLE_STEP = "--small --repeats 1 --whole --dtype bfloat16 --batch-sizes 8 --largest 16"
BENCHMARKS = (
    Benchmark("augmentation", "cpu"),
    Benchmark("processor", "cpu"),
    Benchmark("loading", "cpu", "--repeats 5"),
    Benchmark("conversion", "cpu"),
    Benchmark("stage2_counts", "meta", quick="--small"),
    Benchmark(
        "generation",
        "cpu",
        f"{ALL_ANSWERS} --models opt t5 t5-large",
        f"--small --repeats 1 {ALL_ANSWERS}",
    ),
    Benchmark("generation", "cpu", None, FEW_ANSWERS),
    Benchmark("stage1_step", "cpu", "--repeats 3", "--small --repeats 1 --batch-sizes 8"),
    Benchmark("stage1_step", "cpu", None, WHOLE_STEP),
    Benchmark("stage2_step", "cpu", "--batch-sizes 2 --repeats 7", "--small --repeats 1 --batch-sizes 2 --largest 16"),
    Benchmark("retrieval", "cpu", "--repeats 3 --k 32 128", FEW_PAIRS),
    Benchmark("folder", "cpu", quick="--small --repeats 1 --photos 1MP --images 4 --batch-size 2"),
    Benchmark("profile_cases", "cpu"),
    Benchmark("generation", "cuda", f"{ALL_ANSWERS} --models opt t5 t5-large"),
    Benchmark("generation", "cuda", f"{ALL_ANSWERS} --models opt t5 t5-large --dtype bfloat16", None),
    Benchmark("generation", "cuda", FULL_ANSWERS, FEW_ANSWERS),
    Benchmark("stage1_step", "cuda", "--repeats 3"),
    Benchmark("stage1_step", "cuda", "--dtype bfloat16 --batch-sizes 16 100", None),
    Benchmark("stage1_step", "cuda", "--whole --dtype bfloat16 --largest 4096 --compile default", WHOLE_STEP),
    Benchmark("stage2_step", "cuda", FULL_STEP, "--small --repeats 1 --dtype bfloat16 --batch-sizes 2 --largest 16"),
    Benchmark("retrieval", "cuda", "--repeats 3 --k 32 128", FEW_PAIRS),
    Benchmark("retrieval", "cuda", "--repeats 3 --k 128 --dtype bfloat16", f"{FEW_PAIRS} --dtype bfloat16"),
    Benchmark("folder", "cuda", "--dtype float16", "--small --repeats 1 --photos 1MP --images 4 --batch-size 2"),
    Benchmark("profile_cases", "cuda", "--dtype bfloat16"),
)


def chosen(device: str, only: list[str] | None, *, quick: bool) -> list[Benchmark]:
    """Those of a device; "meta" goes with "cpu"."""
    devices = ("cpu", "meta") if device == "cpu" else (device,)
    rest = [each for each in BENCHMARKS if each.device in devices and (only is None or each.name in only)]
    return [each for each in rest if (each.quick if quick else each.options) is not None]


def run(benchmark: Benchmark, *, quick: bool, threads: int | None) -> list[str] | None:
    """Its lines, which are shown as they come; None if it fails."""
    command, lines = benchmark.command(quick=quick, threads=threads), []
    print("$", "python", f"benchmarks/{benchmark.script}.py", *command[2:], flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    records = [json.loads(line) for line in lines if line.startswith("{")]
    measured = [record for record in records if "benchmark" not in record]
    return None if process.returncode or len(records) < len(lines) or not measured else lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument("--only", nargs="+", choices=sorted({each.name for each in BENCHMARKS}), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small inputs, one round, nothing written")
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    args = parser.parse_args(argv)
    failed = []
    for benchmark in chosen(args.device, args.only, quick=args.quick):
        begin = time.perf_counter()
        lines = run(benchmark, quick=args.quick, threads=args.threads)
        print(f"# {benchmark.name}: {time.perf_counter() - begin:.0f} s\n", flush=True)
        if lines is None:
            failed.append(benchmark.name)
        elif not args.quick:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            path = args.output_dir / f"{datetime.date.today().isoformat()}-{benchmark.name}-{benchmark.device}.jsonl"
            with path.open("a", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
