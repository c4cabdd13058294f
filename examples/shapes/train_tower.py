"""A vision tower for the generated world, trained without any caption, from scenes drawn on the fly.

    python examples/shapes/train_tower.py --size base --output-dir towers/base
    python examples/shapes/train_tower.py --size small --output-dir towers/small

Each patch learns to say which shape, colour, size and texture covers it and where that thing's centre is, the class
token which (shape, colour) pairs and how many things there are; the linear heads for it are thrown away. The folder is
what `--vision` of run_stage1.py takes. Started again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tower_targets import (
    ATTRIBUTES,
    AXES,
    COMBINATIONS,
    COUNTS,
    IGNORED,
    PLACES,
    TowerBatches,
    classes,
    collate,
    unseen_scenes,
)
from training_loop import LoopOptions, add_options, finish, finished, options_of, train

from blip2_hf import Blip2ImageProcessor, Blip2VisionConfig, Blip2VisionModel
from blip2_hf.data.shapes.scenes import HELD_OUT, SIDE, Scene

PATCH = 12
SIZES: dict[str, dict[str, int]] = {
    "base": {"hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 5},
    "small": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 3},
}
TRAINING: dict[str, dict[str, float]] = {
    "base": {"steps": 10000, "batch_size": 32, "learning_rate": 2e-3, "warmup": 300},
    "small": {"steps": 1200, "batch_size": 128, "learning_rate": 2e-3, "warmup": 100},
}
# Of the background among the classes of a patch: most patches show nothing else.
_BACKGROUND_WEIGHT = 0.1
_SET_THRESHOLD = 0.0  # logit


class TowerWithHeads(nn.Module):
    """A tower and what it is trained by: linear heads on patches and class token (see `tower_targets.targets`)."""

    def __init__(self, config: Blip2VisionConfig, image_processor: Blip2ImageProcessor):
        super().__init__()
        self.tower = Blip2VisionModel(config)
        width = config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes(name)) for name in ATTRIBUTES})
        self.heads.update({name: nn.Linear(width, PLACES) for name in AXES})
        self.heads["centre"] = nn.Linear(width, 2)
        self.heads["set"] = nn.Linear(width, COMBINATIONS)
        self.heads["count"] = nn.Linear(width, COUNTS)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in _statistics(image_processor))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        for attribute in ATTRIBUTES:
            weight = torch.ones(classes(attribute))
            weight[0] = _BACKGROUND_WEIGHT if classes(attribute) > len(ATTRIBUTES[attribute]) else 1.0
            self.register_buffer(f"{attribute}_weight", weight, persistent=False)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits [B, P, classes] or [B, classes] of each head, in float32, for uint8 pictures."""
        tokens = self.tower((pixels.float() - self.mean) / self.std).last_hidden_state
        whole = ("set", "count")
        return {
            name: head(tokens[:, 0] if name in whole else tokens[:, 1:]).float() for name, head in self.heads.items()
        }

    def losses(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The mean loss of each head, and their sum."""
        found = self(batch["pixels"])
        losses = {
            name: functional.cross_entropy(
                found[name].flatten(0, 1), batch[name].flatten(), getattr(self, f"{name}_weight"), ignore_index=IGNORED
            )
            for name in ATTRIBUTES
        }
        losses |= {
            name: functional.cross_entropy(found[name].flatten(0, 1), batch[name].flatten(), ignore_index=IGNORED)
            for name in AXES
        }
        there = ~batch["centre"].isnan().any(dim=-1)
        losses["centre"] = functional.smooth_l1_loss(found["centre"][there], batch["centre"][there])
        rows = functional.binary_cross_entropy_with_logits(found["set"], batch["set"], reduction="none").sum(dim=-1)
        losses["set"] = rows.mean() / 5  # about as much as a patch's loss
        losses["count"] = functional.cross_entropy(found["count"], batch["count"])
        return {**losses, "loss": torch.stack(list(losses.values())).sum()}


def _statistics(image_processor: Blip2ImageProcessor) -> tuple[list[float], list[float]]:
    return list(image_processor.image_mean), list(image_processor.image_std)


@torch.no_grad()
def accuracies(model: TowerWithHeads, scenes: list[Scene], options: LoopOptions) -> dict[str, float]:
    """How often each head is right on scenes: patches that show a thing ("shape", …), patches that are background
    or not ("thing"), whole scenes ("set", "count"); "centre" is a mean distance in pixels."""
    right: dict[str, list[torch.Tensor]] = {}
    patch = model.tower.config.patch_size
    for start in range(0, len(scenes), options.batch_size):
        batch = collate(scenes[start : start + options.batch_size], patch)
        batch = {name: tensor.to(options.device) for name, tensor in batch.items()}
        with options.autocast():
            found = model(batch["pixels"])
        there = ~batch["centre"].isnan().any(dim=-1)
        scored = {name: (found[name].argmax(dim=-1) == batch[name])[there] for name in (*ATTRIBUTES, *AXES)}
        known = batch["shape"] != IGNORED
        scored["thing"] = ((found["shape"].argmax(dim=-1) == 0) == (batch["shape"] == 0))[known]
        scored["centre"] = (found["centre"] - batch["centre"])[there].norm(dim=-1) * patch
        scored["set"] = ((found["set"] > _SET_THRESHOLD) == batch["set"].bool()).all(dim=-1)
        scored["count"] = found["count"].argmax(dim=-1) == batch["count"]
        for name, values in scored.items():
            right.setdefault(name, []).append(values.float().cpu())
    return {name: round(torch.cat(values).mean().item(), 4) for name, values in right.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="base")
    add_options(parser)
    arguments = parser.parse_args(argv)
    folder = Path(arguments.output_dir)
    if report := finished(folder):
        print(f"{folder} is complete")
        return report
    options = options_of(arguments, TRAINING[arguments.size])
    torch.manual_seed(options.seed)
    config = Blip2VisionConfig(**SIZES[arguments.size], image_size=SIDE, patch_size=PATCH)
    image_processor = Blip2ImageProcessor(size=SIDE)
    model = TowerWithHeads(config, image_processor).to(options.device)
    batches = TowerBatches(options.steps, options.batch_size, PATCH, options.seed)
    seconds = train(model, model.losses, batches, options, folder)
    model.tower.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    unseen = {
        "scenes": unseen_scenes(arguments.eval_samples, options.seed),
        "combinations": unseen_scenes(arguments.eval_samples, options.seed, needed=HELD_OUT),
    }
    report = {
        "size": arguments.size,
        "parameters": sum(parameter.numel() for parameter in model.tower.parameters()),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "seconds_of_last_start": round(seconds, 1),
        "accuracies": {name: accuracies(model, scenes, options) for name, scenes in unseen.items()},
    }
    finish(folder, report)
    print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
