"""What a device can do at most: its peak of operations per second, and the largest batch that fits into its memory."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable

import torch

# Dense half-precision TFLOP/s as the makers state them; the first name that is in the device's counts.
PEAK_TFLOPS = {"A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250} | {
    "L40S": 362,
    "4090": 165,
}
STEP, MOST = 16, 4096
MODES = ("default", "reduce-overhead", "max-autotune")  # of torch.compile; the second: as CUDA graphs


def peak_flops(args: argparse.Namespace) -> float | None:
    """Per second, of `--peak-tflops` or of a known GPU in half precision; None if it is not known."""
    if args.peak_tflops is not None:
        return args.peak_tflops * 1e12
    name = torch.cuda.get_device_name() if args.device == "cuda" and args.dtype != "float32" else ""
    known = [value for part, value in PEAK_TFLOPS.items() if part in name]
    return known[0] * 1e12 if known else None


def fits(run: Callable[[], object]) -> bool:
    """Whether `run()` finds enough memory on the GPU. What it has left there is given back."""
    found = True
    try:
        run()
    except RuntimeError as error:
        # cuBLAS reports its own want of memory as another kind of error.
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise
        found = False
    # Only here, behind the `except`, nothing holds the tensors of the functions that were interrupted.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def largest_batch(holds: Callable[[int], bool], step: int = STEP, most: int = MOST) -> int:
    """The largest multiple of `step`, at most `most`, that `holds`; 0 if none does."""
    good, bad, trial = 0, most // step * step + step, step
    doubling = True
    while bad - good > step:
        if holds(trial):
            good = trial
        else:
            bad, doubling = trial, False
        trial = min(2 * trial, bad - step) if doubling else (good + bad) // (2 * step) * step
    return good
