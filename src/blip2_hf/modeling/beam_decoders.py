"""Language models that have read prompts once per row, and go on with several beams of each.

Shapes: R rows that are still searched (at first the whole batch), n beams per row, S positions of the prompt, G
positions behind it, V vocabulary.

Where attention allows it, the beams of a row are the tokens of one sequence [R, n], each with a mask of its own, so
that keys and values of the prompt are there once per row. A beam sees the prompt and what leads to it; those that
changed places move no keys and values but the rows of the mask:

    prompt  step 1  step 2
    1 1 1   1 0 0   1 0 0     beam 0 goes on from beam 0
    1 1 1   1 0 0   0 1 0     beam 1 goes on from beam 0, too
    1 1 1   0 0 1   0 0 1     beam 2 goes on from beam 2: what beam 1 wrote in step 1 nobody sees any more
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .beam_attention import can_share_rows
from .beam_cache import keep_rows, share_prompt
from .prefill import position_arguments, read_causal, read_decoder, takes_positions
from .prompts import Prompt

# Language models whose attention goes by the places of keys in the cache, or to a fixed number of them.
_BY_PLACE = ("gpt_neo", "doge")
# Generated tokens that there is room for at first; the most if so many are to be generated at most.
_ROOM = 64


class BeamDecoder(ABC):
    """A language model in the middle of a beam search.

    Attributes:
        logits: [R, V] behind the prompts.
        shares_rows: whether its attention must be `beam_attention.shared_rows`.
    """

    logits: torch.Tensor
    shares_rows = False

    @abstractmethod
    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Logits [R, n, V] behind `tokens` [R, n], each of which goes on from one of its row's beams, `parents`
        [R, n]."""

    @abstractmethod
    def keep(self, kept: list[int]) -> None:
        """Goes on with these rows only (see `beam_cache.packed_places`)."""


def read_prompts(
    model: PreTrainedModel, input_ids: torch.Tensor, beams: int, new_tokens: int, given: dict[str, Any]
) -> BeamDecoder:
    """Reads what `generate` hands to a decoding loop.

    Args:
        input_ids: [B * n, S] ids of the prompts, or of the decoder's start.
        given: what `generate` would call the model with: `inputs_embeds`, `attention_mask`, `encoder_outputs`
            (tensors with B * n rows, those of a row equal).
    """
    room = min(new_tokens, _ROOM)
    mask = given.get("attention_mask")
    mask = None if mask is None else mask[::beams]
    if model.config.is_encoder_decoder:
        encoded = given["encoder_outputs"]
        if mask is None:
            mask = torch.ones_like(encoded.last_hidden_state[::beams, :, 0], dtype=torch.long)
        return _Seq2SeqBeams(model, encoded, mask, input_ids[::beams], beams, room)
    embeds = given.get("inputs_embeds")
    embeds = model.get_input_embeddings()(input_ids[::beams]) if embeds is None else embeds[::beams]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
    prompt = Prompt(embeds, mask, None, torch.zeros_like(mask, dtype=torch.bool))
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    longest = embeds.shape[1] + new_tokens
    cache.layers = [DynamicLayer() if _is_as_wide(layer, longest) else layer for layer in cache.layers]
    logits = read_causal(model, prompt, cache)
    if _can_be_one_sequence(model, cache):
        return _TreeBeams(model, prompt, cache, logits, beams, room)
    return _CausalBeams(model, prompt, cache, logits, beams, room)


def _is_as_wide(layer: CacheLayerMixin, longest: int) -> bool:
    """Whether a layer of a cache has a sliding window that never moves."""
    return type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= longest


def _can_be_one_sequence(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether a decoder-only model takes positions and masks of any kind, and its cache keeps every position."""
    return (
        takes_positions(model)
        and model.config._attn_implementation in ("sdpa", "eager")
        and not getattr(model.config.get_text_config(), "alibi", False)  # distances from the mask, not from positions
        and model.config.model_type not in _BY_PLACE
        and not model.is_remote_code()
        and all(type(layer) is DynamicLayer and layer.get_seq_length() for layer in cache.layers)
    )


class _TreeBeams(BeamDecoder):
    """Of a decoder-only model: the beams of a row as one sequence."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Prompt,
        cache: DynamicCache,
        logits: torch.Tensor,
        beams: int,
        room: int,
    ):
        self.model, self.cache, self.logits = model, cache, logits
        self.seen = prompt.mask.bool()[:, None].expand(-1, beams, -1)  # [R, n, S + G] by each beam
        self.prompt_length = prompt.mask.shape[1]
        self.next_position = prompt.mask.sum(dim=1)  # [R]
        self.most = room * beams  # positions behind the prompt, before those that nobody sees are looked for
        share_prompt(cache, 1, self.most)

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        rows, beams = tokens.shape
        seen = self.seen.gather(1, parents[..., None].expand(-1, -1, self.seen.shape[2]).to(self.seen.device))
        if seen.shape[2] - self.prompt_length + beams > self.most:
            seen = self._without_unseen(seen)
        itself = torch.eye(beams, dtype=torch.bool, device=seen.device).expand(rows, -1, -1)
        self.seen = torch.cat([seen, itself], dim=2)
        logits = self.model(
            input_ids=tokens.to(self.seen.device),
            attention_mask=self._mask(),
            position_ids=self.next_position[:, None].expand(-1, beams),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        ).logits
        self.next_position = self.next_position + 1
        return logits

    def keep(self, kept: list[int]) -> None:
        keep_rows(self.cache, kept)
        self.seen, self.next_position = self.seen[kept], self.next_position[kept]

    def _mask(self) -> torch.Tensor:
        """[R, 1, n, S + G], to be added to the scores of attention: of whatever kind it is, at once for all layers."""
        dtype = self.cache.layers[0].keys.dtype
        mask = torch.zeros(self.seen.shape, dtype=dtype, device=self.seen.device)
        return mask.masked_fill_(~self.seen, torch.finfo(dtype).min)[:, None]

    def _without_unseen(self, seen: torch.Tensor) -> torch.Tensor:
        """Drops positions that no beam sees any more from the cache and from `seen` [R, n, S + G]."""
        prompt, generated = seen.tensor_split([self.prompt_length], dim=2)
        alive = generated.any(dim=1)
        places = alive.int().argsort(dim=1, descending=True, stable=True)[:, : int(alive.sum(dim=1).max())]
        for layer in self.cache.layers:
            layer.keep_generated(places)
        self.most = max(self.most, 2 * places.shape[1])
        return torch.cat([prompt, generated.gather(2, places[:, None].expand(-1, seen.shape[1], -1))], dim=2)


