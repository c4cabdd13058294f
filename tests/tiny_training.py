"""A tiny set of pairs, a tiny model and a Trainer that learns from them, for tests of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from blip2_hf.data.collator import ImageTextCollator
from blip2_hf.data.pairs import ImageTextPairs
from blip2_hf.training.arguments import Blip2TrainingArguments
from blip2_hf.training.trainer import Blip2Trainer
from tiny_models import QFORMER, QUERIES, VISION, randomised
from tiny_sets import number_of, tiny_samples

IMAGE_SIZE = 28


def random_pair(image, caption: str, rng: np.random.Generator) -> dict:
    """Pixels and tokens that depend on the image, its caption, epoch and index."""
    base = np.random.default_rng([number_of(image), len(caption)])
    pixels = base.normal(size=(3, IMAGE_SIZE, IMAGE_SIZE)) + 0.1 * rng.normal(size=(3, IMAGE_SIZE, IMAGE_SIZE))
    words = base.integers(110, 290, size=int(rng.integers(1, 6))).tolist()
    return {"pixel_values": pixels.astype(np.float32), "input_ids": [101, *words, 102]}


def pairs(count: int = 12, seed: int = 0) -> ImageTextPairs:
    return ImageTextPairs(tiny_samples(count, captions=2), random_pair, seed=seed)


class Fixed(Dataset):
    """The same samples in every epoch."""

    def __init__(self, samples: list[dict]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return dict(self.samples[index])


def fixed_pairs(count: int = 8) -> Fixed:
    source = pairs(count)
    samples = [source.example(index, 0) for index in range(count)]
    return Fixed([{key: value for key, value in sample.items() if key != "image_id"} for sample in samples])


def retrieval_model(dropout: float = 0.0, tower: dict = VISION, **fields):
    from blip2_hf.configuration import Blip2Config
    from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval

    config = Blip2Config(
        vision_config=tower,
        qformer_config={
            **QFORMER,
            "use_qformer_text_input": True,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
        },
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
        **fields,
    )
    model = randomised(Blip2ForImageTextRetrieval(config))
    with torch.no_grad():
        model.temperature.fill_(0.5)  # random small weights give nothing to sharpen
    model.freeze_vision()
    return model


def arguments(output_dir: Path, **fields) -> Blip2TrainingArguments:
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return Blip2TrainingArguments(output_dir=str(output_dir), **{**defaults, **fields})


def trainer(model, args: Blip2TrainingArguments, train: Dataset | None = None, **options) -> Blip2Trainer:
    collator = options.pop("data_collator", ImageTextCollator(pad_token_id=0))
    return Blip2Trainer(model, args, collator, train, **options)


def logged(run: Blip2Trainer, *names: str) -> list[tuple]:
    """The training entries of the log: step and the values asked for."""
    return [(e["step"], *(e[name] for name in names)) for e in run.state.log_history if "loss" in e]
