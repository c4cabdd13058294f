"""Runs of Blip2Trainer for one process or, through `distributed_worker.run`, each of several."""

from __future__ import annotations

from pathlib import Path

import torch

from blip2_hf.data.collator import ImageTextCollator
from blip2_hf.data.streaming import StreamingPairs
from blip2_hf.distributed import process_index, world_size
from blip2_hf.training.trainer import Blip2Trainer
from distributed_worker import outcomes
from tiny_sets import tiny_shards
from tiny_training import arguments, fixed_pairs, pairs, random_pair, retrieval_model, trainer

NAMES = ("loss", "loss_itc", "loss_itm", "loss_itg", "temperature", "grad_norm", "skipped_samples")
FIELDS = {"max_steps": 3, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}


def forced(samples: list[dict]) -> dict:
    """Negatives by their numbers in the global batch of four: the pair across. Each batch has skipped one sample."""
    first = process_index() * len(samples)
    numbers = (torch.arange(first, first + len(samples)) + 2) % (world_size() * len(samples))
    batch = ImageTextCollator(pad_token_id=0)(samples)
    batch |= {"negative_image_indices": numbers, "negative_text_indices": numbers}
    return batch | {"skipped": [{"reason": "blank caption", "where": "x"}]}


def map_style(folder: Path, **fields) -> Blip2Trainer:
    """Batches of four pairs over all processes, in order."""
    share = 4 // world_size()
    args = arguments(
        folder,
        per_device_train_batch_size=share,
        per_device_eval_batch_size=share,
        train_sampling_strategy="sequential",
        **{**FIELDS, **fields},
    )
    return trainer(retrieval_model(), args, fixed_pairs(8), eval_dataset=fixed_pairs(8), data_collator=forced)


def stream(folder: Path) -> Blip2Trainer:
    data = StreamingPairs(tiny_shards([5, 6, 7, 8]), random_pair, shuffle_buffer=4)
    args = arguments(folder, per_device_train_batch_size=2, **FIELDS)
    return trainer(retrieval_model(dropout=0.1), args, data)


def shuffled(folder: Path) -> Blip2Trainer:
    args = arguments(folder, per_device_train_batch_size=2, **{**FIELDS, "max_steps": 5, "save_steps": 3})
    return trainer(retrieval_model(dropout=0.1), args, pairs(16))  # two steps an epoch on two processes


def entries(run: Blip2Trainer) -> list[dict]:
    """The log of training, without times."""
    kept = [entry for entry in run.state.log_history if "loss" in entry]
    return [{name: entry[name] for name in ("step", *NAMES) if name in entry} for entry in kept]


def trained_and_evaluated(folder: Path, **fields) -> dict:
    run = map_style(folder, **fields)
    run.train()
    metrics = run.evaluate()
    wanted = {name: value for name, value in metrics.items() if "loss" in name or "recall" in name}
    return {"log": entries(run), "eval": wanted}


def resumed(make, folder: Path, step: int) -> dict:
    whole, again = make(folder), make(folder)
    whole.train()
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return {"log": entries(whole), "resumed": entries(again)}


def on_each_process(folder: Path) -> dict:
    return outcomes(
        {
            "map": lambda: trained_and_evaluated(folder / "map"),
            "stream": lambda: resumed(stream, folder / "stream", 2),
            "shuffled": lambda: resumed(shuffled, folder / "shuffled", 3),
        }
    )