class _CausalBeams(BeamDecoder):
    """Of a decoder-only model that must have each beam as a row (sliding windows, distances from the mask, …)."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Prompt,
        cache: DynamicCache,
        logits: torch.Tensor,
        beams: int,
        room: int,
    ):
        self.model, self.cache, self.logits, self.beams = model, cache, logits, beams
        self.mask = prompt.mask.repeat_interleave(beams, dim=0)
        share_prompt(cache, beams, room)

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        self.cache.reorder_cache(_flat(parents))
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        logits = self.model(
            input_ids=tokens.to(self.mask.device).flatten()[:, None],
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **position_arguments(self.model, self.mask.sum(dim=1, keepdim=True) - 1),
        ).logits
        return logits[:, -1].unflatten(0, tokens.shape)

    def keep(self, kept: list[int]) -> None:
        keep_rows(self.cache, kept, self.beams)
        self.mask = _of_rows(self.mask, kept, self.beams)


class _Seq2SeqBeams(BeamDecoder):
    """Of an encoder-decoder: keys and values of the encoder's output are there once per row, where attention allows
    it, and never reordered."""

    def __init__(
        self,
        model: PreTrainedModel,
        encoded: ModelOutput,
        mask: torch.Tensor,
        start: torch.Tensor,
        beams: int,
        room: int,
    ):
        """
        Args:
            encoded: the encoder's output, [R * n, S, W]; mask: [R, S]; start: [R, T] what the decoder begins with.
        """
        self.model, self.encoded, self.beams = model, encoded, beams
        once = _with_states(encoded, encoded.last_hidden_state[::beams])
        self.logits, cache = read_decoder(model, once, mask, start)
        self.mask = mask.repeat_interleave(beams, dim=0)
        self.own = cache.self_attention_cache
        share_prompt(self.own, beams, room)
        cross = cache.cross_attention_cache
        filled = all(type(layer) is DynamicLayer and layer.get_seq_length() for layer in cross.layers)
        self.shares_rows = filled and can_share_rows(model)
        self.cross_times = 1 if self.shares_rows else beams
        share_prompt(cross, self.cross_times)
        self.cache = EncoderDecoderCache(self.own, cross)

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        self.own.reorder_cache(_flat(parents))
        logits = self.model(
            encoder_outputs=self.encoded,
            attention_mask=self.mask,
            decoder_input_ids=tokens.to(self.mask.device).flatten()[:, None],
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        ).logits
        return logits[:, -1].unflatten(0, tokens.shape)

    def keep(self, kept: list[int]) -> None:
        keep_rows(self.own, kept, self.beams)
        keep_rows(self.cache.cross_attention_cache, kept, self.cross_times)
        states = _of_rows(self.encoded.last_hidden_state, kept, self.beams)
        self.encoded, self.mask = _with_states(self.encoded, states), _of_rows(self.mask, kept, self.beams)


def _with_states(encoded: ModelOutput, states: torch.Tensor) -> ModelOutput:
    """An encoder's output with other states (of some models there is more in it)."""
    return type(encoded)(**{**encoded, "last_hidden_state": states})


def _flat(parents: torch.Tensor) -> torch.Tensor:
    """Beams [R, n], counted in their row, as rows [R * n] of the cache."""
    first = torch.arange(parents.shape[0], device=parents.device)[:, None] * parents.shape[1]
    return (parents + first).flatten()


def _of_rows(states: torch.Tensor, kept: list[int], times: int) -> torch.Tensor:
    """Of [rows * times, …] the rows `kept`."""
    return states.unflatten(0, (-1, times))[kept].flatten(0, 1)
