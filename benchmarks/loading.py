"""Time and memory of `from_pretrained`, and of importing a model class: ours against the installed `transformers`.

    python benchmarks/loading.py [--repeats 5] [--threads 2] [--small] [--family opt|t5] [--cases CASE ...]

Loading, a case per precision of the file and of the model (float32-bfloat16): both load the same checkpoint folder, in
a fresh process each time that has imported the class, in turns, with the file in the page cache. A JSON line per case:
`seconds` of `from_pretrained`, `ready_seconds` until every weight has been read once (`time_ratio` is theirs over ours,
median over the rounds), `started_seconds` the same with importing the class before it (`started_ratio`): modules that
theirs imports with the class, such as those of the Auto classes, are imported by ours when a language model is made.
(The base classes are imported before either.) `imported_by_loading` counts the modules that `from_pretrained` imports.
Memory is the most that the process needed beyond what it had before, over the bytes of the weights in the loaded model:
`peak_over_weights` all of it, with the pages of the file that are mapped; `anonymous_over_weights` without these, which
the system can take back at any time (sampled in a round that is not timed). Both must give the same weights.

Importing (case `import`), a line per class: seconds of CPU time (`cpu_seconds`, `time_ratio`) and on the clock
(`seconds`) of `from LIBRARY import CLASS` in a fresh process, of its `base` classes in `transformers` alone and of
`torch` alone, in turns; `modules` that it loads. `collected_ratio` counts a full garbage collection behind it, too, as
ours imports without one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import add_measuring_arguments, emit, memory_of_process, on_cpu, randomise, ratio, reset_peak_rss, setting

LIBRARIES = {"ours": "blip2_hf", "theirs": "transformers"}
# Precision of the file, precision of the model.
LOADS = (
    "float32-float32",
    "float32-bfloat16",
    "float32-float16",
    "bfloat16-float32",
    "float16-float32",
    "float16-float16",
)
MODELS = ("Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval", "Blip2QFormerModel")
IMPORT_PROBE = """
import gc, json, sys, time
modules, wall, cpu = len(sys.modules), time.perf_counter(), time.process_time()
exec(sys.argv[1])
gc.collect(0)  # would come with the next objects that are made
result = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
gc.collect()
print(json.dumps({**result, "collected": time.process_time() - cpu, "modules": len(sys.modules) - modules}))
"""


def write_checkpoints(folder: Path, args: argparse.Namespace) -> None:
    """A random checkpoint as `transformers` writes it, in a folder per precision that the cases need."""
    import torch
    from generation import SMALL_SIDE, language_config
    from transformers import Blip2Config, Blip2ForConditionalGeneration
    from transformers.initialization import no_init_weights

    config = Blip2Config(
        vision_config={**SMALL_SIDE, "image_size": 56} if args.small else {"num_hidden_layers": 4},
        qformer_config={**SMALL_SIDE, "vocab_size": 100} if args.small else {"vocab_size": 100},
        text_config=language_config(args.family, args.small).to_dict(),
        image_token_index=5,
    )
    with no_init_weights():
        model = Blip2ForConditionalGeneration(config)
    randomise(model)
    for dtype in ("float32", "bfloat16", "float16"):
        if any(case.startswith(f"{dtype}-") for case in args.cases):
            model.to(getattr(torch, dtype)).save_pretrained(folder / dtype, max_shard_size="1GB")


class MostAnonymous(threading.Thread):
    """Samples how much memory of the process is no mapped file; the most of it is `bytes`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.bytes = max(self.bytes, memory_of_process("RssAnon"))


def load_once(library: str, folder: str, dtype: str, sampled: str) -> dict[str, float]:
    """One load, in this process; what it measured."""
    import torch

    start = time.perf_counter()
    cls = __import__(library, fromlist=["x"]).Blip2ForConditionalGeneration
    imported, modules = time.perf_counter() - start, len(sys.modules)
    if not reset_peak_rss():
        raise SystemExit("the peak memory of a process can be measured on Linux only")
    before, anonymous = memory_of_process("VmRSS"), memory_of_process("RssAnon")
    sampler = MostAnonymous()
    if sampled == "sampled":
        sampler.start()
    begin = time.perf_counter()
    model = cls.from_pretrained(folder, dtype=getattr(torch, dtype))
    loaded = time.perf_counter()
    modules = len(sys.modules) - modules
    # Sums of the bits, so that each weight is read; they are equal only if the weights are. In pieces, as a sum of
    # integers makes copies of 64 bits.
    bits, weights, total = {2: torch.int16, 4: torch.int32}, 0, 0
    for weight in model.parameters():
        weights += weight.numel() * weight.element_size()
        for piece in weight.detach().view(bits[weight.element_size()]).view(-1).split(2**18):
            total += piece.sum().item()
    ready = time.perf_counter()
    sampler.done.set()
    return {
        "seconds": loaded - begin,
        "ready_seconds": ready - begin,
        "started_seconds": imported + ready - begin,
        "imported_by_loading": modules,
        "peak": (memory_of_process("VmHWM") - before) / weights,
        "anonymous": (sampler.bytes - anonymous) / weights,
        "bytes": weights,
        "sum": total,
    }


