"""`beam_search` chooses what `transformers` chooses, and stops and lets rows go when it may."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from blip2_hf.modeling import beam_search as module
from blip2_hf.modeling.beam_search import beam_search
from tiny_searches import CONFIGS, FURTHER, ends_with, language_model, prompts, random_search

# generate of transformers 5.23 tells about arguments that it leaves out for this kind of prompt
pytestmark = pytest.mark.filterwarnings("ignore:Passing .repetition_penalty")
SEARCH = {"num_beams": 4, "max_new_tokens": 12}
SHORT = {**SEARCH, "length_penalty": -1.0}


def both(model, **options: Any) -> tuple[Any, Any]:
    return model.generate(**options), model.generate(**options, custom_generate=beam_search)


class Calls:
    """The shapes of what a model was given, one per call, while in use."""

    def __init__(self, model):
        self.model, self.shapes = model, []

    def __enter__(self) -> "Calls":
        self.hook = self.model.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *_) -> None:
        self.hook.remove()

    def _record(self, model, args: tuple, inputs: dict) -> None:
        names = ("decoder_input_ids",) if model.config.is_encoder_decoder else ("inputs_embeds", "input_ids")
        given = next(inputs[name] for name in names if inputs.get(name) is not None)
        self.shapes.append(tuple(given.shape[:2]))


def calls(model, **options: Any) -> list[tuple[int, int]]:
    with Calls(model) as recorded:
        model.generate(**options)
    return recorded.shapes


# -- the same tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_chooses_what_transformers_chooses(family: str) -> None:
    """Over models that are more or less certain, prompts, lengths, penalties, processors, stopping rules."""
    for seed in range(8):
        model, options = random_search(family, seed)
        expected, found = both(model, **options)
        assert torch.equal(found, expected), f"seed {seed}"


@pytest.mark.parametrize("further", FURTHER)
@pytest.mark.parametrize("family", ["opt", "t5"])
def test_with_what_else_a_call_may_ask_for(family: str, further: str) -> None:
    model, inputs = ends_with(language_model(family, 1), 0.3), prompts(family, 3, 4)
    for options in (SHORT, SEARCH):
        expected, found = both(model, **inputs, **options, **FURTHER[further])
        assert torch.equal(found, expected)


@pytest.mark.parametrize("several", [1, 2])
def test_where_everything_is_equal(several: int) -> None:
    """`transformers` sorts what has ended again at each step, and equal ones change places: until it stops, ours goes
    on."""
    model, inputs = language_model("opt", 0, 0.0), prompts("opt", 2, 3)
    for ends in ([8, 10], [7, 8]):
        rule = {"stopping_criteria": StoppingCriteriaList([EosTokenCriteria(ends)])}
        for penalty in (-1.0, 0.0):
            options = {"num_beams": 3, "max_new_tokens": 3, "length_penalty": penalty, "num_return_sequences": several}
            expected, found = both(model, **inputs, **options, **rule)
            assert torch.equal(found, expected)


def test_ids_and_ends_of_other_kinds() -> None:
    model, inputs = language_model("opt", 1, 0.3), prompts("opt", 2, 4)
    expected, found = both(model, **{**inputs, "input_ids": inputs["input_ids"].int()}, **SEARCH)
    assert torch.equal(found, expected) and found.dtype == expected.dtype == torch.long
    for end in (torch.tensor(3), torch.tensor([3, 5]), (3, 5)):
        expected, found = both(model, **inputs, **SEARCH, eos_token_id=end, pad_token_id=torch.tensor(0))
        assert torch.equal(found, expected)


def test_scores_are_float32_whatever_torchs_default_is() -> None:
    model, inputs = language_model("opt", 1, 0.3), prompts("opt", 2, 4)
    torch.set_default_dtype(torch.float64)
    try:
        expected, found = both(model, **inputs, **SHORT, return_dict_in_generate=True, output_scores=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.sequences_scores.dtype == expected.sequences_scores.dtype == torch.float32


def test_models_that_return_tuples_by_default() -> None:
    model = language_model("t5", 1, 0.3)
    model.config.return_dict = False
    expected, found = both(model, **prompts("t5", 2, 4), **SHORT)
    assert torch.equal(found, expected)


def test_negative_control_a_stop_where_length_pays_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ended first leads, and is overtaken."""
    right, differing = module._Rules.of, 0
    for seed in (0, 4, 11):
        model, options = language_model("opt", seed, 0.6), {**prompts("opt", 4, 4, seed), **SEARCH}
        expected, found = both(model, **options, length_penalty=1.0)
        assert torch.equal(found, expected)
        with monkeypatch.context() as patch:
            patch.setattr(module._Rules, "of", lambda *args: replace(right(*args), bounded=True))
            wrong = model.generate(**options, length_penalty=1.0, custom_generate=beam_search)
        differing += not torch.equal(wrong, expected)
    assert differing


@pytest.mark.parametrize("family", ["opt", "bloom", "t5"])
@pytest.mark.parametrize("several", [1, 3])
def test_dictionary_is_that_of_transformers(family: str, several: int) -> None:
    model = language_model(family, 1, 0.3)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, found = both(model, **prompts(family, 3, 4), **SHORT, **options, num_return_sequences=several)
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.beam_indices, expected.beam_indices)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)
    for name in ("scores", "logits"):
        assert len(found[name]) == len(expected[name])
        for step, plain in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(step, plain, atol=1e-4, rtol=1e-4)
    alone = model.generate(**prompts(family, 3, 4), **SHORT, return_dict_in_generate=True, custom_generate=beam_search)
    assert alone.scores is alone.sequences_scores is None


# -- when a search ends -----------------------------------------------------------------------------------------------


