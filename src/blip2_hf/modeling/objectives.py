"""Representation learning (Li et al. 2023, sec. 3.2): contrastive, matching and generation loss from shared passes.

One pass of the queries over the image feeds all three losses: its output is contrasted with the text, its
self-attention keys and values are what the text generation decodes against, and the image's cross-attention keys and
values serve the matching pairs.

Shapes: n pairs of this process, N pairs of all processes, Q queries, T text tokens, P image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from .. import losses
from ..distributed import (
    Rows,
    fetch_rows,
    gather_numbers,
    gather_rows,
    gather_rows_with_gradient,
    part_sizes,
    process_index,
    world_size,
)
from ..outputs import Blip2ImageTextMatchingModelOutput
from .encoded import EncodedImages
from .masks import generation_mask
from .texts import Texts

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Negatives:
    """Hard negatives by their numbers [n] in the global batch: an image per text and a text per image."""

    images: torch.Tensor
    texts: torch.Tensor


@dataclass(frozen=True)
class _Contrast:
    """Images and texts that do not see each other.

    Attributes:
        image_vectors, text_vectors: [n, Q, d] and [n, d], this process's.
        per_image, per_text: cosines of its images with all texts, and of its texts with all images, [n, N] both.
        temperature: what they are divided by.
    """

    image_vectors: torch.Tensor
    text_vectors: torch.Tensor
    per_image: torch.Tensor
    per_text: torch.Tensor
    temperature: torch.Tensor

    @property
    def logits_per_image(self) -> torch.Tensor:
        return self.per_image / self.temperature

    @property
    def logits_per_text(self) -> torch.Tensor:
        return self.per_text / self.temperature


@dataclass(frozen=True)
class _GlobalBatch:
    """What the processes know of each other's pairs.

    Attributes:
        layout: how the N pairs are spread over the processes.
        positives: [n, N] bool, which of all pairs match this process's.
        tokens: number of tokens that all processes generate.
        text_length: of the longest text of all processes.
    """

    layout: Rows
    positives: torch.Tensor
    tokens: torch.Tensor | int
    text_length: int

    @property
    def processes(self) -> int:
        return len(self.layout.sizes)


class RepresentationLearningMixin:
    """`forward(return_loss=True)` of `Blip2ForImageTextRetrieval`."""

    def _representation_loss(
        self,
        image_embeds: torch.Tensor | EncodedImages,
        texts: Texts,
        image_ids: torch.Tensor | None = None,
        negative_image_indices: torch.Tensor | None = None,
        negative_text_indices: torch.Tensor | None = None,
        num_pairs_in_batch: torch.Tensor | int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Blip2ImageTextMatchingModelOutput:
        """The losses of image features [n, P, E] (or encoded images) and texts; the rest as in `forward`."""
        config = self.config
        if not (config.itc_weight or config.itm_weight or config.itg_weight):
            raise ValueError(
                "`return_loss=True` needs a weight that is not 0: itc_weight, itm_weight, itg_weight are 0"
            )
        batch = self._global_batch(texts, image_ids)
        given_images = _checked_indices("negative_image_indices", negative_image_indices, batch)
        given_texts = _checked_indices("negative_text_indices", negative_text_indices, batch)
        _check_count("num_pairs_in_batch", num_pairs_in_batch)
        _check_count("num_items_in_batch", num_items_in_batch)
        pairs = batch.layout.total if num_pairs_in_batch is None else num_pairs_in_batch
        tokens = batch.tokens if num_items_in_batch is None else num_items_in_batch
        if chunk_size is None:
            encoded = self.encode_image(image_embeds=image_embeds)
            image_embeds, parts = encoded.image_embeds, [(encoded, texts)]
        else:
            sizes = part_sizes(len(image_embeds), chunk_size, image_embeds.device)
            parts = list(zip(image_embeds.split(sizes), texts.split(sizes), strict=True))

        contrast, itc = None, None
        if config.itc_weight or (config.itm_weight and (given_images is None or given_texts is None)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and config.itc_weight > 0):
                contrast = self._contrast(parts, batch.layout)
        if config.itc_weight:
            rows = losses.contrastive_loss(contrast.logits_per_image, batch.positives, config.label_smoothing)
            rows = rows + losses.contrastive_loss(contrast.logits_per_text, batch.positives, config.label_smoothing)
            itc = rows / 2 * (batch.processes / pairs)

        negatives, matching, generation = None, [], None
        if config.itm_weight:
            negatives = self._negatives(contrast, batch, given_images, given_texts, generator)
        if config.itm_weight or config.itg_weight:
            matching, generation = self._pair_losses_of_parts(parts, image_embeds, texts, negatives, batch)
        itm = itm_logits = itm_labels = None
        if config.itm_weight:
            itm_logits = torch.cat(matching)
            kinds = [torch.full((len(kind),), int(i == 0), device=kind.device) for i, kind in enumerate(matching)]
            itm_labels = torch.cat(kinds)
            # the mean over the pairs there are, one or three kinds of them, with this batch's share in the whole
            itm = losses.matching_loss(itm_logits, itm_labels) / len(kinds) * (batch.processes / pairs)
        itg = None if generation is None else generation * (batch.processes / tokens)
        weighted = ((config.itc_weight, itc), (config.itm_weight, itm), (config.itg_weight, itg))
        return Blip2ImageTextMatchingModelOutput(
            loss=sum(weight * part for weight, part in weighted if part is not None),
            loss_itc=itc,
            loss_itm=itm,
            loss_itg=itg,
            logits_per_image=None if contrast is None else contrast.per_image,
            logits_per_text=None if contrast is None else contrast.per_text,
            text_embeds=None if contrast is None else contrast.text_vectors,
            image_embeds=None if contrast is None else contrast.image_vectors,
            positives=batch.positives,
            itm_logits=itm_logits,
            itm_labels=itm_labels,
        )

    # -- contrastive -------------------------------------------------------------------------------------------------

    def _contrast(self, parts: list[tuple[EncodedImages | torch.Tensor, Texts]], layout: Rows) -> _Contrast:
        vectors = [_run(self._pair_vectors, *part) for part in parts]
        image_vectors, text_vectors = (torch.cat(side) for side in zip(*vectors, strict=True))
        gather = gather_rows_with_gradient if self.config.itc_gather_gradients else gather_rows
        per_image = losses.image_text_similarity(image_vectors, gather(text_vectors, layout))
        if len(layout.sizes) == 1 and self.config.itc_gather_gradients:
            per_text = per_image.t()
        else:
            per_text = losses.image_text_similarity(gather(image_vectors, layout), text_vectors).t()
        temperature = losses.floored_temperature(self.temperature, self.config.temperature_floor)
        return _Contrast(image_vectors, text_vectors, per_image, per_text, temperature)

    def _pair_vectors(self, images: EncodedImages | torch.Tensor, texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors of images [n, Q, d] and texts [n, d], neither of which sees the other."""
        encoded = isinstance(images, EncodedImages)
        queries = images.query_output if encoded else self._query_pass(images).last_hidden_state
        return self._image_vectors(queries), self._text_vectors(self._text_pass(texts.ids, texts.mask, output_length=1))

    # -- matching and generation -------------------------------------------------------------------------------------

    def _negatives(
        self,
        contrast: _Contrast | None,
        batch: _GlobalBatch,
        images: torch.Tensor | None,
        texts: torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> Negatives | None:
        """The given negatives, or drawn ones (images first, as in the original code); None if there are none.

        Equality of ids is an equivalence, so a row without a negative means that all pairs are of one image: then no
        row of any process has one.
        """
        if images is not None and texts is not None:
            return Negatives(images, texts)
        if batch.positives.all():
            logger.warning_once(
                "a batch has no pair of another image: image-text matching has no negatives there and is trained on "
                "the true pairs alone"
            )
            return None
        if images is None:
            images = losses.sample_hard_negatives(contrast.logits_per_text, batch.positives, generator)
        if texts is None:
            texts = losses.sample_hard_negatives(contrast.logits_per_image, batch.positives, generator)
        return Negatives(images, texts)

    def _pair_losses_of_parts(
        self,
        parts: list[tuple[EncodedImages | torch.Tensor, Texts]],
        image_embeds: torch.Tensor,
        texts: Texts,
        negatives: Negatives | None,
        batch: _GlobalBatch,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """ITM logits, one [n, 2] per kind of pair, and the sum of the ITG loss, each empty where its weight is 0."""
        others: list[tuple] = [(None, None)] * len(parts)
        if negatives is not None:
            sizes = [len(part) for _, part in parts]
            other_texts = _gather_texts(texts, batch)[negatives.texts].split(sizes)
            if batch.processes == 1 and isinstance(parts[0][0], EncodedImages):
                other_images = [parts[0][0][negatives.images]]  # with their keys and values
            else:
                other_images = fetch_rows(image_embeds, negatives.images, batch.layout).split(sizes)
            others = list(zip(other_images, other_texts, strict=True))
        done = [_run(self._pair_losses, *part, *other) for part, other in zip(parts, others, strict=True)]
        matching = [torch.cat(kind) for kind in zip(*(itm for itm, _ in done), strict=True)]
        return matching, sum(itg for _, itg in done) if self.config.itg_weight else None

    def _pair_losses(
        self,
        images: EncodedImages | torch.Tensor,
        texts: Texts,
        negative_images: EncodedImages | torch.Tensor | None,
        negative_texts: Texts | None,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        if not isinstance(images, EncodedImages):
            images = self.encode_image(image_embeds=images)
        matching = (
            self._matching_logits(images, texts, negative_images, negative_texts) if self.config.itm_weight else []
        )
        generation = self._generation_loss(images, texts) if self.config.itg_weight else None
        return matching, generation

    def _matching_logits(
        self,
        images: EncodedImages,
        texts: Texts,
        negative_images: EncodedImages | torch.Tensor | None,
        negative_texts: Texts | None,
    ) -> list[torch.Tensor]:
        """Logits [n, 2] of (image, text), (negative image, text), (image, negative text)."""
        if negative_texts is None:
            return [self._match_logits(self._pair_pass(images, texts.ids, texts.mask, self._query_count))]
        # Both texts of an image follow each other and share its keys and values in place.
        both = texts.interleaved(negative_texts)
        own = self._match_logits(self._pair_pass(images, both.ids, both.mask, self._query_count))
        other = self._match_logits(self._pair_pass(negative_images, texts.ids, texts.mask, self._query_count))
        return [own[0::2], other, own[1::2]]

    def _generation_loss(self, images: EncodedImages, texts: Texts) -> torch.Tensor:
        """ITG: each token from those before it and the queries, [DEC] in the place of [CLS]; sum over tokens."""
        hidden = self._decode(texts.ids[:, :-1], texts.mask[:, :-1], images)
        wanted = texts.targets()
        logits = self._lm_logits(hidden[wanted])  # the head is the largest product: none of it for padding
        return losses.generation_loss(logits, texts.ids[:, 1:][wanted], self.config.label_smoothing)

    def _decode(self, input_ids: torch.Tensor, mask: torch.Tensor, images: EncodedImages) -> torch.Tensor:
        """Text [n, T] from the start, its first token taken for [DEC], against the queries' cache: [n, T, D]."""
        queries = self._query_count
        start = torch.full_like(input_ids[:, :1], self.config.qformer_config.decoder_start_token_id)
        return self.qformer(
            self.embeddings(torch.cat([start, input_ids[:, 1:]], dim=1)),
            query_length=0,
            attention_mask=generation_mask(queries, mask)[:, :, queries:],
            past_key_values=images.cache,
            use_cache=False,
        ).last_hidden_state

    def _lm_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V]."""
        return self.lm_head(hidden_states.to(self.lm_head.dense.weight.dtype))

    # -- the batch ---------------------------------------------------------------------------------------------------

    def _pair_images(
        self,
        pairs: int,
        pixel_values: torch.Tensor | None,
        image_embeds: torch.Tensor | EncodedImages | None,
        vision_features: torch.Tensor | None,
        interpolate_pos_encoding: bool,
        chunk_size: int | None,
    ) -> torch.Tensor | EncodedImages:
        """Image features [n, P, E], or the encoded images that were given.

        Raises:
            ValueError: if there is not one image per text, or an image has values that are not finite.
        """
        if isinstance(image_embeds, EncodedImages):
            images = self.encode_image(pixel_values, image_embeds, vision_features)
            if chunk_size is not None:
                raise ValueError("`chunk_size` needs images that are not encoded yet, got encoded ones")
            if len(images) != pairs:
                raise ValueError(f"`return_loss=True` needs one text per image, got {len(images)} and {pairs}")
            return images
        if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
            raise ValueError(f"`chunk_size` must be a positive integer or None, got {chunk_size!r}")
        given = {"pixel_values": pixel_values, "image_embeds": image_embeds, "vision_features": vision_features}
        for name, value in given.items():
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"`{name}` must be a tensor, got {type(value).__name__}")
            if len(value) != pairs:
                raise ValueError(
                    f"`return_loss=True` needs one image per text, got `{name}` {tuple(value.shape)} and `input_ids` "
                    f"of {pairs} rows"
                )
            if not value.is_floating_point():
                raise ValueError(f"`{name}` must be floating-point numbers (normalised), got {value.dtype}")
            if not value.isfinite().all():
                raise ValueError(f"`{name}` {tuple(value.shape)} has values that are not finite (NaN or infinite)")
        if chunk_size is None or pixel_values is None:
            return self._image_features(**given, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state

        def features(pixels: torch.Tensor) -> torch.Tensor:
            return self._image_features(
                pixels, image_embeds, vision_features, interpolate_pos_encoding
            ).last_hidden_state

        chunks = pixel_values.split(part_sizes(pairs, chunk_size, pixel_values.device))
        trained = any(parameter.requires_grad for _, parameter in self._backbones()["vision_model"])
        if not trained:  # nothing of the tower is kept for the backward pass, so it need not be computed again there
            return torch.cat([features(pixels) for pixels in chunks])
        return torch.cat([_run(features, pixels) for pixels in chunks])

    def _global_batch(self, texts: Texts, image_ids: torch.Tensor | None) -> _GlobalBatch:
        """
        Raises:
            ValueError: if `image_ids` are not integers [n], or given on some processes only.
        """
        rows, device = texts.ids.shape[0], texts.ids.device
        if image_ids is not None:
            _check_integers("image_ids", image_ids, rows)
            image_ids = image_ids.to(device, torch.int64)  # the same on all processes
        tokens = texts.targets().sum()
        own = torch.tensor([rows, texts.ids.shape[1], int(image_ids is not None), 0], device=device)
        own[3] = tokens  # put in by the device, which is not waited for
        layout, longest = Rows((rows,)), texts.ids.shape[1]
        if world_size() > 1:
            sizes, lengths, with_ids, all_tokens = gather_numbers(own).t().tolist()
            if len(set(with_ids)) > 1:
                raise ValueError(f"`image_ids` must be given on all processes or on none, got {with_ids} (1 = given)")
            layout, longest, tokens = Rows(tuple(sizes), process_index()), max(lengths), sum(all_tokens)
        all_ids = None if image_ids is None else gather_rows(image_ids, layout)
        columns = torch.arange(layout.total, device=device)
        positives = losses.positive_pairs(layout.numbers(device), columns, image_ids, all_ids)
        return _GlobalBatch(layout, positives, tokens, longest)


def _run(function: Callable, images: EncodedImages | torch.Tensor, *args: Any) -> Any:
    """`function(images, *args)`. For a chunk of features, which is not encoded, no activations are kept: the backward
    pass computes them again, with the same dropout."""
    if isinstance(images, EncodedImages):
        return function(images, *args)
    return checkpoint(function, images, *args, use_reentrant=False)


def _checked_indices(name: str, numbers: torch.Tensor | None, batch: _GlobalBatch) -> torch.Tensor | None:
    if numbers is None:
        return None
    rows, total = batch.positives.shape
    _check_integers(name, numbers, rows)
    numbers = numbers.to(batch.positives.device, torch.int64)
    if not ((numbers >= 0) & (numbers < total)).all():
        raise ValueError(f"`{name}` must be in 0 … {total - 1} (the global batch), got {numbers.tolist()}")
    if batch.positives.gather(1, numbers[:, None]).any():
        raise ValueError(f"`{name}` must name pairs that do not match (of other images), got {numbers.tolist()}")
    return numbers


def _check_integers(name: str, numbers: Any, rows: int) -> None:
    if not isinstance(numbers, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor of integers of shape [{rows}], got {type(numbers).__name__}")
    if numbers.shape != (rows,) or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise ValueError(
            f"`{name}` must be integers of shape [{rows}], one per pair, got {numbers.dtype} of shape "
            f"{tuple(numbers.shape)}"
        )


def _check_count(name: str, count: torch.Tensor | int | None) -> None:
    """A tensor's value is not looked at: the device would be waited for at every step."""
    number = not isinstance(count, bool) and isinstance(count, int | float) and count > 0
    if not (count is None or number or (isinstance(count, torch.Tensor) and count.numel() == 1)):
        raise ValueError(f"`{name}` must be a positive number or a tensor of one, got {count!r}")


def _gather_texts(texts: Texts, batch: _GlobalBatch) -> Texts:
    """The texts of all processes, [N, T of the longest]."""
    own = texts.widened(batch.text_length)
    return Texts(gather_rows(own.ids, batch.layout), gather_rows(own.mask, batch.layout))
