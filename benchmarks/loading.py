"""Time and memory of `from_pretrained`: ours against the installed `transformers`, the same checkpoint folder.

    python benchmarks/loading.py [--repeats 5] [--threads 2] [--small] [--family opt|t5]

Each load happens in a fresh process that imports the class first, in turns, with the file in the page cache. One JSON
line per case: `seconds` of `from_pretrained`, `ready_seconds` until every weight has been read once (`time_ratio` is
theirs over ours, median over the rounds), `import_seconds` of the class, `peak_over_file` the most memory that the
load needed over the size of the file(s). Both must give the same weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import add_measuring_arguments, emit, memory_of_process, on_cpu, randomise, ratio, reset_peak_rss, setting

CLASSES = {"ours": "blip2_hf", "theirs": "transformers"}


def write_checkpoint(folder: Path, args: argparse.Namespace) -> int:
    """A random checkpoint as `transformers` writes it, in float32; returns the bytes of its weights."""
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
    randomise(model).save_pretrained(folder, max_shard_size="1GB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load_once(library: str, folder: str, dtype: str) -> dict[str, float]:
    """One load, in this process; prints what it measured."""
    import torch

    start = time.perf_counter()
    cls = __import__(library, fromlist=["x"]).Blip2ForConditionalGeneration
    imported = time.perf_counter()
    if not reset_peak_rss():
        raise SystemExit("the peak memory of a process can be measured on Linux only")
    before = memory_of_process("VmRSS")
    begin = time.perf_counter()
    model = cls.from_pretrained(folder, dtype=getattr(torch, dtype))
    loaded = time.perf_counter()
    # Sums of the bits, so that each weight is read; they are equal only if the weights are.
    bits = {2: torch.int16, 4: torch.int32}
    total = sum(weight.detach().view(bits[weight.element_size()]).sum().item() for weight in model.parameters())
    return {
        "import_seconds": imported - start,
        "seconds": loaded - begin,
        "ready_seconds": time.perf_counter() - begin,
        "peak": memory_of_process("VmHWM") - before,
        "weights": total,
    }


def in_fresh_process(library: str, folder: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--load-once", library, str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{library} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, size: int, dtype: str, repeats: int) -> dict[str, object]:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CLASSES}
    for index in range(repeats + 1):
        for name in CLASSES if index % 2 == 0 else reversed(CLASSES):
            result = in_fresh_process(CLASSES[name], folder, dtype)
            if index:  # the first round fills the page cache
                results[name].append(result)
    if len({result["weights"] for column in results.values() for result in column}) != 1:
        raise SystemExit(f"{dtype}: the weights differ")

    def median(name: str, field: str) -> float:
        return statistics.median(result[field] for result in results[name])

    ready = {name: [result["ready_seconds"] for result in column] for name, column in results.items()}
    middle, extremes = ratio(ready)
    fields = ("seconds", "ready_seconds", "import_seconds")
    return {
        "load_as": dtype,
        "file_mb": round(size / 2**20),
        "time_ratio": middle,
        "time_ratio_range": extremes,
        "peak_over_file": {name: round(median(name, "peak") / size, 2) for name in CLASSES},
        **{field: {name: round(median(name, field), 3) for name in CLASSES} for field in fields},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measuring_arguments(parser, repeats=5)
    parser.add_argument("--family", default="opt", choices=["opt", "t5"], help="language model of the checkpoint")
    parser.add_argument("--load-once", nargs=3, metavar=("LIBRARY", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load_once:
        emit(load_once(*args.load_once))
        return
    emit({"benchmark": "loading", "family": args.family, **setting(on_cpu(args))})
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder), args)
        for dtype in ("float32", "bfloat16", "float16")[: 1 if args.small else 3]:
            emit(measure(Path(folder), size, dtype, args.repeats))


if __name__ == "__main__":
    main()
