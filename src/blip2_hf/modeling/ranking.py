"""Ranking a list of candidate answers by their probability, the other way to answer questions (as in BLIP and ALBEF).

Image and prompt are computed once per row for all candidates, which share their keys and values.

Shapes: B rows of prompts, S positions of a prompt, K candidates of T tokens, C candidates in a chunk, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel

from ..outputs import AnswerScores
from .attention import without_checkpointing
from .beam_cache import shared_copy
from .encoded import EncodedImages
from .prefill import can_share, last_logits, position_arguments, read_causal, read_seq2seq
from .prompts import Prompt, pad_right
from .windows import check_answer

# What a chunk's keys, values and logits may take, if the caller says nothing: 2 GiB.
_CHUNK_BYTES = 2**31
_IGNORED = -100


class AnswerRankingMixin:
    """For `Blip2ForConditionalGeneration`."""

    @torch.no_grad()
    def score_answers(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        answer_input_ids: torch.Tensor,
        answer_attention_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | EncodedImages | None = None,
        vision_features: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        chunk_size: int | None = None,
    ) -> AnswerScores:
        """log p(answer | image, prompt) of every candidate behind every prompt.

        It is the loss of `forward` on that candidate as the target, negated and times its number of tokens. Every
        prompt is read once; each candidate costs its own tokens only (without the last, which nothing follows).

        Args:
            pixel_values, input_ids, attention_mask, image_embeds, vision_features, qformer_input_ids,
            qformer_attention_mask, interpolate_pos_encoding: images and prompts, as in `forward`.
            answer_input_ids: [K, T] the candidates, the same ones for every row, with the token that ends them
                (`blip2_hf.answer_rows.answer_rows` writes them).
            answer_attention_mask: [K, T], 1 = real, padding anywhere; default: all real.
            chunk_size: how many candidates (of all rows) go through the language model together. The result does not
                depend on it. Default: as many as take about 2 GiB.

        Returns:
            `log_probs` [B, K] float32, and `tokens` [K], the candidates' lengths.

        Raises:
            ValueError: as `forward`; for candidates that are empty, no ids of the vocabulary, or longer than the
                language model's positions allow behind the prompt.
        """
        if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
            raise ValueError(f"`chunk_size` must be a positive integer or None, got {chunk_size!r}")
        language_model, seq2seq = self.language_model, self.config.is_encoder_decoder
        vocabulary = self.get_output_embeddings().weight.shape[0]
        ids, tokens = _checked_answers(
            answer_input_ids, answer_attention_mask, vocabulary, self.config.image_token_index
        )
        prompt = self._read_inputs(
            pixel_values,
            image_embeds,
            vision_features,
            qformer_input_ids,
            qformer_attention_mask,
            interpolate_pos_encoding,
            input_ids,
            None,
            attention_mask,
        ).prompt
        ids, tokens = ids.to(prompt.mask.device), tokens.to(prompt.mask.device)
        check_answer(int(tokens.max()), prompt.mask, self.config.text_config, "answer_input_ids")
        with without_checkpointing(language_model):
            if seq2seq:
                start = language_model.prepare_decoder_input_ids_from_labels(ids[:1])[:, :1]
                reader: _Reader = _Seq2SeqReader(language_model, prompt.packed("right"), start)
            else:
                reader = _CausalReader(language_model, prompt.packed("left"))
            log_probs = _score(reader, ids, tokens, chunk_size)
        return AnswerScores(log_probs=log_probs, tokens=tokens)


# -- the language model behind a prompt that it has read -------------------------------------------------------------


class _Reader(ABC):
    """A language model that has read B prompts, for any number of continuations.

    Attributes:
        rows: B.
        logits: [B, V] of the first token behind each prompt.
        copied_bytes: what each candidate of a chunk copies of it, for all rows.
    """

    rows: int
    logits: torch.Tensor
    copied_bytes: int

    @abstractmethod
    def logits_behind(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, C, T, V] float32: the logits behind each token of the continuations [C, T] of every prompt."""

    def _continuations(self, ids: torch.Tensor) -> torch.Tensor:
        """[B * C, T], those of a row next to each other."""
        return ids.repeat(self.rows, 1)

    def _of_rows(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The logits of the continuations' positions, the last ones, as [B, C, T, V]."""
        return logits[:, -ids.shape[1] :].float().unflatten(0, (self.rows, ids.shape[0]))


class _CausalReader(_Reader):
    """Of a decoder-only model; the prompts' padding is on the left."""

    def __init__(self, model: PreTrainedModel, prompt: Prompt):
        self.model, self.prompt, self.rows = model, prompt, prompt.mask.shape[0]
        self.cache = None
        if can_share(model):
            self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.logits = read_causal(model, prompt, self.cache)
        self.copied_bytes = prompt.embeds.nbytes if self.cache is None else _cache_bytes(self.cache)

    def logits_behind(self, ids: torch.Tensor) -> torch.Tensor:
        count, length = ids.shape
        answers = self._continuations(ids)
        before = self.prompt.mask.repeat_interleave(count, dim=0)
        mask = torch.cat([before, torch.ones_like(answers)], dim=1)  # pads come last, where no real token sees them
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        if self.cache is None:
            answers = self.model.get_input_embeddings()(answers)
            prompts = self.prompt.embeds.repeat_interleave(count, dim=0)
            inputs = {"inputs_embeds": torch.cat([prompts, answers], dim=1), "use_cache": False}
        else:
            cache = shared_copy(self.cache, count, room=length)
            inputs, positions = (
                {"input_ids": answers, "past_key_values": cache, "use_cache": True},
                positions[:, -length:],
            )
        logits = self.model(
            attention_mask=mask,
            **inputs,
            return_dict=True,
            **position_arguments(self.model, positions),
            **last_logits(self.model, length),
        ).logits
        return self._of_rows(logits, ids)


class _Seq2SeqReader(_Reader):
    """Of an encoder-decoder model; the prompts' padding is on the right.

    Args:
        start: [1, 1] what the decoder starts with.
    """

    def __init__(self, model: PreTrainedModel, prompt: Prompt, start: torch.Tensor):
        self.model, self.mask, self.rows = model, prompt.mask, prompt.mask.shape[0]
        self.start = start.expand(self.rows, 1)
        self.encoded, self.logits, cache = read_seq2seq(model, prompt, self.start)
        self.cache = cache if can_share(model) else None
        self.copied_bytes = self.encoded.last_hidden_state.nbytes
        if self.cache is not None:
            self.copied_bytes += _cache_bytes(cache.self_attention_cache) + _cache_bytes(cache.cross_attention_cache)

    def logits_behind(self, ids: torch.Tensor) -> torch.Tensor:
        count, length = ids.shape
        answers = self._continuations(ids)
        if self.cache is None:
            inputs = {"use_cache": False}
            answers = torch.cat([self.start.repeat_interleave(count, dim=0), answers], dim=1)
        else:
            own = shared_copy(self.cache.self_attention_cache, count, room=length)
            cross = shared_copy(self.cache.cross_attention_cache, count)
            inputs = {"past_key_values": EncoderDecoderCache(own, cross), "use_cache": True}
        encoded = self.encoded.last_hidden_state.repeat_interleave(count, dim=0)
        logits = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            attention_mask=self.mask.repeat_interleave(count, dim=0),
            decoder_input_ids=answers,
            return_dict=True,
            **inputs,
        ).logits
        return self._of_rows(logits, ids)


