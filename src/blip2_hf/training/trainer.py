"""`Trainer` for both BLIP-2 models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..data.streaming import ExampleStream
from ..modeling.attention import eager_if, slow_backward
from ..modeling.generation import Blip2ForConditionalGeneration
from ..modeling.retrieval import Blip2ForImageTextRetrieval
from ..processing import Blip2Processor
from .arguments import Blip2TrainingArguments
from .checkpoints import discard, is_complete, last_complete_checkpoint
from .checks import check_collator, check_generation, check_representation_learning, prepare_model
from .evaluating import EvaluationMixin
from .generating import target_mask
from .loading import LoadersMixin, check_evaluation_set, set_epoch
from .metrics import LOSSES, generation_metrics, retrieval_metrics
from .optimizer import is_decayed, parameter_groups
from .precision import trained_beside_quantised
from .progress import BatchRecords, TrainingProgress
from .sample_texts import SampleTextsMixin
from .saving import SavingMixin
from .sharding import merge_tied_embeddings
from .whole_parameters import whole_value

logger = logging.get_logger(__name__)


class BatchCounts(NamedTuple):
    """Pairs, and tokens to generate, of all processes and accumulated batches of one optimiser step."""

    pairs: torch.Tensor
    tokens: torch.Tensor


class Blip2Trainer(LoadersMixin, SampleTextsMixin, EvaluationMixin, SavingMixin, Trainer):
    """`transformers.Trainer` for `Blip2ForImageTextRetrieval` and `Blip2ForConditionalGeneration`.

    What it adds: parameter groups (`parameter_groups`), the frozen tower in half precision, every part of the loss in
    the log and in the evaluation, exact gradient accumulation, metrics of representation learning, checkpoints without
    frozen parts, checkpoints that are either complete or not used, exact resume of map-style sets and of streams.

    Representation learning: a batch has what `forward(return_loss=True)` takes. ITM and ITG are divided by the pairs
    and tokens of the whole optimiser step, so accumulated batches give the gradient of one large batch; ITC contrasts
    within each batch (of all processes), so accumulation gives it fewer negatives.

    Generation: a batch has what `forward` takes, with `labels`. The loss is the mean over all target tokens of the
    optimiser step, and in evaluation over those of the whole set. With `predict_with_generate` and `sample_texts`, see
    `Blip2TrainingArguments`, texts are generated, too.

    Batches may have "skipped", "truncated" and "stream_position" (see `ImageTextCollator`), which are taken out. Logged
    beside the losses are then `skipped_samples` and `truncated_captions`, since the start of the run.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: Blip2TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
    ) -> None:
        """Arguments as for `Trainer`.

        `compute_metrics` of a retrieval model gets `predictions` as a dictionary (see `pair_rows`) and, as
        `label_ids`, how many texts of the batch match each image; default: `retrieval_metrics`. That of a generation
        model gets ids with `predict_with_generate` (default: `generation_metrics`), else logits and labels.

        Raises:
            ValueError: for arguments that do not go together with the model, naming them.
        """
        if not isinstance(args, Blip2TrainingArguments):
            raise ValueError(f"`args` must be Blip2TrainingArguments, got {type(args).__name__}")
        self._progress = TrainingProgress()
        self._pictured: set[str] = set()
        self._resumed_from: str | None = None  # until the first epoch has begun
        self._random_state_due: str | None = None
        self._processor = processing_class
        check_collator(data_collator, model, train_dataset, eval_dataset)
        check_evaluation_set(eval_dataset, args.world_size, "eval_dataset")
        if model is not None:
            prepare_model(model, args)
        with trained_beside_quantised(model):
            super().__init__(
                model,
                args,
                data_collator,
                train_dataset,
                eval_dataset,
                processing_class,
                model_init,
                compute_loss_func,
                compute_metrics,
                callbacks,
                optimizers,
                optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics,
            )
        plain = self._plain_model()
        self._learns_representation = isinstance(plain, Blip2ForImageTextRetrieval)
        self._generates = isinstance(plain, Blip2ForConditionalGeneration)
        if self._learns_representation:
            check_representation_learning(args, compute_loss_func, compute_metrics)
            self.model_accepts_loss_kwargs = True  # the counts reach the model through `compute_loss`
            if self.compute_metrics is None:
                self.compute_metrics = retrieval_metrics(plain.config)
        elif self._generates:
            check_generation(args, compute_loss_func, compute_metrics, processing_class)
            if args.predict_with_generate and self.compute_metrics is None:
                processor = processing_class if isinstance(processing_class, Blip2Processor) else None
                self.compute_metrics = generation_metrics(processor, self._padding_id())
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            if getattr(plugin, "fsdp_version", 1) != 2:
                raise ValueError("`fsdp_version` must be 2: version 1 hides which parameters are biases and norms")
            merge_tied_embeddings(plain)
        self._check_saving()

    def _plain_model(self) -> nn.Module:
        """The BLIP-2 model inside all wrappers."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        prepare_model(model, self.args)
        return model

    # -- optimiser ---------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """With `parameter_groups`; optimisers that group parameters in their own way keep that."""
        if self.optimizer is not None:
            return self.optimizer
        args = self.args
        model = self.model if model is None else model
        optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(args, model)
        plain = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
        if not plain or {"params", "model", "optimizer_dict"} & set(options) or "bitsandbytes" in str(optimizer_class):
            if args.layer_decay != 1.0:
                raise ValueError(f"`layer_decay` {args.layer_decay} cannot be combined with `optim` {args.optim}")
            return super().create_optimizer(model)
        groups = parameter_groups(
            model,
            learning_rate=options.get("lr", args.learning_rate),
            weight_decay=args.weight_decay,
            layer_decay=args.layer_decay,
        )
        for group in groups:
            del group["param_names"]  # wrapping renames parameters
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if is_decayed(name, parameter)]

    # -- data --------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, BatchCounts | torch.Tensor | int | None]:
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._random_state_due is not None:  # beginning an iteration has drawn a number
            self._load_rng_state(self._random_state_due)
            self._random_state_due = None
        for batch in batches:
            if isinstance(batch, MutableMapping):
                self._progress.records.take(batch)
        return batches, counts

    def _get_num_items_in_batch(
        self, batch_samples: list, device: torch.device
    ) -> BatchCounts | torch.Tensor | int | None:
        if not (self._learns_representation or self._generates):
            return super()._get_num_items_in_batch(batch_samples, device)
        if not batch_samples:
            return None
        if self._generates:
            return self._count_targets(batch_samples, device)
        tokens = torch.stack([self._target_tokens(batch).sum() for batch in batch_samples]).sum().to(device)
        pairs = torch.full_like(tokens, sum(len(batch["input_ids"]) for batch in batch_samples))
        return BatchCounts(*self._sum_over_processes(torch.stack([pairs, tokens])))

    def _count_targets(self, batches: list, device: torch.device) -> torch.Tensor | None:
        """Tokens that the generation model's loss counts, which are fewer than the labels that are not -100."""
        if any(batch.get("labels") is None for batch in batches):
            return None
        config = self._plain_model().config
        tokens = torch.stack([target_mask(batch, config).sum() for batch in batches]).sum().to(device)
        return self._sum_over_processes(tokens) if self.args.average_tokens_across_devices else tokens

    def _target_tokens(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """[n] tokens to generate of each text: all real ones but the first."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        placeholder = self._plain_model().config.image_token_index
        if placeholder is not None:
            real = real & (ids != placeholder)
        return real.sum(dim=1) - 1

    def _sum_over_processes(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(numbers, "sum") if self.args.world_size > 1 else numbers

    # -- loss --------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """With the attention kernel whose backward pass is fast: see `slow_backward`."""
        if not self._generates:
            return super().training_step(model, *args, **kwargs)
        language_model = self._plain_model().language_model
        dtype = torch.bfloat16 if self.args.bf16 or self.args.fp16 else language_model.dtype
        with eager_if(slow_backward(self.args.device.type, dtype), language_model):
            return super().training_step(model, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: BatchCounts | torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss whose sum over accumulated batches and mean over processes is that of the optimiser step."""
        if not self._learns_representation:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        pairs, tokens = num_items_in_batch or (None, None)
        outputs = self._representation_outputs(model, inputs, pairs, tokens)
        if model.training:
            parts = {name: getattr(outputs, name) for name in LOSSES}
            self._progress.losses.add({name: part for name, part in parts.items() if part is not None})
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _representation_outputs(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        pairs: torch.Tensor | int | None,
        tokens: torch.Tensor | int | None,
        generator: torch.Generator | None = None,
    ) -> Any:
        own = {
            "return_loss": True,
            "num_pairs_in_batch": pairs,
            "num_items_in_batch": tokens,
            "chunk_size": self.args.chunk_size,
            "generator": generator,
        }
        return model(**{**inputs, **own})

    # -- logging -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`'s; the training loop's entries get the parts of the loss, averaged over steps and processes
        since the last entry, the temperature as it is, and counts of skipped samples and cut captions."""
        if "loss" in logs:
            logs |= self._logged_parts()
        super().log(logs, start_time)

    def _logged_parts(self) -> dict[str, float]:
        progress, values = self._progress, {}
        steps = max(self.state.global_step - progress.logged_step, 1)
        progress.logged_step = self.state.global_step
        sums = progress.losses.drain()
        if sums:
            mean = self._sum_over_processes(torch.stack(list(sums.values()))) / (self.args.world_size * steps)
            values |= dict(zip(sums, mean.tolist(), strict=True))
        if self._learns_representation and "loss_itc" in sums:
            values["temperature"] = whole_value(self._plain_model().temperature).item()
        values |= self._counts(progress.records)
        skipped = progress.records.skipped
        if skipped.total > progress.reported:
            progress.reported = skipped.total
            logger.warning(f"process {self.args.process_index}: {skipped.report()}")
        return values

    def _counts(self, records: BatchRecords) -> dict[str, int]:
        """Skipped samples and cut captions of all processes; empty if there are none."""
        counts = self._sum_over_processes(torch.tensor(records.counts(), device=self.args.device)).tolist()
        return dict(zip(("skipped_samples", "truncated_captions"), counts, strict=True)) if any(counts) else {}

    # -- running and resuming ----------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the last complete checkpoint of `output_dir`.

        Raises:
            ValueError: if there is none, or the one given is not complete.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"`output_dir` {self.args.output_dir} has no complete checkpoint to resume from")
        elif resume_from_checkpoint and not is_complete(resume_from_checkpoint):
            raise ValueError(f"`resume_from_checkpoint` {resume_from_checkpoint} is not a complete checkpoint")
        # Before it begins, `Trainer` would write the tokenizer's special tokens over the model's, which has its own
        # (OPT's captions end with a line break).
        self._processor, self.processing_class = self.processing_class, None
        try:
            return super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)
        finally:
            self.processing_class = self._processor

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.processing_class = self._processor
        self._progress, self._random_state_due = TrainingProgress(), None
        self._resumed_from = resume_from_checkpoint
        if resume_from_checkpoint is None:
            return epochs, batches
        self._progress.logged_step = self.state.global_step
        if not self._progress.load(resume_from_checkpoint, self.args.process_index, self.args.device):
            logger.warning(
                f"{resume_from_checkpoint} has no record of process {self.args.process_index}: counts of skipped "
                "samples and the losses of steps that were not logged yet begin anew"
            )
        positions = self._progress.records.positions.state_dict()
        if not positions and isinstance(self.train_dataset, ExampleStream):
            raise ValueError(
                f"`resume_from_checkpoint` {resume_from_checkpoint} has no position of process "
                f"{self.args.process_index} in the stream: resume with as many processes as before"
            )
        if positions:
            self.train_dataset.load_state_dict(positions)
            batches, self._random_state_due = 0, resume_from_checkpoint  # nothing to skip
        return epochs, batches

    def _run_epoch(self, *, epoch: int, train_dataloader: DataLoader, **others: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed when all is done; `Trainer` would do one more
            self.control.should_training_stop = True
            return
        if self._resumed_from is not None:
            self._tr_loss += self._progress.loss  # in place: `Trainer` began anew
            self._globalstep_last_logged = self._progress.logged_step
            self._resumed_from = None
        elif self.state.global_step == 0 and self.args.world_size > 1:
            torch.manual_seed(self.args.seed + self.args.process_index)  # other dropout on each process
        set_epoch(train_dataloader, epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **others)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._progress.records.positions.state_dict():
            # `Trainer` counts batches since it was started; what a stream has given is known by the steps
            self.state.epoch = self.state.global_step / self.state.max_steps
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """`Trainer` writes `trainer_state.json` last, by which a checkpoint is known to be complete."""
        if self.args.should_save:
            discard(Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"))
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._progress.loss = self._tr_loss.item()
        self._progress.save(output_dir, self.args.process_index)
        # All processes have written what is theirs before the checkpoint is marked complete and older ones go.
        self.accelerator.wait_for_everyone()
