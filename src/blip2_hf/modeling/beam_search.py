"""Beam search that costs less: the loop that `GenerationMixin.generate` runs with `custom_generate=beam_search`.

It chooses what `transformers`' own beam search chooses, token for token, by the same arithmetic, and saves:

- the prompt is read once per row and shared by the beams (`beam_decoders`), the first token included;
- a row leaves the batch as soon as its result is settled;
- a row is settled, beyond `transformers`' own rule, as soon as no running beam can beat what is found. That is exact
  for `length_penalty <= 0` and one returned sequence only: a running beam's log-probability can but fall, and the
  longer it gets, the more its length costs. (For a positive penalty length pays, by an amount that is not bounded by
  what is known; and with several returned sequences every place counts.) Nor where a logits processor could make a
  log-probability positive.

Shapes: B rows, R of them still searched, n beams, K candidates, L positions at most, V vocabulary.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.generation import (
    EosTokenCriteria,
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    logits_process as processors,
)
from transformers.modeling_utils import PreTrainedModel

from .beam_attention import shared_rows
from .beam_cache import packed_places
from .beam_decoders import read_prompts

# Of `transformers`: these look at each row for itself, and never make a log-probability positive.
_HARMLESS = frozenset(
    {
        processors.MinLengthLogitsProcessor,
        processors.MinNewTokensLengthLogitsProcessor,
        processors.NoRepeatNGramLogitsProcessor,
        processors.NoBadWordsLogitsProcessor,
        processors.SuppressTokensLogitsProcessor,
        processors.SuppressTokensAtBeginLogitsProcessor,
        processors.ForcedBOSTokenLogitsProcessor,
        processors.ForcedEOSTokenLogitsProcessor,
        processors.InfNanRemoveLogitsProcessor,
        processors.LogitNormalization,
    }
)
_ROWWISE = _HARMLESS | {processors.SequenceBiasLogitsProcessor, processors.ExponentialDecayLengthPenalty}
_NEVER_POSITIVE = _HARMLESS | {
    processors.PrefixConstrainedLogitsProcessor,  # asks by the row's number
    processors.RepetitionPenaltyLogitsProcessor,  # knows how much padding each row has
}
_ROWWISE_CRITERIA = frozenset({MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria})
_NEVER = -1.0e9  # what `transformers` adds to a score that must not win


def beam_search(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateBeamDecoderOnlyOutput | GenerateBeamEncoderDecoderOutput:
    """What `generate` calls in place of its own loop (`prefill.can_search` says when it may).

    Args:
        input_ids: [B * n, S] ids of the prompts (S may be 0) or of the decoder's start, those of a row equal.
        logits_processor, stopping_criteria, generation_config: as `generate` has prepared them.
        model_kwargs: what it would call the model with.

    Returns:
        As `transformers`' beam search, without `past_key_values`. With `output_scores` or `output_logits` no row
        leaves early, so that there are as many steps as there.
    """
    config, beams = generation_config, generation_config.num_beams
    recorded = config.return_dict_in_generate and (config.output_scores or config.output_logits)
    rules = _Rules.of(config, input_ids.shape[1], logits_processor)
    leaving = not recorded and _all_in(logits_processor, _ROWWISE) and _all_in(stopping_criteria, _ROWWISE_CRITERIA)
    decoder = read_prompts(model, input_ids, beams, config.max_length - input_ids.shape[1], model_kwargs)
    state = result = _Rows.start(input_ids, rules)
    logits = decoder.logits.repeat_interleave(beams, dim=0)
    all_scores: tuple | None = () if config.return_dict_in_generate and config.output_scores else None
    all_logits: tuple | None = () if config.return_dict_in_generate and config.output_logits else None
    with shared_rows(model) if decoder.shares_rows else contextlib.nullcontext():
        while True:
            logits = logits.to(input_ids.device, torch.float32)
            scores = logits_processor(state.running_ids().flatten(0, 1), logits.log_softmax(dim=-1))
            all_logits = None if all_logits is None else (*all_logits, logits)
            all_scores = None if all_scores is None else (*all_scores, scores.clone())
            parents, continues = state.advance(scores, stopping_criteria, all_scores, rules)
            settled = state.settled(rules, early=rules.bounded and not recorded)
            goes_on = continues & ~state.over(rules)
            *stop, goes_on = torch.cat([settled, goes_on[None]]).tolist()  # at once: it waits for the device
            if not goes_on or (all(stop) and not recorded):
                break
            if leaving and any(stop):
                result.put(state)
                kept = packed_places([not stops for stops in stop])
                state, parents = state.take(kept), parents[kept]
                decoder.keep(kept)
            tokens = state.running_ids()[:, :, -1]
            logits = decoder.step(tokens, parents).flatten(0, 1)
    result.put(state)
    return result.output(config, model.config.is_encoder_decoder, all_scores, all_logits)


@dataclass(frozen=True)
class _Rules:
    """What a search goes by. start: positions before the first new one; candidates: K; fill: id behind an end."""

    start: int
    longest: int
    beams: int
    returned: int
    candidates: int
    fill: int
    length_penalty: float
    early_stopping: bool | str
    bounded: bool

    @classmethod
    def of(cls, config: GenerationConfig, start: int, logits_processor: LogitsProcessorList) -> _Rules:
        ends = [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).flatten().tolist()
        normalised = bool(logits_processor) and type(logits_processor[-1]) is processors.LogitNormalization
        return cls(
            start=start,
            longest=config.max_length,
            beams=config.num_beams,
            returned=config.num_return_sequences,
            candidates=max(2, 1 + len(ends)) * config.num_beams,
            fill=-1 if config.eos_token_id is None else int(config.pad_token_id or ends[0]),
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            bounded=config.length_penalty <= 0
            and config.num_return_sequences == 1
            and (normalised or _all_in(logits_processor, _NEVER_POSITIVE)),
        )


@dataclass
class _Rows:
    """The beams of R rows, all of one length, and the best sequences that have ended.

    Attributes:
        row: [R] which of the batch they are.
        ids: [R, n, L] of the running beams; scores: [R, n] their log-probabilities, best first; paths: [R, n, L - S]
            the beam of the batch that each of their tokens went on from, -1 behind the last.
        best_ids, best_scores, best_paths: the same of the ended ones, scores divided by length; ended: [R, n] whether
            that place is taken.
        open: [R] whether, by `transformers`' rule, a running beam can still get a place.
        length: positions of the running beams so far.
    """

    row: torch.Tensor
    ids: torch.Tensor
    scores: torch.Tensor
    paths: torch.Tensor
    best_ids: torch.Tensor
    best_scores: torch.Tensor
    best_paths: torch.Tensor
    ended: torch.Tensor
    open: torch.Tensor
    length: int

    @classmethod
    def start(cls, input_ids: torch.Tensor, rules: _Rules) -> _Rows:
        beams = rules.beams
        rows = input_ids.shape[0] // beams
        ids = input_ids.new_full((rows, beams, rules.longest), rules.fill, dtype=torch.long)
        ids[:, :, : rules.start] = input_ids.unflatten(0, (rows, beams))
        scores = torch.zeros((rows, beams), dtype=torch.float32, device=ids.device)
        scores[:, 1:] = _NEVER  # all beams are equal at first: one of them counts
        paths = torch.full((rows, beams, rules.longest - rules.start), -1, dtype=torch.int32, device=ids.device)
        return cls(
            row=torch.arange(rows, device=ids.device),
            ids=ids,
            scores=scores,
            paths=paths,
            best_ids=ids.clone(),
            best_scores=torch.full_like(scores, _NEVER),
            best_paths=paths.clone(),
            ended=torch.zeros_like(scores, dtype=torch.bool),
            open=torch.ones(rows, dtype=torch.bool, device=ids.device),
            length=rules.start,
        )

    def running_ids(self) -> torch.Tensor:
        """[R, n, positions so far]"""
        return self.ids[:, :, : self.length]

    def take(self, kept: list[int]) -> _Rows:
        return _Rows(*(value[kept] if torch.is_tensor(value) else value for value in self._values()))

    def put(self, other: _Rows) -> None:
        """Writes rows back to where they were taken from."""
        if other is not self:
            for mine, value in zip(self._values(), other._values(), strict=True):
                if torch.is_tensor(mine):
                    mine[other.row] = value

    def _values(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]

    def advance(
        self, log_probs: torch.Tensor, stopping_criteria: StoppingCriteriaList, all_scores: tuple | None, rules: _Rules
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Goes one token further.

        Args:
            log_probs: [R * n, V] of that token.

        Returns:
            which beam each running beam went on from, [R, n] in its row; and whether any candidate of any row has
            not ended (bool, no dimension).
        """
        rows, vocabulary = self.ids.shape[0], log_probs.shape[-1]
        totals = (log_probs.unflatten(0, (rows, -1)) + self.scores[:, :, None]).flatten(1)
        found, index = totals.topk(rules.candidates)  # [R, K]
        parents, tokens = index // vocabulary, index % vocabulary
        ids, paths = _pick(self.ids, parents), _pick(self.paths, parents)
        ids[:, :, self.length] = tokens
        paths[:, :, self.length - rules.start] = parents + self.row[:, None] * rules.beams
        ends = stopping_criteria(ids[:, :, : self.length + 1].flatten(0, 1), all_scores).unflatten(0, (rows, -1))

        running = found + ends.float() * _NEVER
        chosen = running.topk(rules.beams)[1]
        self.ids, self.paths, self.scores = _pick(ids, chosen), _pick(paths, chosen), _pick(running, chosen)

        # Of the candidates that end, only those among the n best of all count.
        ending = ends & (torch.arange(rules.candidates, device=ends.device) < rules.beams)
        final = found / ((self.length + 1 - rules.start) ** rules.length_penalty)
        final += self._full(rules).float()[:, None] * _NEVER
        final += (~self.open).float()[:, None] * _NEVER
        final += (~ending).float() * _NEVER
        merged = torch.cat([self.best_scores, final], dim=1)
        best = merged.topk(rules.beams)[1]
        self.best_scores = _pick(merged, best)
        self.best_ids = _pick(torch.cat([self.best_ids, ids], dim=1), best)
        self.best_paths = _pick(torch.cat([self.best_paths, paths], dim=1), best)
        self.ended = _pick(torch.cat([self.ended, ending], dim=1), best)

        self.length += 1
        self.open = self.open & self._can_get_a_place(rules)
        return parents.gather(1, chosen), ~ends.all()

    def _full(self, rules: _Rules) -> torch.Tensor:
        """[R] whether a row takes no more ended sequences, as n are there and `early_stopping` is True."""
        return self.ended.all(dim=1) & (rules.early_stopping is True)

    def _can_get_a_place(self, rules: _Rules) -> torch.Tensor:
        """[R] `transformers`' rule: whether the best running beam would beat the worst ended one, at its length now
        (or at the longest possible, for "never" and a positive penalty)."""
        hopeful = rules.early_stopping == "never" and rules.length_penalty > 0
        length = (rules.longest if hopeful else self.length) - rules.start
        reachable = self.scores[:, :1] / (length**rules.length_penalty)
        worst = torch.where(self.ended, self.best_scores.min(dim=1, keepdim=True)[0], _NEVER)
        return (reachable > worst).any(dim=1)

    def over(self, rules: _Rules) -> torch.Tensor:
        """Whether `transformers` would end the search of these rows (bool, no dimension)."""
        return ~self.open.any() | self._full(rules).all()

    def settled(self, rules: _Rules, early: bool) -> torch.Tensor:
        """[R] whether nothing that is returned of a row can change any more.

        early: also if something else than what is returned could.
        """
        settled = ~self.open | self._full(rules)
        # Equal ones may change places as long as `transformers` sorts them again, step by step.
        falls = self.best_scores[:, 1:] < self.best_scores[:, :-1]
        ranked = self.ended[:, : rules.returned].all(dim=1) & falls[:, : rules.returned].all(dim=1)
        if not early:
            return settled & ranked
        # A running beam ends one token later at the earliest, with at most the log-probability that it has.
        reachable = self.scores[:, 0] / ((self.length + 1 - rules.start) ** rules.length_penalty)
        reachable = reachable.clamp(min=torch.finfo(reachable.dtype).min / 2)
        rounding = 1e-5 * (1 + reachable.abs())
        return (settled | (self.best_scores[:, 0] > reachable + rounding)) & ranked

    def output(
        self, config: GenerationConfig, encoder_decoder: bool, scores: tuple | None, logits: tuple | None
    ) -> torch.Tensor | GenerateBeamDecoderOnlyOutput | GenerateBeamEncoderDecoderOutput:
        returned = config.num_return_sequences
        ids, paths = (states[:, :returned].flatten(0, 1) for states in (self.best_ids, self.best_paths))
        new = (paths >= 0).sum(dim=1).max()
        ids, paths = ids[:, : ids.shape[1] - paths.shape[1] + new], paths[:, :new]
        if not config.return_dict_in_generate:
            return ids
        kind = GenerateBeamEncoderDecoderOutput if encoder_decoder else GenerateBeamDecoderOnlyOutput
        return kind(
            sequences=ids,
            sequences_scores=self.best_scores[:, :returned].flatten() if config.output_scores else None,
            scores=scores,
            logits=logits,
            beam_indices=paths,
        )


def _pick(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of [R, n, …] those at `index` [R, m] of each row: [R, m, …]."""
    return torch.take_along_dim(states, index.reshape(index.shape + (1,) * (states.ndim - 2)), dim=1)


def _all_in(found: list, known: frozenset) -> bool:
    return all(type(one) in known for one in found)
