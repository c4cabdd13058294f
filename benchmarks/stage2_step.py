"""One training step of stage 2: ours against `transformers`' BLIP-2 in the same loop, on the same parameters.

    python benchmarks/stage2_step.py [--models blip2-opt-2.7b ...] [--batch-sizes 8 ...] [--flops-only] [--size reduced]
    python benchmarks/stage2_step.py --device cuda --dtype bfloat16 --batch-sizes 64 --largest 1024 \\
        --models blip2-opt-2.7b blip2-flan-t5-xl blip2-flan-t5-xxl

Frozen tower and language model (no dropout), forward, backward, AdamW (fused, Trainer's default) on what is trained;
random weights, random pictures, captions of `stage1_step.CAPTION_LENGTHS` tokens padded to the longest. The peer is
`transformers.Blip2ForConditionalGeneration` around the very same parameters, the frozen ones with
`requires_grad=False`. Losses must be equal, and the gradients of everything trained (in half precision as a whole).

`--size`: "full" (the released sizes; default on cuda), "reduced" (Q-Former, image and vocabulary of full size, smaller
tower and language model; default on the CPU) or "small" (also with `--small`, to check the script). In half precision
the frozen parts are held in it, the rest in float32 under autocast.

One JSON line per model and batch size. `time_ratio`: median of their time over ours, round by round; `cpu_time_ratio`:
likewise of the process's own time, which others on the machine disturb less; `held_mb`: weights and optimiser state
(on the CPU: the process); `peak_mb`: what a step needs beyond that; `saved_mb`: what autograd keeps of the forward pass
for the backward, by count; `gflop_forward`: of `counted_batch` rows, by part of the model; `gflop_step_per_sample`:
forward and backward; `flop_share`: ours over theirs; `mfu`: share of the device's peak with the operations of ours, in
half precision on cuda. With `--largest`, a last line per model says which batches (multiples of 16) fit. A batch that
does not is said to be `out_of_memory`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from common import add_arguments, compared, emit, flops, held_bytes, peak_mb, ratio, seconds, setting
from limits import fits, largest_batch, peak_flops
from stage2_models import SIZES, batch_of, config_of, ours, parts, theirs
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

MODELS = ("blip2-opt-2.7b", "blip2-flan-t5-xl")
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # relative; of gradients in the 2-norm
COUNTED_BATCH = 4


class Case:
    """Both models on one batch."""

    def __init__(self, models: dict[str, nn.Module], optimizer: torch.optim.Optimizer, rows: int, args):
        self.models, self.optimizer, self.args = models, optimizer, args
        self.trained = [p for p in models["ours"].parameters() if p.requires_grad]
        self.inputs = batch_of(models["ours"].config, rows, args.device, getattr(torch, args.dtype))

    def forward(self, name: str) -> torch.Tensor:
        dtype = getattr(torch, self.args.dtype)
        with torch.autocast(self.args.device, dtype, enabled=dtype != torch.float32):
            return self.models[name](**self.inputs).loss

    def forward_backward(self, name: str) -> torch.Tensor:
        loss = self.forward(name)
        loss.backward()
        return loss.detach()

    def step(self, name: str) -> torch.Tensor:
        loss = self.forward_backward(name)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def check_equal(self) -> dict[str, float]:
        """Relative differences of the loss, of the whole gradient, and of the tensor that differs most.

        Raises:
            SystemExit: if they are beyond `TOLERANCE`, or something frozen has a gradient.
        """
        losses, gradients = [], []
        for name in ("ours", "theirs"):
            losses.append(self.forward_backward(name).item())
            gradients.append([parameter.grad.clone() for parameter in self.trained])
            if any(p.grad is not None for p in self.models[name].parameters() if not p.requires_grad):
                raise SystemExit(f"a frozen parameter of {name} has a gradient")
            self.optimizer.zero_grad()
        ours_all, theirs_all = (torch.cat([gradient.flatten() for gradient in part]) for part in gradients)
        largest = max(gradient.norm() for gradient in gradients[1])
        difference = {
            "loss": abs(losses[0] / losses[1] - 1),
            "gradient": ((ours_all - theirs_all).norm() / theirs_all.norm()).item(),
            "worst_tensor": max(
                ((a - b).norm() / b.norm()).item()
                for a, b in zip(*gradients, strict=True)
                if b.norm() > 1e-5 * largest  # the rest, keys' biases, is rounding
            ),
        }
        for kind, value in difference.items():
            # In half precision single tensors differ: ours has `post_layernorm` and its gradient in float32.
            checked = kind != "worst_tensor" or self.args.dtype == "float32"
            if checked and not value <= TOLERANCE[self.args.dtype]:  # so that NaN fails, too
                raise SystemExit(f"{kind} differs by {value:.1e} (relative)")
        return {"at": losses[0], **difference}

    def saved_bytes(self, name: str) -> int:
        """Of storages that autograd holds after a forward pass, without those of the parameters."""
        known = {parameter.untyped_storage().data_ptr() for parameter in self.models[name].parameters()}
        known |= {tensor.untyped_storage().data_ptr() for tensor in self.inputs.values()}
        held: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                held[storage.data_ptr()] = storage
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.forward(name)
        total = sum(storage.nbytes() for storage in held.values())
        del loss
        return total

    def forward_flops(self, name: str) -> dict[str, float]:
        """GFLOP of a forward pass by part of the model."""
        model = self.models[name]
        counter = FlopCounterMode(display=False)
        before: dict[nn.Module, int] = {}
        found: dict[str, int] = {}
        hooks = []
        named = zip(("tower", "qformer", "language_model"), parts(model), strict=True)
        for part, module in (*named, ("language_head", model.language_model.lm_head)):

            def enter(module: nn.Module, _args) -> None:
                before[module] = counter.get_total_flops()

            def leave(module: nn.Module, _args, _output, part: str = part) -> None:
                found[part] = found.get(part, 0) + counter.get_total_flops() - before[module]

            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

        def run() -> None:
            with counter:
                self.forward(name)

        flops(run, *parts(model))  # for its eager attention
        for hook in hooks:
            hook.remove()
        found["language_model"] -= found["language_head"]
        return {part: round(value / 1e9, 2) for part, value in found.items()}


def timed(runs: dict[str, Callable[[], object]], repeats: int, device: str) -> tuple[dict, dict]:
    """Seconds of each run by the clock and of the process alone, in turns as `common.in_turns`."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    alone: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(repeats):
        for name in list(runs) if index % 2 == 0 else list(reversed(runs)):
            before = time.process_time()
            times[name].append(seconds(runs[name], device))
            alone[name].append(time.process_time() - before)
    return times, alone


