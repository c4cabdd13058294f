"""Image files as the tower's features, read ahead while the model computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..data.skipped import SkippedSample
from ..reading_ahead import read_ahead
from .image_reading import read_pixels


class ImageFiles:
    """Features of images by number, for `KeyStore`.

    Args:
        model: a `Blip2ForImageTextRetrieval`.
        processor: its `Blip2Processor`.
        sources: [N] whatever `load_image` takes.
        names: [N] for messages.
        batch_size: images at a time.

    Attributes:
        skipped: of each image that could not be read, why: a sentence that names it.
    """

    def __init__(
        self, model: Any, processor: Any, sources: Sequence[Any], names: Sequence[str], *, batch_size: int = 16
    ) -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"`image_batch_size` must be an int of at least 1, got {batch_size!r}")
        self.model, self.processor, self.sources, self.names = model, processor, sources, names
        self.batch_size = batch_size
        self.skipped: dict[int, SkippedSample] = {}

    def __len__(self) -> int:
        return len(self.sources)

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [kept, P, E] after `ln_vision`, and [stop - start] bool: which could be read."""
        features, readable = [], torch.zeros(stop - start, dtype=torch.bool)
        for numbers, pixels in self._batches(start, stop):
            readable[[number - start for number in numbers]] = True
            if numbers:
                pixels = pixels.to(self.model.device)  # the tower has a dtype of its own
                features.append(self.model.vision_model(pixels).last_hidden_state)
        width = self.model.config.vision_config.hidden_size
        return torch.cat(features) if features else torch.zeros(0, 1, width), readable

    def _batches(self, start: int, stop: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        parts = [range(first, min(first + self.batch_size, stop)) for first in range(start, stop, self.batch_size)]
        return read_ahead(self._read, parts, workers=1, ahead=1)

    def _read(self, numbers: range) -> tuple[list[int], torch.Tensor]:
        """The images that can be read, as pixels [kept, 3, H, W]."""
        kept, pixels = [], []
        for number in numbers:
            read = read_pixels(self.sources[number], self.processor.image_processor)
            if isinstance(read, str):
                self.skipped[number] = {"reason": read, "where": self.names[number]}
            else:
                kept.append(number)
                pixels.append(torch.from_numpy(read))
        return kept, torch.stack(pixels) if pixels else torch.zeros(0)
