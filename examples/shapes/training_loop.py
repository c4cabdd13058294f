"""The loop that trains a tower or a language model from nothing: resumable, on any device, with a log.

What a step trains on is a function of (seed, step) alone, so a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from blip2_hf.modeling.attention import eager_if, slow_backward

STATE, LOG, REPORT = "state.pt", "log.jsonl", "report.json"
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoopOptions:
    """How a model is trained.

    Attributes:
        steps, batch_size: optimiser steps, and samples in each.
        learning_rate: the peak of a cosine that ends at 0, after `warmup` steps of linear rise.
        weight_decay: of AdamW, for matrices alone.
        seed: of the weights and of what each step trains on.
        precision: "float32", or "bfloat16" for autocast.
        device: "cpu", "cuda", …
        workers: processes that make the batches; 0: this one does.
        save_seconds: least time between two states on disk.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int
    weight_decay: float = 0.05
    seed: int = 0
    precision: str = "float32"
    device: str = "cpu"
    workers: int = 1
    save_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2

    def autocast(self) -> torch.autocast:
        dtype = PRECISIONS[self.precision]
        return torch.autocast(torch.device(self.device).type, dtype, enabled=dtype is not None)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a script that override those of the size that it trains."""
    parser.add_argument("--output-dir", required=True, help="folder of the model, its log and its report")
    parser.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, help="samples of a step")
    parser.add_argument("--learning-rate", type=float, help="peak of the cosine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that make the batches")
    parser.add_argument("--eval-samples", type=int, default=1000, help="unseen samples to report on")


def options_of(arguments: argparse.Namespace, defaults: dict[str, Any]) -> LoopOptions:
    """`defaults` with what the command line has."""
    given = {name: getattr(arguments, name) for name in ("steps", "batch_size", "learning_rate")}
    fixed = {name: getattr(arguments, name) for name in ("seed", "precision", "device", "workers")}
    chosen = {**defaults, **fixed, **{name: value for name, value in given.items() if value is not None}}
    return LoopOptions(**{**chosen, "warmup": min(chosen["warmup"], max(1, chosen["steps"] // 10))})


def finished(folder: Path) -> dict[str, Any] | None:
    """The report of a run that is complete."""
    path = folder / REPORT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def finish(folder: Path, report: dict[str, Any]) -> None:
    """Writes the report, which says that the run is complete, and removes the state."""
    unfinished = folder / f"{REPORT}.unfinished"
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / REPORT)
    (folder / STATE).unlink(missing_ok=True)


def train(
    model: nn.Module,
    losses_of: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    batches: Dataset,
    options: LoopOptions,
    folder: Path,
) -> float:
    """Trains `model` in place.

    Args:
        model: on `options.device`.
        losses_of: named losses of a batch (on the device), of which "loss" is minimised.
        batches: item `step` is the batch of that step, a dictionary of CPU tensors.
        options: how.
        folder: for the state and the log; a state that is there is gone on from.

    Returns:
        The seconds of this call's steps.

    Raises:
        ValueError: a state that other options wrote; a loss that is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98))
    first = _load_state(model, optimizer, options, folder)
    loader = DataLoader(
        torch.utils.data.Subset(batches, range(first, options.steps)),
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=4 if options.workers else None,
    )
    model.train()
    slow = slow_backward(options.device, PRECISIONS[options.precision])
    started = saved = logged = time.monotonic()
    sums: dict[str, torch.Tensor] = {}
    since = 0
    every = max(1, min(100, options.steps // 20))
    for step, batch in enumerate(loader, start=first):
        for group in optimizer.param_groups:
            group["lr"] = options.rate(step)
        fast = eager_if(slow, model) if isinstance(model, PreTrainedModel) else contextlib.nullcontext()
        with options.autocast(), fast:
            losses = losses_of({name: tensor.to(options.device) for name, tensor in batch.items()})
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.detach()
        since += 1
        now = time.monotonic()
        if since == every or step + 1 == options.steps:
            entry = {"step": step + 1, **{name: round(float(total) / since, 4) for name, total in sums.items()}}
            entry["samples_per_second"] = round(since * options.batch_size / (now - logged), 1)
            _log(folder, entry, options.steps)
            sums, since, logged = {}, 0, now
        if now - saved > options.save_seconds and step + 1 < options.steps:
            _save_state(model, optimizer, options, folder, step + 1)
            saved = time.monotonic()
    _save_state(model, optimizer, options, folder, options.steps)
    model.eval()
    return time.monotonic() - started


def _log(folder: Path, entry: dict[str, float], steps: int) -> None:
    if not math.isfinite(entry["loss"]):
        raise ValueError(f"the loss is {entry['loss']} at step {entry['step']}: make `learning_rate` smaller")
    with open(folder / LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    values = " ".join(f"{name} {value:g}" for name, value in entry.items() if name != "step")
    print(f"{entry['step']}/{steps} {values}", flush=True)


def _identity(options: LoopOptions) -> dict[str, Any]:
    """What a state must have been trained with to be gone on from."""
    return {name: value for name, value in asdict(options).items() if name not in ("workers", "save_seconds", "device")}


def _save_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, options: LoopOptions, folder: Path, step: int
) -> None:
    unfinished = folder / f"{STATE}.unfinished"
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save({**state, "options": _identity(options)}, unfinished)
    os.replace(unfinished, folder / STATE)


def _load_state(model: nn.Module, optimizer: torch.optim.Optimizer, options: LoopOptions, folder: Path) -> int:
    """The step to go on from."""
    path = folder / STATE
    if not path.is_file():
        (folder / LOG).unlink(missing_ok=True)
        return 0
    state = torch.load(path, map_location=options.device, weights_only=True)
    if state["options"] != _identity(options):
        raise ValueError(
            f"{path} was trained with {state['options']}, not with {_identity(options)}: remove the folder to start "
            "anew, or give the same options to go on"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"going on from step {state['step']}", flush=True)
    return state["step"]
