"""The whole stage-1 step of ours: frozen ViT-g in half precision on 224-pixel images, the three losses under autocast,
backward, AdamW. Called by `stage1_step.py --whole`.

One JSON line per batch size: `samples_per_second` (median over the rounds), `mfu` the share of the device's peak,
counting the floating point operations of the model (tower forward; Q-Former forward and backward; eager attention, so
that what fused kernels recompute does not count), `paper_ratio` to the paper's rate: 250,000 steps of 1,680 images in
"less than 6 days" on 16 A100 (40 GB), so at least 50 images per second and GPU (sec. 3.4); `held_mb` what weights and
optimiser take (on the CPU: the process), `peak_mb` what a step needs beyond that. With `--largest`, the last line is
for the largest batch (a multiple of 16) whose step fits. With `--compile`, every batch size is measured once more with
the tower compiled by torch.compile in that mode ("reduce-overhead": as CUDA graphs).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import torch
from common import flops, held_bytes, peak_bytes, randomise, seconds
from limits import STEP, fits, largest_batch, peak_flops
from stage1_step import captions

import blip2_hf

ORIGINAL_BATCH = 100  # per GPU in the original's recipe
COUNTED_BATCH = 8


def whole_config(small: bool) -> blip2_hf.Blip2Config:
    qformer = {"vocab_size": 30523, "use_qformer_text_input": True}
    if not small:
        return blip2_hf.Blip2Config(qformer_config=qformer)
    shape = {"hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 384}
    return blip2_hf.Blip2Config(vision_config={**shape, "image_size": 56}, qformer_config={**qformer, **shape})


class WholeStep:
    """A model with its optimiser; the tower frozen and in half precision, what is trained in float32."""

    def __init__(self, args: argparse.Namespace):
        self.device, self.dtype = args.device, getattr(torch, args.dtype)
        config = whole_config(args.small)
        with torch.device(self.device):
            self.model = randomise(blip2_hf.Blip2ForImageTextRetrieval(config))
        with torch.no_grad():
            self.model.temperature.fill_(config.temperature_init)
        self.model.freeze_vision()
        self.model.vision_model.to(self.dtype)
        self.model.vision_model.post_layernorm.float()
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.05, fused=True)
        # As Trainer does for float16: without it, small gradients would be lost.
        self.scaler = torch.amp.GradScaler(self.device, enabled=args.dtype == "float16")

    def inputs(self, batch: int) -> dict[str, torch.Tensor]:
        size, text = self.model.config.vision_config.image_size, self.model.config.qformer_config
        pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.dtype)
        inputs = {"pixel_values": pixels, **captions(batch, text.vocab_size)}
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def forward_backward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(self.device, self.dtype):
            loss = self.model(**inputs, return_loss=True).loss
        self.scaler.scale(loss).backward()
        return loss

    def __call__(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = self.forward_backward(inputs).detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss

    def holds(self, batch: int) -> bool:
        """Whether two steps run (the second finds memory as the first left it)."""

        def steps() -> None:
            inputs = self.inputs(batch)
            self(inputs)
            self(inputs)

        found = fits(steps)
        self.optimizer.zero_grad()
        return found


def measure_whole(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Records for `--batch-sizes`, default the original's, and with `--largest` for the largest that fits.

    Raises:
        SystemExit: in float32, which the tower is not run in, and if a loss is not finite.
    """
    if args.dtype == "float32":
        raise SystemExit("--whole runs the tower in half precision: give --dtype bfloat16 or float16")
    step = WholeStep(args)
    counted = step.inputs(COUNTED_BATCH)
    operations = flops(lambda: step.forward_backward(counted), step.model.qformer, step.model.vision_model)
    operations /= COUNTED_BATCH
    step.optimizer.zero_grad()
    step(counted)  # makes the optimiser's state, which takes memory
    sizes = list(args.batch_sizes or (ORIGINAL_BATCH,))
    for batch in sizes:
        yield {"tower": "eager"} | measure_batch(step, batch, operations, args)
    if args.largest is not None:
        largest = largest_batch(step.holds, most=args.largest)
        while largest and not step.holds(largest):  # memory is not divided in the same way each time
            largest -= STEP
        record = {"tower": "eager", "largest_batch": largest}
        yield record | (measure_batch(step, largest, operations, args) if largest else {})
    if args.compile is not None:
        step.model.vision_model.compile(mode=args.compile, dynamic=False)
        for batch in sizes:
            yield {"tower": f"compiled ({args.compile})"} | measure_batch(step, batch, operations, args)


def measure_batch(step: WholeStep, batch: int, operations: float, args: argparse.Namespace) -> dict[str, object]:
    inputs = step.inputs(batch)
    for _ in range(2):  # the first may compile
        loss = step(inputs).item()
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise SystemExit(f"the loss is {loss} at batch {batch}")
    taken = statistics.median(seconds(lambda: step(inputs), args.device) for _ in range(args.repeats))
    held, needed, peak = held_bytes(args.device), peak_bytes(lambda: step(inputs), args.device), peak_flops(args)
    return {
        "batch": batch,
        "loss": round(loss, 3),
        "seconds": round(taken, 4),
        "samples_per_second": round(batch / taken, 1),
        "paper_ratio": round(batch / taken / 50, 2),
        "gflop_per_sample": round(operations / 1e9, 2),
        "mfu": None if peak is None else round(operations * batch / taken / peak, 3),
        "held_mb": round(held / 2**20),
        "peak_mb": None if needed is None else round(needed / 2**20),
    }