# -- scores ----------------------------------------------------------------------------------------------------------


def _score(reader: _Reader, ids: torch.Tensor, tokens: torch.Tensor, chunk_size: int | None) -> torch.Tensor:
    """[B, K] log-probabilities of the candidates [K, T], padded on the right."""
    first = reader.logits.float().log_softmax(dim=-1)
    scores = first[:, ids[:, 0].to(first.device)]
    if chunk_size is None:
        logits = 2 * 4 * reader.rows * ids.shape[1] * first.shape[-1]  # in float32, and their logarithms
        chunk_size = max(1, _CHUNK_BYTES // (reader.copied_bytes + logits))
    # Candidates of one length together: the fewest pads.
    for chunk in tokens.argsort(stable=True).split(chunk_size):
        longest = int(tokens[chunk].max())
        if longest == 1:
            continue
        places = torch.arange(longest, device=ids.device)
        targets = ids[chunk, 1:longest].masked_fill(places[1:] >= tokens[chunk, None], _IGNORED)
        logits = reader.logits_behind(ids[chunk, : longest - 1])
        targets = targets.to(logits.device).expand(reader.rows, -1, -1)
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 2), targets.flatten(), ignore_index=_IGNORED, reduction="none"
        )
        scores[:, chunk.to(scores.device)] -= losses.view(targets.shape).sum(dim=2).to(scores.device)
    return scores


def _checked_answers(
    ids: torch.Tensor, mask: torch.Tensor | None, vocabulary: int, image_token_id: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates [K, T] with their padding (id 0) on the right, and their lengths [K]."""
    if not torch.is_tensor(ids) or ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        got = f"{ids.dtype} of shape {tuple(ids.shape)}" if torch.is_tensor(ids) else type(ids).__name__
        raise ValueError(
            f"`answer_input_ids` must be integers of shape [candidates, tokens], at least one of each, got {got}"
        )
    if mask is not None and not torch.is_tensor(mask):
        raise ValueError(f"`answer_attention_mask` must be a tensor, got {type(mask).__name__}")
    mask = torch.ones_like(ids) if mask is None else mask.to(ids.device)
    if mask.shape != ids.shape:
        raise ValueError(
            f"`answer_attention_mask` must have the shape of `answer_input_ids` {tuple(ids.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    ids = ids.long().masked_fill(mask == 0, 0)
    tokens = (mask != 0).sum(dim=1)
    if (tokens == 0).any():
        empty = (tokens == 0).nonzero().flatten().tolist()
        raise ValueError(f"`answer_input_ids` must have at least one token per candidate, got none in {empty}")
    lowest, highest = torch.stack(ids.aminmax()).tolist()
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(f"`answer_input_ids` must be in 0 … {vocabulary - 1}, got {lowest} … {highest}")
    if image_token_id is not None and ((ids == image_token_id) & (mask != 0)).any():
        raise ValueError(f"`answer_input_ids` must not have the image placeholder {image_token_id}, got it")
    return pad_right(ids, mask)[0], tokens


def _cache_bytes(cache: DynamicCache) -> int:
    filled = [layer for layer in cache.layers if layer.is_initialized]
    return sum(states.nbytes for layer in filled for states in (layer.keys, layer.values))
