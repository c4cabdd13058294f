"""The whole stage-1 step of ours: frozen ViT-g in half precision on 224-pixel images, the three losses under autocast,
backward, AdamW. Called by `stage1_step.py --whole`.

One JSON line per batch size: `samples_per_second` (median over the rounds), `mfu` the share of the device's peak,
counting the floating point operations of the model (tower forward; Q-Former forward and backward; eager attention, so
that what fused kernels recompute does not count), `paper_ratio` to the paper's rate: 250,000 steps of 1,680 images in
"less than 6 days" on 16 A100 (40 GB), so at least 50 images per second and GPU (sec. 3.4). The last line is for the
largest batch (a multiple of `STEP`) whose step fits.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import torch
from common import flops, peak_bytes, randomise, seconds
from stage1_step import captions

import blip2_hf

# Dense half-precision TFLOP/s as the makers state them.
PEAK_TFLOPS = {"A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "4090": 165}
ORIGINAL_BATCH = 100  # per GPU in the original's recipe
COUNTED_BATCH, STEP, MOST = 8, 16, 4096


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
        self.model = randomise(blip2_hf.Blip2ForImageTextRetrieval(config))
        with torch.no_grad():
            self.model.temperature.fill_(config.temperature_init)
        self.model.freeze_vision()
        self.model.vision_model.to(self.dtype)
        self.model.vision_model.post_layernorm.float()
        self.model.to(self.device).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.05, fused=self.device == "cuda" or None)
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

    def fits(self, batch: int) -> bool:
        """Whether two steps run (the second finds memory as the first left it)."""
        try:
            inputs = self.inputs(batch)
            self(inputs)
            self(inputs)
            return True
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()

    def largest_batch(self) -> int:
        """The largest multiple of `STEP` that fits, at most `MOST`; 0 if none does."""
        good, bad = 0, MOST + STEP
        trial = STEP
        while bad - good > STEP:
            good, bad = (trial, bad) if self.fits(trial) else (good, trial)
            trial = min(2 * trial, MOST) if bad > MOST else (good + bad) // (2 * STEP) * STEP
        return good


def peak_flops(args: argparse.Namespace) -> float | None:
    if args.peak_tflops is not None:
        return args.peak_tflops * 1e12
    name = torch.cuda.get_device_name() if args.device == "cuda" else ""
    known = [value for part, value in PEAK_TFLOPS.items() if part in name]
    return known[0] * 1e12 if known else None


def measure_whole(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Records for `--batch-sizes`, default the original's and the largest that fits (CUDA only).

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
    for batch in args.batch_sizes or (ORIGINAL_BATCH,):
        yield measure_batch(step, batch, operations, args)
    if not args.batch_sizes and args.device == "cuda":
        largest = step.largest_batch()
        yield {"largest_batch": largest} | (measure_batch(step, largest, operations, args) if largest else {})


def measure_batch(step: WholeStep, batch: int, operations: float, args: argparse.Namespace) -> dict[str, object]:
    inputs = step.inputs(batch)
    loss = step(inputs).item()
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise SystemExit(f"the loss is {loss} at batch {batch}")
    taken = statistics.median(seconds(lambda: step(inputs), args.device) for _ in range(args.repeats))
    needed, peak = peak_bytes(lambda: step(inputs), args.device), peak_flops(args)
    return {
        "batch": batch,
        "loss": round(loss, 3),
        "seconds": round(taken, 4),
        "samples_per_second": round(batch / taken, 1),
        "paper_ratio": round(batch / taken / 50, 2),
        "gflop_per_sample": round(operations / 1e9, 2),
        "mfu": None if peak is None else round(operations * batch / taken / peak, 3),
        "peak_mb": None if needed is None else round(needed / 2**20),
    }
