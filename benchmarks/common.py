"""The harness of the benchmarks: measuring in turns, floating point operations, peak memory, the setting they ran in.

A benchmark prints a line that says what its results depend on (`setting`), then one JSON line per case. Both sides get
the same weights and inputs and take turns in one process; a script checks that their outputs are equal before it
measures, which warms them up, too.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import PIL
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import PreTrainedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every benchmark of models takes."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add_measuring_arguments(parser, repeats=5)


def add_measuring_arguments(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Options of all, also of those that have neither a device nor a dtype to choose (see `on_cpu`)."""
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds per case")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch on the CPU")
    parser.add_argument("--small", action="store_true", help="small inputs, for a quick check of the script")


def on_cpu(args: argparse.Namespace, dtype: str = "float32") -> argparse.Namespace:
    """What `setting` wants to know of a benchmark without `--device` and `--dtype`."""
    return argparse.Namespace(**vars(args), device="cpu", dtype=dtype)


def setting(args: argparse.Namespace) -> dict[str, object]:
    """What a result depends on; applies `--threads`."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    import blip2_hf  # here, as loading.py measures how long that takes

    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else name_of_processor(),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "repeats": args.repeats,
        "small": args.small,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
        "blip2_hf": blip2_hf.__version__,
    }


def name_of_processor() -> str:
    """Its maker's name where the kernel tells (Linux), else the kind."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def emit(record: dict[str, object]) -> None:
    print(json.dumps(record), flush=True)


def seconds(run: Callable[[], object], device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def in_turns(runs: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each, measured in turns; who goes first changes from round to round. (Run each once before.)"""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(repeats):
        order = list(runs) if index % 2 == 0 else list(reversed(runs))
        for name in order:
            times[name].append(seconds(runs[name], device))
    return times


def ratio(times: dict[str, list[float]], of: str = "theirs") -> tuple[float, list[float]]:
    """Of `of` over "ours", round by round: the median, and the smallest and the largest."""
    rounds = [a / b for a, b in zip(times[of], times["ours"], strict=True)]
    return round(statistics.median(rounds), 2), [round(min(rounds), 2), round(max(rounds), 2)]


def compared(times: dict[str, list[float]], digits: int = 3) -> dict[str, object]:
    """For a case's record: `time_ratio` (theirs over ours), its `time_ratio_range`, median `seconds` of each."""
    middle, extremes = ratio(times)
    return {
        "time_ratio": middle,
        "time_ratio_range": extremes,
        "seconds": {name: round(statistics.median(values), digits) for name, values in times.items()},
    }


def flops(run: Callable[[], object], *models: nn.Module) -> int:
    """Of one run, with eager attention and torch's own products meanwhile: on the CPU the counter sees neither fused
    kernels nor oneDNN's."""
    # One by one: in transformers 5.17 setting the whole leaves parts as they are that have a config of the same kind.
    parts = [part for model in models for part in model.modules() if isinstance(part, PreTrainedModel)]
    chosen = [part.config._attn_implementation for part in parts]
    for part in parts:
        part.set_attn_implementation("eager")
    try:
        with without_onednn(), FlopCounterMode(display=False) as counter:
            run()
    finally:
        for part, name in zip(parts, chosen, strict=True):
            part.set_attn_implementation(name)
    return counter.get_total_flops()


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """What blip2_hf (and torch itself, for convolutions) would compute with oneDNN is computed without."""
    enabled, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """Memory that one run needs beyond what was held before; None where it cannot be measured."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not reset_peak_rss():
        return None
    before = memory_of_process("VmRSS")
    run()
    return memory_of_process("VmHWM") - before


def held_bytes(device: str) -> int:
    """Memory that is held now: on a GPU that of tensors, on the CPU that of the whole process (0 if unknown)."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return memory_of_process("VmRSS") if Path("/proc/self/status").exists() else 0


def peak_mb(runs: dict[str, Callable[[], object]], device: str) -> dict[str, int | None]:
    """`peak_bytes` of each, in MiB."""
    peak = {name: peak_bytes(run, device) for name, run in runs.items()}
    return {name: None if value is None else round(value / 2**20) for name, value in peak.items()}


def reset_peak_rss() -> bool:
    """Makes the kernel count the process's peak memory from now on (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory would hide a need for new
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory_of_process(field: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights as of a fresh model (matrices N(0, 0.02), norms 1, biases 0), with queries and positions drawn too."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.fill_(float("norm" in name.lower() and name.endswith("weight")))
    return model.eval()