def ending_model(family: str = "opt"):
    """Other words than the end are likely, too, so that a list of n ended sequences is full later than its best is
    found."""
    return ends_with(language_model(family, 3, 0.3), 0.5)


def steps(model, **options: Any) -> tuple[int, int]:
    """How often a model is called, plainly and by `beam_search`, for the same tokens."""
    with Calls(model) as plain:
        expected = model.generate(**options)
    with Calls(model) as ours:
        assert torch.equal(model.generate(**options, custom_generate=beam_search), expected)
    return len(plain.shapes), len(ours.shapes)


@pytest.mark.parametrize("family", ["opt", "bloom", "t5"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0])
def test_ends_as_soon_as_nothing_can_win(family: str, penalty: float) -> None:
    model, inputs = ending_model(family), prompts(family, 3, 4)
    plain, ours = steps(model, **inputs, **SEARCH, length_penalty=penalty)
    # The best ends at the first step; nothing that goes on can beat log(1/2).
    assert ours == 1 < plain
    plain, ours = steps(model, **inputs, **SEARCH, length_penalty=penalty, min_new_tokens=4)
    assert ours == 5 < plain


class Nothing(LogitsProcessor):
    """Changes nothing; no row may leave before it has seen it, as it might look at others."""

    def __init__(self, rows: int):
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert len(input_ids) == self.rows
        return scores


NOT_EARLY = {
    "length pays": {"length_penalty": 1.0},
    "several returned": {"length_penalty": -1.0, "num_return_sequences": 2},
    "scores may rise": {"length_penalty": -1.0, "sequence_bias": {(8,): 3.0}},
    "unknown processor": {"length_penalty": -1.0, "logits_processor": LogitsProcessorList([Nothing(12)])},
}


@pytest.mark.parametrize("why", NOT_EARLY)
def test_does_not_end_early_where_that_is_not_exact(why: str) -> None:
    plain, ours = steps(ending_model(), **prompts("opt", 3, 4), **SEARCH, **NOT_EARLY[why])
    assert plain == ours > 2


def test_as_many_scores_as_transformers_gives() -> None:
    model, inputs = ending_model(), prompts("opt", 3, 4)
    recorded = {"return_dict_in_generate": True, "output_scores": True}
    expected, found = both(model, **inputs, **SHORT, **recorded)
    assert len(found.scores) == len(expected.scores) > 2


def test_as_many_scores_where_rows_are_over_for_different_reasons() -> None:
    """Of one row all beams have ended, of the other there are n ended sequences: `transformers` goes on, as neither
    holds for both."""
    model = ends_with(language_model("opt", 1, 0.3), 0.5)
    options = {"num_beams": 3, "max_new_tokens": 6, "length_penalty": 1.0, "early_stopping": True}
    options["prefix_allowed_tokens_fn"] = lambda row, ids: [3] if row == 0 else list(range(3, 12))
    expected, found = both(model, **prompts("opt", 3, 3), **options, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(expected.scores)


# -- rows that leave --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "llama", "bloom", "mistral", "t5", "bart"])
def test_rows_leave_the_batch_when_they_are_settled(family: str) -> None:
    model = language_model(family, 5, 0.6)
    shrank = 0
    for seed in range(4):
        options = {**prompts(family, 4, 4, seed), **SHORT}
        expected = model.generate(**options)
        with Calls(model) as recorded:
            assert torch.equal(model.generate(**options, custom_generate=beam_search), expected)
        rows = [shape[0] for shape in recorded.shapes[1:]]
        assert rows == sorted(rows, reverse=True)
        shrank += len(set(rows)) > 1
    assert shrank


@pytest.mark.parametrize("penalty", [1.0, -1.0])
def test_rows_leave_by_the_rule_of_transformers_too(penalty: float) -> None:
    """Also with several returned sequences and where length pays: what is settled there is settled here."""
    model = language_model("opt", 0, 0.6)
    options = {**prompts("opt", 4, 4), **SEARCH, "length_penalty": penalty, "early_stopping": True}
    options["num_return_sequences"] = 2
    with Calls(model) as plain:
        expected = model.generate(**options)
    with Calls(model) as recorded:
        assert torch.equal(model.generate(**options, custom_generate=beam_search), expected)
    assert len(recorded.shapes) == len(plain.shapes)
    assert len({shape[0] for shape in recorded.shapes[1:]}) > 1


class StopAfter(StoppingCriteria):
    """Stops rows at a length of their own, by their place in the batch."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= 6 + torch.arange(len(input_ids)) * 4 // len(input_ids)


def test_no_row_leaves_where_a_rule_of_the_caller_looks_at_rows() -> None:
    model = language_model("opt", 0, 0.6)
    options = {**prompts("opt", 4, 4), **SHORT, "stopping_criteria": StoppingCriteriaList([StopAfter()])}
    expected, found = both(model, **options)
    assert torch.equal(found, expected)
    assert len({shape[0] for shape in calls(model, **options, custom_generate=beam_search)[1:]}) == 1


# -- what is computed -------------------------------------------------------------------------------------------------


def test_prompts_are_read_once_per_row_and_beams_are_one_sequence() -> None:
    model = language_model("opt", 0, 0.1)
    options = {**prompts("opt", 3, 4), "num_beams": 4, "max_new_tokens": 3, "min_new_tokens": 3}
    assert calls(model, **options, custom_generate=beam_search) == [(3, 4), (3, 4), (3, 4)]
    assert calls(model, **options) == [(12, 4), (12, 1), (12, 1)]
    model = language_model("t5", 0, 0.1)
    options |= prompts("t5", 3, 4)
    assert calls(model, **options, custom_generate=beam_search) == [(3, 1), (12, 1), (12, 1)]
