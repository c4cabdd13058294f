"""What a pipeline is asked: an image, and the texts about it.

Everything that a caller may give (one input, a list, a dataset, a generator) becomes a sequence of `Request`s here, and
a list of requests becomes the tensors of one batch.

Shapes: I images and R rows of text in a batch, P image tokens, E width of the tower, S positions of a row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from ..configuration import Blip2Config
from ..image_loading import is_array, load_image
from ..image_processing import Blip2ImageProcessor
from ..modeling.encoded import EncodedImages
from ..modeling.prompts import start_ids
from ..presets import fill
from ..processing import Blip2Processor


@dataclass(frozen=True)
class Request:
    """One image and what is asked about it.

    Attributes:
        image: whatever `blip2_hf.image_loading.load_image` takes; None with `embeds` or `pixels`.
        embeds: the image as features: one encoded image, or [1, P, E] after `ln_vision`.
        pixels: the image as the tower takes it: float [3, H, W], resized and normalised.
        texts: prompt or question of each row; None for no text.
        sizes: how the rows are handed back: None is one result for one row, a number n a list of n results.
    """

    image: Any = None
    embeds: EncodedImages | torch.Tensor | None = None
    texts: tuple[str | None, ...] = (None,)
    sizes: tuple[int | None, ...] = (None,)
    pixels: torch.Tensor | None = None


def one_image(value: Any, argument: str) -> dict[str, Any]:
    """`image`, `embeds` or `pixels` of a `Request`, from an image, one encoded image, or a row of a dataset.

    Raises:
        ValueError: if there is no image, or there are several.
    """
    if isinstance(value, EncodedImages):
        return {"embeds": one_embedding(value, argument)}
    if isinstance(value, dict):
        given = [key for key in ("image", "image_embeds", "pixel_values") if value.get(key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"`{argument}` as a dictionary must have 'image', 'image_embeds' or 'pixel_values', "
                f"got {sorted(map(str, value))}"
            )
        if given == ["pixel_values"]:
            return {"pixels": _one_picture(value["pixel_values"])}
        if given == ["image_embeds"]:
            return {"embeds": one_embedding(value["image_embeds"], "image_embeds")}
        return one_image(value["image"], "image")
    if not is_image(value):
        raise ValueError(
            f"`{argument}` must be a path, URL, bytes, PIL image, array or encoded image, got {type(value).__name__}"
        )
    return {"image": value}


def one_embedding(value: Any, argument: str) -> EncodedImages | torch.Tensor:
    """The features of one image: one encoded image, or [P, E] or [1, P, E] after `ln_vision` as [1, P, E]."""
    if isinstance(value, EncodedImages):
        if len(value) != 1:
            raise ValueError(
                f"`{argument}` must be one encoded image, got {len(value)}: give a list of single ones, `list(encoded)`"
            )
        return value
    if not torch.is_tensor(value) or value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[0] != 1):
        shape = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
        raise ValueError(f"`{argument}` must be one encoded image or a tensor [1, tokens, width], got {shape}")
    return value[None] if value.ndim == 2 else value


def _one_picture(value: Any) -> torch.Tensor:
    """The pixels of one image, [3, H, W] or [1, 3, H, W], as [3, H, W]."""
    shape = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
    if isinstance(shape, str) or not value.is_floating_point() or shape[-3:-2] != (3,) or shape[:-3] not in ((), (1,)):
        raise ValueError(f"`pixel_values` must be one image as a float tensor [3, height, width], got {shape}")
    return value if value.ndim == 3 else value[0]


def is_image(value: Any) -> bool:
    """Whether `value` is one image by its type (a 4-dimensional array is several)."""
    if is_array(value):
        return len(value.shape) < 4
    kinds = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, EncodedImages)
    return isinstance(value, kinds) or hasattr(value, "read")


def as_list(value: Any) -> list | None:
    """A list of inputs as a list; None for anything that is not one."""
    if isinstance(value, list | tuple) or (is_array(value) and len(value.shape) == 4):
        return list(value)
    return None


# Requests from a list of inputs; a function of a module or an object, so that worker processes can be given it.
ToRequests = Callable[[list[Any]], list[Request]]


def lazily(source: Iterable, to_requests: ToRequests) -> Dataset:
    """A dataset or generator of inputs as one of requests, read while it is worked on.

    Raises:
        ValueError: if `source` is nothing that can be gone through.
    """
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return _Indexed(source, to_requests)
    if isinstance(source, Iterable):
        return _Streamed(source, to_requests)
    raise ValueError(f"`inputs` must be an image, a list, a dataset or a generator, got {type(source).__name__}")


class _Indexed(Dataset):
    def __init__(self, source: Sequence, to_requests: ToRequests) -> None:
        self.source, self.to_requests = source, to_requests

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Request:
        return self.to_requests([self.source[index]])[0]


class _Streamed(IterableDataset):
    def __init__(self, source: Iterable, to_requests: ToRequests) -> None:
        self.source, self.to_requests = source, to_requests

    def __iter__(self) -> Iterator[Request]:
        return (self.to_requests([item])[0] for item in self.source)


@dataclass(frozen=True)
class Preparer:
    """Makes the tensors of a batch; small enough to be sent to the worker processes of a DataLoader.

    Args:
        processor: the model's processor.
        config: the model's config.
        prompt: the text of a row, with `{}` where a request's own text goes. None: rows without text.
        timeout: seconds after which a URL is given up; None: the default of `load_image`.
    """

    processor: Blip2Processor
    config: Blip2Config
    prompt: str | None
    timeout: float | None = None

    def __call__(self, requests: list[Request]) -> dict[str, Any]:
        """
        Returns:
            `pixel_values` float32 [I', 3, H, W] of the images that are not features yet (None if all are), `embeds`
            (features of each image or None), `image_of_row` (R numbers), `sizes`, and for `generate` `text`:
            `input_ids`, `attention_mask` [R, S] and the Q-Former's.

        Raises:
            ValueError: for an image that cannot be read, naming it, or text that is too long.
        """
        requests = self.read(requests)
        rows = [text for request in requests for text in request.texts]
        pixels = [request.pixels for request in requests if request.embeds is None]
        return {
            "pixel_values": torch.stack(pixels) if pixels else None,
            "embeds": [request.embeds for request in requests],
            "image_of_row": [i for i, request in enumerate(requests) for _ in request.texts],
            "sizes": [size for request in requests for size in request.sizes],
            "text": self._text(rows),
        }

    def read(self, requests: list[Request]) -> list[Request]:
        """The requests with pixels in the place of images; may be called in another thread.

        Raises:
            ValueError: for an image that cannot be read, naming it.
        """
        unread = [request.embeds is None and request.pixels is None for request in requests]
        sources = [request.image for request, wanted in zip(requests, unread, strict=True) if wanted]
        if not sources:
            return requests
        image_processor = self.processor.image_processor
        own = isinstance(image_processor, Blip2ImageProcessor)
        sources = [self._loaded(source) if self._needs_loading(source, own) else source for source in sources]
        pixels = iter(image_processor(sources, return_tensors="pt")["pixel_values"])
        return [
            replace(request, image=None, pixels=next(pixels)) if wanted else request
            for request, wanted in zip(requests, unread, strict=True)
        ]

    def _needs_loading(self, source: Any, own: bool) -> bool:
        """Our image processor loads by itself; one of `transformers` may not, and neither knows the timeout."""
        if self.timeout is not None and isinstance(source, str) and source.lower().startswith(("http://", "https://")):
            return True
        return not own

    def _loaded(self, source: Any) -> Image.Image:
        return load_image(source) if self.timeout is None else load_image(source, timeout=self.timeout)

    def _text(self, rows: list[str | None]) -> dict[str, torch.Tensor]:
        if self.prompt is None:
            config = self.config
            ids = start_ids(
                len(rows),
                config.num_query_tokens,
                config.image_token_index,
                config.text_config.get_text_config(),
                "cpu",
            )
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        texts = [self.prompt if text is None else fill(self.prompt, text) for text in rows]
        placeholders = self.config.image_token_index is not None
        return dict(self.processor(text=texts, image_placeholders=placeholders, return_tensors="pt"))
