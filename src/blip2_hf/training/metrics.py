"""Evaluation of representation learning from a few numbers per pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..configuration import Blip2Config
from ..outputs import Blip2ImageTextMatchingModelOutput

LOSSES = ("loss_itc", "loss_itm", "loss_itg")


def pair_rows(output: Blip2ImageTextMatchingModelOutput, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is kept of a batch of n pairs, each float32 [n].

    Args:
        output: of `forward(return_loss=True)` whose losses are sums over this process's pairs and tokens
            (`num_pairs_in_batch` and `num_items_in_batch` the number of processes).
        tokens: [n] tokens to generate of each text.

    Returns:
        "loss_itc", "loss_itm", "loss_itg": equal shares of the sums; "tokens"; "image_to_text", "text_to_image": 1
        where the most similar of the batch matches; "itm_correct" of "itm_rows" pairs classified rightly. What the
        model does not compute is absent.
    """
    count = len(tokens)
    rows = {"tokens": tokens.float()}
    for name in LOSSES:
        loss = getattr(output, name)
        if loss is not None:
            rows[name] = (loss.float() / count).repeat(count)
    for name, logits in (("image_to_text", output.logits_per_image), ("text_to_image", output.logits_per_text)):
        if logits is not None:
            best = logits.argmax(dim=1, keepdim=True)
            rows[name] = output.positives.gather(1, best)[:, 0].float()
    if output.itm_logits is not None:
        right = (output.itm_logits.argmax(dim=-1) == output.itm_labels).view(-1, count)
        rows["itm_correct"] = right.sum(dim=0).float()
        rows["itm_rows"] = torch.full_like(rows["itm_correct"], len(right))
    return rows


def pair_metrics(rows: Mapping[str, np.ndarray], config: Blip2Config) -> dict[str, float]:
    """Metrics of all pairs, from `pair_rows` of all batches put together.

    Returns:
        "loss_itc", "loss_itm": means over pairs; "loss_itg": mean over tokens; "loss": their weighted sum;
        "itc_recall_image_to_text", "itc_recall_text_to_image": recall at 1 within the batch, so comparable only
        between batches of one size; "itm_accuracy": of true pairs and hard negatives.
    """
    rows = {name: np.asarray(values, dtype=np.float64) for name, values in rows.items()}
    metrics: dict[str, float] = {}
    total = 0.0
    for name in LOSSES:
        if name in rows:
            count = rows["tokens"].sum() if name == "loss_itg" else len(rows[name])
            metrics[name] = float(rows[name].sum() / count)
            total += getattr(config, name.removeprefix("loss_") + "_weight") * metrics[name]
    metrics["loss"] = total
    for name in ("image_to_text", "text_to_image"):
        if name in rows:
            metrics[f"itc_recall_{name}"] = float(rows[name].mean())
    if "itm_rows" in rows:
        metrics["itm_accuracy"] = float(rows["itm_correct"].sum() / rows["itm_rows"].sum())
    return metrics


def retrieval_metrics(config: Blip2Config) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` for `Blip2ForImageTextRetrieval`."""

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return pair_metrics(_joined(prediction.predictions), config)

    return compute_metrics


def _joined(predictions: Any) -> Mapping[str, np.ndarray]:
    """With `eval_do_concat_batches=False`, a list of batches."""
    if isinstance(predictions, Mapping):
        return predictions
    return {name: np.concatenate([batch[name] for batch in predictions]) for name in predictions[0]}
