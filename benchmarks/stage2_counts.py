"""Memory and operations of a training step of every released stage-2 model, by count on the meta device.

    python benchmarks/stage2_counts.py [--small]

One JSON line per checkpoint, at its own image size. The frozen parts are in half precision (2 bytes), what is trained
is in float32 with a float32 gradient and AdamW's two moments (4 + 4 + 8 bytes). "stage2": tower and language model
frozen; "finetuning": the tower is trained, too (tables 7 and 8); "nothing_frozen": everything trained. `checkpoint_gb`:
the file of a checkpoint with `save_connector_only` (10^9 bytes). `gflop_per_sample`: forward and backward with the
captions of `stage2_step.py`, eager attention, without recomputation. A T5's head counts as tied, as in its config; the
published Flan-T5 has a matrix of its own there (0.07B parameters in XL, 0.13B in XXL).
"""

from __future__ import annotations

import argparse
import datetime
from unittest.mock import patch

import torch
import transformers
from common import emit
from stage2_models import batch_of, parts
from torch.utils.flop_counter import FlopCounterMode

import blip2_hf
from blip2_hf.checkpoints import CHECKPOINTS

ROWS = 8
HALF, FULL = 2, 4


def gigabytes(count: int) -> float:
    return round(count / 1e9, 3)


def bytes_of(model: blip2_hf.Blip2ForConditionalGeneration) -> dict[str, float | int]:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return {
        "trained_parameters": trained,
        "frozen_parameters": frozen,
        "weights_gb": gigabytes(HALF * frozen + FULL * trained),
        "gradients_gb": gigabytes(FULL * trained),
        "optimizer_gb": gigabytes(2 * FULL * trained),
        "checkpoint_gb": gigabytes(FULL * trained),
    }


def gflop_per_sample(model: blip2_hf.Blip2ForConditionalGeneration) -> float:
    """Of forward and backward with what is trained at present."""
    for part in parts(model):
        part.set_attn_implementation("eager")
    batch = batch_of(model.config, ROWS, "meta", torch.float32)
    # Meta tensors have no values, which the model looks at to check its input, except in a graph.
    with patch("torch.compiler.is_compiling", lambda: True), FlopCounterMode(display=False) as counter:
        model.eval()(**batch).loss.backward()
    model.zero_grad()
    return round(counter.get_total_flops() / 1e9 / ROWS, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one checkpoint, for a quick check of the script")
    args = parser.parse_args()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    emit({"benchmark": "stage2_counts", "small": args.small, "date": datetime.date.today().isoformat(), **versions})
    for name, entry in CHECKPOINTS.items():
        if entry.kind != "generation":
            continue
        with torch.device("meta"):
            model = blip2_hf.Blip2ForConditionalGeneration(blip2_hf.Blip2Config.for_checkpoint(name))
        record: dict[str, object] = {"checkpoint": name, "image_size": entry.image_size}
        model.freeze_vision()
        model.freeze_language_model()
        record["stage2"] = bytes_of(model) | {"gflop_per_sample": gflop_per_sample(model)}
        model.unfreeze_vision()
        record["finetuning"] = bytes_of(model) | {"gflop_per_sample": gflop_per_sample(model)}
        model.unfreeze_language_model()
        record["nothing_frozen"] = bytes_of(model) | {"gflop_per_sample": gflop_per_sample(model)}
        emit(record)
        if args.small:
            break


if __name__ == "__main__":
    main()