def in_fresh_process(*arguments: str) -> dict[str, float]:
    """What Python prints when it is started with these arguments."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def middle(results: dict[str, list[dict]], field: str, digits: int = 3) -> dict[str, float]:
    return {name: round(statistics.median(each[field] for each in rows), digits) for name, rows in results.items()}


def ratio_of(results: dict[str, list[dict]], field: str) -> tuple[float, list[float]]:
    return ratio({name: [each[field] for each in results[name]] for name in LIBRARIES})


def measure_loading(folder: Path, case: str, args: argparse.Namespace) -> dict[str, object]:
    stored, dtype = case.split("-")
    files = list((folder / stored).glob("*.safetensors"))
    results: dict[str, list[dict]] = {name: [] for name in LIBRARIES}
    sampled = {}
    for index in range(args.repeats + 1):
        for name in LIBRARIES if index % 2 == 0 else reversed(LIBRARIES):
            options = (LIBRARIES[name], str(folder / stored), dtype, "" if index else "sampled")
            result = in_fresh_process(__file__, "--load-once", *options)
            if index:
                results[name].append(result)
            else:  # fills the page cache
                sampled[name] = result
    if len({row["sum"] for column in results.values() for row in column}) != 1:
        raise SystemExit(f"{case}: the weights differ")
    time_ratio, extremes = ratio_of(results, "ready_seconds")
    started_ratio, started_extremes = ratio_of(results, "started_seconds")
    return {
        "stored_as": stored,
        "load_as": dtype,
        "family": args.family,
        "file_mb": round(sum(file.stat().st_size for file in files) / 2**20),
        "weights_mb": round(sampled["ours"]["bytes"] / 2**20),
        "time_ratio": time_ratio,
        "time_ratio_range": extremes,
        "started_ratio": started_ratio,
        "started_ratio_range": started_extremes,
        "imported_by_loading": {name: sampled[name]["imported_by_loading"] for name in LIBRARIES},
        "peak_over_weights": middle(results, "peak", 2),
        "anonymous_over_weights": {name: round(sampled[name]["anonymous"], 2) for name in LIBRARIES},
        **{field: middle(results, field) for field in ("seconds", "ready_seconds", "started_seconds")},
    }


def measure_import(model: str, repeats: int) -> dict[str, object]:
    bases = "PreTrainedModel, GenerationMixin" if "Generation" in model else "PreTrainedModel"
    statements = {name: f"from {library} import {model}" for name, library in LIBRARIES.items()}
    statements |= {"base": f"from transformers import {bases}", "torch": "import torch"}
    results: dict[str, list[dict]] = {name: [] for name in statements}
    for index in range(repeats):
        for name in statements if index % 2 == 0 else reversed(statements):
            results[name].append(in_fresh_process("-c", IMPORT_PROBE, statements[name]))
    time_ratio, extremes = ratio_of(results, "cpu_seconds")
    return {
        "imported": model,
        "time_ratio": time_ratio,
        "time_ratio_range": extremes,
        "collected_ratio": ratio_of(results, "collected")[0],
        **{field: middle(results, field) for field in ("cpu_seconds", "seconds")},
        "modules": {name: rows[0]["modules"] for name, rows in results.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measuring_arguments(parser, repeats=5)
    parser.add_argument("--family", default="opt", choices=["opt", "t5"], help="language model of the checkpoint")
    parser.add_argument("--cases", nargs="+", choices=[*LOADS, "import"], default=[*LOADS, "import"], metavar="CASE")
    parser.add_argument("--load-once", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load_once:
        emit(load_once(*args.load_once))
        return
    if args.small:
        args.cases = [case for case in args.cases if case in (*LOADS[:2], "import")]
    emit({"benchmark": "loading", **setting(on_cpu(args))})
    if loads := [case for case in args.cases if case != "import"]:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoints(Path(folder), args)
            for case in loads:
                emit(measure_loading(Path(folder), case, args))
    if "import" in args.cases:
        for model in MODELS[: 1 if args.small else 3]:
            emit(measure_import(model, args.repeats))


if __name__ == "__main__":
    main()
