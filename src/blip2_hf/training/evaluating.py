"""Evaluation of representation learning by `Blip2Trainer`: a few numbers per pair, the same at every call."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from ..distributed import world_size
from .metrics import pair_rows
from .progress import BatchRecords


class EvaluationMixin:
    """For `Trainer`."""

    _evaluation_records: BatchRecords | None = None
    _evaluation_generator: torch.Generator | None = None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer`'s, the same at every call: epoch 0 of the data, and negatives drawn from `seed`."""
        if hasattr(dataloader, "set_epoch"):
            dataloader.set_epoch(0)
        self._evaluation_records = BatchRecords()
        seed = self.args.seed + self.args.process_index
        self._evaluation_generator = torch.Generator(self.args.device).manual_seed(seed)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        counts = self._counts(self._evaluation_records)
        output.metrics.update({f"{metric_key_prefix}_{name}": count for name, count in counts.items()})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Representation learning: no loss (it is one of the metrics, exact also for a smaller last batch), the rows
        of `pair_rows` without `ignore_keys`, and [n] how many texts of the batch match each image."""
        if isinstance(inputs, MutableMapping):
            (self._evaluation_records or BatchRecords()).take(inputs)
        if not self._learns_representation:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        tokens = self._target_tokens(inputs)
        processes = world_size()  # as counts, so that the losses are plain sums
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self._representation_outputs(model, inputs, processes, processes, self._evaluation_generator)
        if prediction_loss_only:
            config, pairs = self._plain_model().config, len(tokens)
            parts = {"itc": (outputs.loss_itc, pairs), "itm": (outputs.loss_itm, pairs)}
            parts["itg"] = (outputs.loss_itg, tokens.sum())
            losses = [getattr(config, f"{k}_weight") * v / n for k, (v, n) in parts.items() if v is not None]
            return sum(losses).detach(), None, None
        rows = pair_rows(outputs, tokens)
        for name in ignore_keys or ():
            rows.pop(name, None)
        return None, rows, outputs.positives.sum(dim=1)
