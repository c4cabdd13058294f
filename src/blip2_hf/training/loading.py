"""Loaders: of streams, which `Trainer` would split a second time, and of evaluation, which is of all samples."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from ..data.streaming import ExampleStream, prepare_stream_loader


def stream_loader(
    stream: ExampleStream, args: TrainingArguments, batch_size: int, collator: Callable, drop_last: bool
) -> DataLoader:
    """The loader of this process's part of a stream, with the settings of `args`."""
    loader = DataLoader(
        stream,
        batch_size=batch_size,
        collate_fn=collator,
        drop_last=drop_last,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return prepare_stream_loader(loader, args.device)


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """accelerate's loaders pass the epoch on to the dataset or to the sampler, and not through every wrapper."""
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
    sampler = getattr(loader, "batch_sampler", None)
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


class LoadersMixin:
    """For `Trainer`."""

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer`'s; a stream of ours, which splits itself over the processes, is not split once more."""
        if not isinstance(self.train_dataset, ExampleStream):
            return super().get_train_dataloader()
        args = self.args
        return stream_loader(
            self.train_dataset, args, self._train_batch_size, self.data_collator, args.dataloader_drop_last
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """As `Trainer`'s; a stream of ours may be evaluated on by one process only, as parts differ in length."""
        stream = self.eval_dataset if eval_dataset is None else eval_dataset
        stream = self.eval_dataset[stream] if isinstance(stream, str) else stream
        if not isinstance(stream, ExampleStream):
            return super().get_eval_dataloader(eval_dataset)
        if self.args.world_size > 1:
            raise ValueError("`eval_dataset` must not be a stream with several processes; use a map-style set")
        return stream_loader(stream, self.args, self.args.eval_batch_size, self.data_collator, drop_last=False)

    def _get_dataloader(
        self,
        dataset: Dataset,
        description: str,
        batch_size: int,
        sampler_fn: Callable | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        """As `Trainer`'s, but `dataloader_drop_last` holds for training only: an evaluation is of all samples."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.args.dataloader_drop_last = drop_last
