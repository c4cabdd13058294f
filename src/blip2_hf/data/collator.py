"""Image-text pairs to model inputs: one pair in a DataLoader's worker, then a list of them to a batch.

Shapes: B pairs, T tokens of the longest text, P patches (with class token), E width of the vision tower.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..image_loading import ImageSource
from ..text_rows import encode
from .batches import (
    BOOKKEEPING,
    checked_bookkeeping,
    checked_samples,
    padded_with_mask,
    records,
    stacked_images,
    token_rows,
)
from .captions import normalise_caption
from .image_transforms import ImageTransform, Unaugmented, augmented, checked_transform, image_processor_of
from .samples import of_other_set
from .skipped import BLANK_CAPTION, SkipSample

_LARGEST_ID = 2**63 - 1


class PairTransform:
    """An image and its caption to `pixel_values` and `input_ids`; can be pickled for the workers of a DataLoader.

    Args:
        image_transform: image and random generator to float32 [3, H, W], such as `TrainingAugmentation`.
        tokenizer: the Q-Former's (BERT), which writes [CLS] … [SEP].
        max_length: most tokens of a row, [CLS] and [SEP] included: 32 in stage 1, 35 in fine-tuning for retrieval (as
            in the original code). A longer caption loses its end, keeps [SEP] and is counted.
        caption: what is done to the caption first; must be a function that can be pickled. Default: that of the
            original code. None: nothing.

    Raises:
        ValueError: a tokenizer that does not write [CLS] … [SEP], or `max_length` without room for a word.
    """

    def __init__(
        self,
        image_transform: ImageTransform,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 32,
        caption: Callable[[str], str] | None = normalise_caption,
    ) -> None:
        (ids,) = encode(tokenizer, ["a"], name="text")
        edges = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        if None in edges or len(ids) < 3 or (ids[0], ids[-1]) != edges:
            raise ValueError(
                "`tokenizer` must write [CLS] … [SEP] as BERT's does, but "
                f"{type(tokenizer).__name__} makes {tokenizer.convert_ids_to_tokens(ids)} of 'a'"
            )
        if type(max_length) is not int or max_length < 3:
            raise ValueError(f"`max_length` must be an int of at least 3 ([CLS], a token, [SEP]), got {max_length!r}")
        self.image_transform = checked_transform(image_transform)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.caption = caption

    @classmethod
    def for_training(
        cls,
        processor: Any,
        *,
        max_length: int = 32,
        caption: Callable[[str], str] | None = normalise_caption,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ) -> PairTransform:
        """With `TrainingAugmentation` for the image processor of a `Blip2Processor` and its Q-Former tokenizer."""
        images = augmented(processor, scale, ratio, flip)
        return cls(images, _bert_tokenizer(processor), max_length=max_length, caption=caption)

    @classmethod
    def for_evaluation(
        cls,
        processor: Any,
        *,
        max_length: int = 32,
        caption: Callable[[str], str] | None = normalise_caption,
    ) -> PairTransform:
        """With the image processor of a `Blip2Processor` as it is, and its Q-Former tokenizer."""
        images = Unaugmented(image_processor_of(processor))
        return cls(images, _bert_tokenizer(processor), max_length=max_length, caption=caption)

    def __call__(self, image: ImageSource, caption: str, rng: np.random.Generator) -> dict[str, Any]:
        """One sample.

        Args:
            image: whatever `load_image` takes; a path or bytes are faster than a decoded picture.
            caption: its text.
            rng: the only source of randomness.

        Returns:
            `pixel_values` float32 [3, H, W] (NumPy), `input_ids` (list of ints) and `truncated` (0 or 1).

        Raises:
            ValueError: an image that cannot be read, a caption that is no text.
            SkipSample: a caption of which normalisation leaves nothing, such as "...".
        """
        text = self.encode_caption(caption)
        return {"pixel_values": self.image_transform(image, rng), **text}

    def encode_caption(self, caption: str) -> dict[str, Any]:
        """`input_ids` and `truncated` as from `__call__`, for pairs whose image is given as features."""
        if not isinstance(caption, str):
            raise ValueError(f"`caption` must be a string, got {type(caption).__name__}{of_other_set(caption)}")
        text = caption if self.caption is None else self.caption(caption)
        (ids,) = encode(self.tokenizer, [text], name="caption")
        if len(ids) < 3:
            raise SkipSample(BLANK_CAPTION)
        truncated = len(ids) > self.max_length
        return {
            "input_ids": [*ids[: self.max_length - 1], ids[-1]] if truncated else ids,
            "truncated": int(truncated),
        }


class ImageTextCollator:
    """A list of samples to a batch for `Blip2ForImageTextRetrieval`; can be pickled.

    A sample has `pixel_values` [3, H, W] or `vision_features` [P, E], and `input_ids`; perhaps `image_id`, an int that
    pairs with the same image share. It may further have, for the record: `skipped` (a list of dicts, the pairs that
    were left out before this one), `stream_position` (a dict) and `truncated` (an int).

    `Trainer` must be told `remove_unused_columns=False`, or it takes from the samples what is no argument of the model.

    Args:
        pad_token_id: what texts are padded with (the attention mask hides it).
        bookkeeping: which of "skipped", "stream_position" and "truncated" to put into the batch. The model does not
            take them: `Blip2Trainer` takes them out, for another `Trainer` give ().

    Raises:
        ValueError: a `pad_token_id` that is not an int of at least 0, other names in `bookkeeping`.
    """

    def __init__(self, pad_token_id: int, *, bookkeeping: Sequence[str] = BOOKKEEPING) -> None:
        if not isinstance(pad_token_id, int) or pad_token_id < 0:
            raise ValueError(f"`pad_token_id` must be an int of at least 0, got {pad_token_id!r}")
        self.pad_token_id = pad_token_id
        self.bookkeeping = checked_bookkeeping(bookkeeping)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Put samples together.

        Returns:
            `pixel_values` [B, 3, H, W] or `vision_features` [B, P, E] of the samples' dtype; `input_ids`,
            `attention_mask` int64 [B, T], padded on the right to the longest text; `image_ids` int64 [B], where
            samples without an `image_id` get negative numbers that occur nowhere else (all processes need ids, or
            none, and with mixed sets another process may have some).
            Of the bookkeeping what the samples have: `skipped`, all entries as one list; `stream_position`, a list in
            the order of the samples; `truncated`, the sum.

        Raises:
            ValueError: no samples, missing or unknown keys, samples of unequal shape or dtype, empty texts, values of
                `image_id` that are no 64-bit integers.
        """
        samples = checked_samples(samples, needed=("input_ids",), optional=("image_id",))
        input_ids, attention_mask = padded_with_mask(token_rows(samples, "input_ids"), self.pad_token_id)
        return {
            **stacked_images(samples),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "image_ids": _image_ids([sample.get("image_id") for sample in samples]),
            **records(samples, self.bookkeeping),
        }


def _bert_tokenizer(processor: Any) -> PreTrainedTokenizerBase:
    """The Q-Former's: its own beside a language model's, else the only one there is."""
    own = getattr(processor, "qformer_tokenizer", None)
    return processor.tokenizer if own is None else own


def _image_ids(ids: list[Any]) -> torch.Tensor:
    numbers = []
    for index, given in enumerate(ids):
        if given is None:
            # Drawn at random, and by no generator that is seeded, so that no other process draws the same: equal
            # numbers mean the same image. Nothing else depends on the value.
            numbers.append(-1 - secrets.randbelow(_LARGEST_ID))
            continue
        try:
            number = operator.index(given)
        except TypeError:
            raise ValueError(
                f"`image_id` of sample {index} must be an integer, got {given!r} ({type(given).__name__})"
            ) from None
        if not -_LARGEST_ID - 1 <= number <= _LARGEST_ID:
            raise ValueError(f"`image_id` of sample {index} must fit 64 bits, got {number}")
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.int64)