def measure(case: Case, name: str, rows: int, gflop: dict[str, float], args: argparse.Namespace) -> dict[str, object]:
    difference = case.check_equal()  # warms up as well
    record: dict[str, object] = {
        "model": name,
        "batch": rows,
        "loss": round(difference.pop("at"), 4),
        "relative_difference": {kind: float(f"{value:.1e}") for kind, value in difference.items()},
        "saved_mb": {who: round(case.saved_bytes(who) / 2**20, 1) for who in case.models},
    }
    if not args.flops_only:
        runs: dict[str, Callable[[], object]] = {who: lambda who=who: case.step(who) for who in case.models}
        for run in runs.values():
            run()
        times, processor_times = timed(runs, args.repeats, args.device)
        taken = {who: statistics.median(values) for who, values in times.items()}
        device_peak = peak_flops(args)
        record |= {
            **compared(times, digits=4),
            "cpu_time_ratio": ratio(processor_times)[0],
            "samples_per_second": {who: round(rows / value, 2) for who, value in taken.items()},
            "mfu": None if device_peak is None else round(gflop["ours"] * 1e9 * rows / taken["ours"] / device_peak, 3),
            "held_mb": round(held_bytes(args.device) / 2**20),
            "peak_mb": peak_mb(runs, args.device),
        }
    return record


def measured(
    models: dict[str, nn.Module], optimizer: torch.optim.Optimizer, name: str, rows: int, gflop: dict[str, float], args
) -> dict[str, object]:
    """The record of `measure`, or that there was not enough memory for it."""
    record: dict[str, object] = {}

    def run() -> None:
        record.update(measure(Case(models, optimizer, rows, args), name, rows, gflop, args))

    if fits(run):
        return record
    optimizer.zero_grad()
    return {"model": name, "batch": rows, "out_of_memory": True}


def largest(models: dict[str, nn.Module], optimizer: torch.optim.Optimizer, most: int, args) -> dict[str, int]:
    """Batches that fit, of both: two steps run (the second finds memory as the first left it)."""

    def holds(who: str, rows: int) -> bool:
        def steps() -> None:
            case = Case(models, optimizer, rows, args)
            case.step(who)
            case.step(who)

        found = fits(steps)
        optimizer.zero_grad()
        return found

    return {who: largest_batch(lambda rows, who=who: holds(who, rows), most=most) for who in models}


def counted(models: dict[str, nn.Module], optimizer: torch.optim.Optimizer, args: argparse.Namespace):
    """GFLOP per sample of a step of both, and what goes into the record; for rows of `COUNTED_BATCH`."""
    case = Case(models, optimizer, COUNTED_BATCH, args)
    step = {}
    for who, model in models.items():
        step[who] = flops(lambda who=who: case.forward_backward(who), *parts(model)) / 1e9 / COUNTED_BATCH
        optimizer.zero_grad()
    record = {
        "counted_batch": COUNTED_BATCH,
        "gflop_forward": {who: case.forward_flops(who) for who in models},
        "gflop_step_per_sample": {who: round(value, 2) for who, value in step.items()},
        "flop_share": round(step["ours"] / step["theirs"], 3),
    }
    return step, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--models", nargs="+", default=MODELS, help="short names of released stage-2 checkpoints")
    parser.add_argument("--size", choices=SIZES, help="default: full on cuda, reduced on the CPU")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="default: 64 on cuda, 8 on the CPU")
    parser.add_argument("--largest", type=int, metavar="MOST", help="look for the largest batch up to it")
    parser.add_argument("--flops-only", action="store_true", help="compare and count, without timing")
    parser.add_argument("--peak-tflops", type=float, help="of the device, if it is not a known one")
    args = parser.parse_args()
    if args.dtype not in TOLERANCE:
        raise SystemExit(f"--dtype must be float32 or bfloat16 (a T5 overflows in float16), got {args.dtype}")
    cuda = args.device == "cuda"
    size = "small" if args.small else args.size or ("full" if cuda else "reduced")
    transformers.utils.logging.set_verbosity_error()
    emit({"benchmark": "stage2_step", "size": size, **setting(args)})
    for name in args.models:
        model = ours(config_of(name, size), args.device, getattr(torch, args.dtype))
        models = {"ours": model, "theirs": theirs(model)}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.05, fused=True)
        gflop, record = counted(models, optimizer, args)
        for rows in args.batch_sizes or ((64,) if cuda else (8,)):
            emit(measured(models, optimizer, name, rows, gflop, args) | record)
        if args.largest is not None:
            emit({"model": name, "largest_batch": largest(models, optimizer, args.largest, args)})
        del model, models, trained, optimizer
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
