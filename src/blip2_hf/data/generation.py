"""Captions and questions to inputs and labels of `Blip2ForConditionalGeneration`: stage 2, captioning, VQA.

Shapes: B samples, S positions of the longest row (image placeholders, then text), T tokens of the longest target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..image_loading import ImageSource
from ..presets import fill, vqa_prompt
from ..processing import IGNORED_LABEL
from ..text_rows import padding_id
from .batches import (
    BOOKKEEPING,
    Samples,
    checked_bookkeeping,
    checked_samples,
    padded_rows,
    padded_with_mask,
    records,
    stacked_images,
    token_rows,
)
from .captions import normalise_caption, normalise_question
from .image_transforms import ImageTransform, Unaugmented, augmented, checked_transform, image_processor_of
from .samples import QuestionAnswer, of_other_set
from .skipped import BLANK_CAPTION, BLANK_QUESTION, NO_ANSWER, SkipSample
from .target_rows import TargetRows, split_at_word

TARGETS = ("whole", "prefix_lm")

TextFunction = Callable[[str], str]


class CaptionTransform:
    """An image and its caption to a prompt and a target; can be pickled for the workers of a DataLoader.

    Args:
        image_transform: image and random generator to float32 [3, H, W], such as `TrainingAugmentation`.
        processor: `Blip2Processor` of the model.
        prompt: what stands before the caption and is not learned, such as "a photo of" (captioning, table 7). Empty in
            stage 2.
        target: "whole": the caption is the target, after the prompt (decoder-only) or with the prompt in the encoder,
            as in the original's released recipe. "prefix_lm", encoder-decoder only: the caption is split before one of
            its words, each as likely; what stands before it goes to the encoder behind the prompt and may be nothing,
            the rest to the decoder (paper, section 3.3).
        max_length: most tokens of the caption with its end token, as 32 in the original; placeholders and prompt do not
            count. A longer caption loses its end, keeps the end token (the original loses it) and is counted.
            With "prefix_lm" it loses whole words before it is split.
        caption: what is done to the caption first; must be a function that can be pickled. None: nothing.

    Raises:
        ValueError: "prefix_lm" for a decoder-only language model, a prompt with the image token, a `max_length` without
            room for a word, a tokenizer without end token.
    """

    def __init__(
        self,
        image_transform: ImageTransform,
        processor: Any,
        *,
        prompt: str = "",
        target: str = "whole",
        max_length: int = 32,
        caption: TextFunction | None = normalise_caption,
    ) -> None:
        if target not in TARGETS:
            raise ValueError(f"`target` must be one of {TARGETS}, got {target!r}")
        if target == "prefix_lm" and not processor.is_encoder_decoder:
            raise ValueError(
                "`target` 'prefix_lm' needs an encoder, which the processor's decoder-only language model lacks; "
                "expected 'whole'"
            )
        self.image_transform = checked_transform(image_transform)
        self.rows = TargetRows(processor, max_length)
        self.prompt = self.rows.checked_prompt(prompt)
        self.target = target
        self.caption = caption

    @classmethod
    def for_training(
        cls,
        processor: Any,
        *,
        prompt: str = "",
        target: str = "whole",
        max_length: int = 32,
        caption: TextFunction | None = normalise_caption,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ) -> CaptionTransform:
        """With `TrainingAugmentation` for the image processor of a `Blip2Processor`."""
        images = augmented(processor, scale, ratio, flip)
        return cls(images, processor, prompt=prompt, target=target, max_length=max_length, caption=caption)

    @classmethod
    def for_evaluation(
        cls,
        processor: Any,
        *,
        prompt: str = "",
        target: str = "whole",
        max_length: int = 32,
        caption: TextFunction | None = normalise_caption,
    ) -> CaptionTransform:
        """With the image processor of a `Blip2Processor` as it is."""
        images = Unaugmented(image_processor_of(processor))
        return cls(images, processor, prompt=prompt, target=target, max_length=max_length, caption=caption)

    def __call__(self, image: ImageSource, caption: str, rng: np.random.Generator) -> dict[str, Any]:
        """One sample.

        Args:
            image: whatever `load_image` takes; a path or bytes are faster than a decoded picture.
            caption: its text.
            rng: the only source of randomness: of the split, then of the augmentation.

        Returns:
            `pixel_values` float32 [3, H, W] (NumPy); `input_ids`, `labels` (lists of ints; of one length for a
            decoder-only language model, -100 outside of the target); `qformer_input_ids` of prompt (and prefix), if the
            processor has a tokenizer for the Q-Former; `truncated` (0 or 1).

        Raises:
            ValueError: an image that cannot be read, a caption that is no text.
            SkipSample: a caption of which normalisation or the tokenizer leaves nothing, or that has the image token.
        """
        text = self.encode_caption(caption, rng)
        return {"pixel_values": self.image_transform(image, rng), **text}

    def encode_caption(self, caption: str, rng: np.random.Generator) -> dict[str, Any]:
        """As from `__call__`, without `pixel_values`: for pairs whose image is given as features."""
        if not isinstance(caption, str):
            raise ValueError(f"`caption` must be a string, got {type(caption).__name__}{of_other_set(caption)}")
        text = caption if self.caption is None else self.caption(caption)
        if not text.strip():
            raise SkipSample(BLANK_CAPTION)
        if self.target == "whole":
            return self.rows.encode(self.prompt, text, BLANK_CAPTION)
        kept = self.rows.fitting_words(text)
        prefix, suffix = split_at_word(kept, rng)
        gap = " " if self.prompt and prefix and not self.prompt[-1].isspace() else ""
        sample = self.rows.encode(self.prompt + gap + prefix, suffix, BLANK_CAPTION)
        return sample | {"truncated": int(kept != text or sample["truncated"])}


class QuestionTransform:
    """An image, a question and an answer to a prompt and a target; can be pickled for the workers of a DataLoader.

    The question goes to the language model within `prompt` and, if the processor has a tokenizer for the Q-Former, to
    the Q-Former as it is (paper, figure 7); the answer is the target.

    Args:
        image_transform, processor: as for `CaptionTransform`.
        prompt: with `{}` where the question goes; None: `presets.vqa_prompt` of the language model's kind.
        max_length: most tokens of the answer with its end token. A longer one loses its end, keeps the end token and is
            counted.
        max_prompt_length: most tokens of prompt and question, without placeholders. A sample whose question does not
            fit is skipped and counted, for half a question asks something else.
        question: what is done to the question first, a function that can be pickled. Default: that of the original
            code, which keeps 50 words. None: nothing.
        answer: likewise for the answer, such as `normalise_answer` where Visual Genome's sentences are mixed with the
            single words of VQAv2. None, as in the original code: nothing.

    Raises:
        ValueError: a prompt without `{}` or with the image token, limits without room for a word, a tokenizer without
            end token.
    """

    def __init__(
        self,
        image_transform: ImageTransform,
        processor: Any,
        *,
        prompt: str | None = None,
        max_length: int = 32,
        max_prompt_length: int = 128,
        question: TextFunction | None = normalise_question,
        answer: TextFunction | None = None,
    ) -> None:
        self.image_transform = checked_transform(image_transform)
        self.rows = TargetRows(processor, max_length, max_prompt_length)
        self.prompt = self.rows.checked_prompt(vqa_prompt(processor.is_encoder_decoder) if prompt is None else prompt)
        if "{}" not in self.prompt:
            raise ValueError(f"`prompt` must have {{}} where the question goes, got {prompt!r}")
        self.question = question
        self.answer = answer

    @classmethod
    def for_training(
        cls,
        processor: Any,
        *,
        prompt: str | None = None,
        max_length: int = 32,
        max_prompt_length: int = 128,
        question: TextFunction | None = normalise_question,
        answer: TextFunction | None = None,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ) -> QuestionTransform:
        """With `TrainingAugmentation` for the image processor of a `Blip2Processor`.

        A flip makes questions about left and right wrong; the original code flips all the same.
        """
        return cls(
            augmented(processor, scale, ratio, flip),
            processor,
            prompt=prompt,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            question=question,
            answer=answer,
        )

    @classmethod
    def for_evaluation(
        cls,
        processor: Any,
        *,
        prompt: str | None = None,
        max_length: int = 32,
        max_prompt_length: int = 128,
        question: TextFunction | None = normalise_question,
        answer: TextFunction | None = None,
    ) -> QuestionTransform:
        """With the image processor of a `Blip2Processor` as it is."""
        return cls(
            Unaugmented(image_processor_of(processor)),
            processor,
            prompt=prompt,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            question=question,
            answer=answer,
        )

    def __call__(self, image: ImageSource, text: QuestionAnswer, rng: np.random.Generator) -> dict[str, Any]:
        """One sample, as `CaptionTransform` makes it.

        Args:
            image: whatever `load_image` takes; a path or bytes are faster than a decoded picture.
            text: question and answer.
            rng: of the augmentation, the only source of randomness.

        Raises:
            ValueError: an image that cannot be read, a text that is no `QuestionAnswer`.
            SkipSample: a question or an answer of which normalisation leaves nothing, or that has the image token; a
                question that is too long.
        """
        rows = self.encode_question(text)
        return {"pixel_values": self.image_transform(image, rng), **rows}

    def encode_question(self, text: QuestionAnswer) -> dict[str, Any]:
        """As from `__call__`, without `pixel_values`: for questions whose image is given as features."""
        if not isinstance(text, QuestionAnswer):
            raise ValueError(f"`text` must be a QuestionAnswer, got {type(text).__name__}{of_other_set(text)}")
        question = text.question if self.question is None else self.question(text.question)
        answer = text.answer if self.answer is None else self.answer(text.answer)
        if not question.strip():
            raise SkipSample(BLANK_QUESTION)
        if not answer.strip():
            raise SkipSample(NO_ANSWER)
        return self.rows.encode(fill(self.prompt, question), answer, NO_ANSWER, question)


class GenerationCollator:
    """A list of samples to a batch for `Blip2ForConditionalGeneration`; can be pickled.

    A sample has `pixel_values` [3, H, W] or `vision_features` [P, E], `input_ids` and `labels`, and
    `qformer_input_ids` if the processor has a tokenizer for the Q-Former. An `image_id` is left out of the batch: this
    model contrasts no pairs and does not take it. It may further have, for the record, `skipped`, `stream_position` and
    `truncated`, as for `ImageTextCollator`.

    `Trainer` must be told `remove_unused_columns=False`, or it takes from the samples what is no argument of the model.

    Args:
        processor: `Blip2Processor` that wrote the rows; only its padding tokens and its kind are kept.
        bookkeeping: which of "skipped", "stream_position" and "truncated" to put into the batch. The model does not
            take them: `Blip2Trainer` takes them out, for another `Trainer` give ().

    Raises:
        ValueError: other names in `bookkeeping`.
    """

    def __init__(self, processor: Any, *, bookkeeping: Sequence[str] = BOOKKEEPING) -> None:
        questions = processor.qformer_tokenizer
        self.pad_token_id = padding_id(processor.tokenizer)
        self.qformer_pad_token_id = None if questions is None else padding_id(questions)
        self.is_encoder_decoder = bool(processor.is_encoder_decoder)
        self.bookkeeping = checked_bookkeeping(bookkeeping)

    def __call__(self, samples: Samples) -> dict[str, Any]:
        """Put samples together, padded on the right to the longest row.

        Returns:
            `pixel_values` [B, 3, H, W] or `vision_features` [B, P, E] of the samples' dtype; `input_ids`,
            `attention_mask` int64 [B, S]; `labels` int64 [B, S], for an encoder-decoder [B, T], -100 on prompt and
            pads; `qformer_input_ids`, `qformer_attention_mask` int64, if there is a tokenizer for the Q-Former. Of the
            bookkeeping what the samples have: `skipped`, all entries as one list; `stream_position`, a list in the
            order of the samples; `truncated`, the sum.

        Raises:
            ValueError: no samples, missing or unknown keys, samples of unequal shape or dtype, empty texts, labels that
                do not fit their row or teach nothing.
        """
        questions = () if self.qformer_pad_token_id is None else ("qformer_input_ids",)
        samples = checked_samples(samples, needed=("input_ids", "labels", *questions), optional=("image_id",))
        rows, labels = token_rows(samples, "input_ids"), token_rows(samples, "labels")
        for index, (row, target) in enumerate(zip(rows, labels, strict=True)):
            if not self.is_encoder_decoder and len(target) != len(row):
                raise ValueError(
                    f"`labels` of sample {index} must be as many as its {len(row)} `input_ids`, got {len(target)}: the "
                    "language model is decoder-only"
                )
            if set(target) == {IGNORED_LABEL}:
                raise ValueError(f"`labels` of sample {index} are all {IGNORED_LABEL}: nothing could be learned")
        batch = stacked_images(samples)
        batch["input_ids"], batch["attention_mask"] = padded_with_mask(rows, self.pad_token_id)
        batch["labels"] = padded_rows(labels, IGNORED_LABEL)
        if questions:
            questions = padded_with_mask(token_rows(samples, "qformer_input_ids"), self.qformer_pad_token_id)
            batch["qformer_input_ids"], batch["qformer_attention_mask"] = questions
        return batch | records(samples, self.bookkeeping)
