"""What `generate` takes from GenerationMixin: each option does what it does in `transformers`."""

import copy

import pytest
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from generation_pairs import DECODING, FAMILIES, build, model, pair, ragged
from parity import enable_checkpointing, without_dropout
from tiny_models import IMAGE_TOKEN, QUERIES, VOCAB, pixels, prompt_ids, randomised, text_config
from tiny_tokenizers import tiny_opt_tokenizer

BEAMS = {"num_beams": 3}


def inputs(rows: int = 2) -> dict[str, torch.Tensor]:
    ids = prompt_ids()[:rows]
    return {"pixel_values": pixels()[:rows], "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def new(tokens: torch.Tensor, ours) -> torch.Tensor:
    return tokens[:, 1:] if ours.config.is_encoder_decoder else tokens[:, prompt_ids().shape[1] :]


# -- lengths ----------------------------------------------------------------------------------------------------------

LENGTHS = {
    "default": {},
    "max_length": {"max_length": 14},
    "min_length": {"max_length": 20, "min_length": 18},
    "new tokens": {"max_new_tokens": 6, "min_new_tokens": 6},
    "both": {"max_new_tokens": 3, "max_length": 30},
}


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_mean_what_they_mean_in_transformers(family: str, lengths: str) -> None:
    peer, ours = pair(family)
    for options in ({}, BEAMS):
        expected = peer.generate(**inputs(), **options, **LENGTHS[lengths])
        assert torch.equal(ours.generate(**inputs(), **options, **LENGTHS[lengths]), expected)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_length_without_a_prompt_to_return() -> None:
    """The prompt counts towards `max_length` also where only its embeddings are given."""
    ours, ids = model("opt"), prompt_ids()
    embeds = {"pixel_values": pixels(), "inputs_embeds": ours.get_input_embeddings()(ids)}
    for options in ({"max_length": 14}, {"max_length": 14, **BEAMS}, {"max_length": 16, "min_length": 15}):
        expected = ours.generate(**inputs(), **options)
        assert torch.equal(ours.generate(**embeds, **options), expected[:, ids.shape[1] :])


# -- steering ---------------------------------------------------------------------------------------------------------


class Force(LogitsProcessor):
    """Allows one token at a given length, everything else otherwise."""

    def __init__(self, length: int, token: int):
        self.length, self.token = length, token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] != self.length:
            return scores
        forced = torch.full_like(scores, -float("inf"))
        forced[:, self.token] = 0.0
        return forced


STEERING = {
    "allowed": lambda start: {"prefix_allowed_tokens_fn": lambda row, ids: [50 + row, 60, 70]},
    "bad words": lambda start: {"bad_words_ids": [[token] for token in range(20, 290, 2)]},
    "forced word": lambda start: {"logits_processor": LogitsProcessorList([Force(start + 2, 77)])},
    "repetition": lambda start: {"repetition_penalty": 1.5},
    "n-grams": lambda start: {"no_repeat_ngram_size": 2},
    "bias": lambda start: {"sequence_bias": {(88,): 8.0}},
    "suppress": lambda start: {"suppress_tokens": [140, *range(21, 290, 2)], "begin_suppress_tokens": [220]},
    "forced end": lambda start: {"forced_eos_token_id": 3},
    "guidance": lambda start: {"guidance_scale": 1.5},
}


# `transformers` has no guidance for encoder-decoders on embeddings
STEERED = [(family, name) for family in FAMILIES for name in STEERING if (family, name) != ("t5", "guidance")]


@pytest.mark.parametrize(("family", "steering"), STEERED)
def test_steering_is_that_of_transformers(family: str, steering: str) -> None:
    peer, ours = pair(family)
    steered = STEERING[steering](1 if family == "t5" else prompt_ids().shape[1])
    for options in (DECODING["greedy"], DECODING["beams, short"]):
        expected = peer.generate(**inputs(), **options, **steered, max_new_tokens=8)
        found = ours.generate(**inputs(), **options, **steered, max_new_tokens=8)
        assert torch.equal(found, expected)
        assert not torch.equal(found, ours.generate(**inputs(), **options, max_new_tokens=8)), "it does something"


@pytest.mark.parametrize("family", FAMILIES)
def test_constraints_hold(family: str) -> None:
    ours = model(family)
    start = 1 if family == "t5" else prompt_ids().shape[1]
    allowed = ours.generate(**inputs(), **BEAMS, **STEERING["allowed"](start), max_new_tokens=6)
    for row, tokens in enumerate(new(allowed, ours).tolist()):
        assert set(tokens) <= {50 + row, 60, 70}
    forced = ours.generate(**inputs(), **BEAMS, **STEERING["forced word"](start), max_new_tokens=6)
    assert new(forced, ours)[:, 2].tolist() == [77, 77]
    clean = ours.generate(**inputs(), **BEAMS, bad_words_ids=[[140], [220]], max_new_tokens=6)
    assert not {140, 220} & set(new(clean, ours).flatten().tolist())


# -- stopping and streaming -------------------------------------------------------------------------------------------


class StopAt(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, device=input_ids.device)


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("family", FAMILIES)
def test_stopping_criteria(family: str) -> None:
    ours = model(family)
    start = 1 if family == "t5" else prompt_ids().shape[1]
    criteria = StoppingCriteriaList([StopAt(start + 3)])
    stopped = ours.generate(**inputs(), stopping_criteria=criteria, max_new_tokens=8)
    assert torch.equal(stopped, ours.generate(**inputs(), max_new_tokens=3))


def test_stop_strings() -> None:
    tokenizer = tiny_opt_tokenizer()
    ours = model("opt")
    free = new(ours.generate(**inputs(1), max_new_tokens=8), ours)[0].tolist()
    text = tokenizer.convert_ids_to_tokens(free[2])
    stopped = ours.generate(**inputs(1), max_new_tokens=8, stop_strings=[text], tokenizer=tokenizer)
    first = next(i for i in range(8) if text in "".join(tokenizer.convert_ids_to_tokens(free[: i + 1])))
    assert new(stopped, ours)[0].tolist() == free[: first + 1]
    with pytest.raises(ValueError, match="tokenizer"):
        ours.generate(**inputs(1), max_new_tokens=8, stop_strings=[text])


@pytest.mark.parametrize("family", FAMILIES)
def test_streamer(family: str) -> None:
    ours, streamer = model(family), Recorder()
    tokens = ours.generate(**inputs(1), streamer=streamer, max_new_tokens=5)
    first = [0] if family == "t5" else prompt_ids()[0].tolist()
    assert streamer.tokens == [first, *([token] for token in new(tokens, ours)[0].tolist())]
    assert streamer.ended


# -- the result as a dictionary ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", ["greedy", "beams, short", "beams, several"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dictionary_with_scores(family: str, decoding: str) -> None:
    peer, ours = pair(family)
    options = {**DECODING[decoding], "max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
    expected, found = peer.generate(**inputs(), **options), ours.generate(**inputs(), **options)
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    beam_indices = found.get("beam_indices")
    ours_scores, theirs = (
        lm.compute_transition_scores(result.sequences, result.scores, result.get("beam_indices"))
        for lm, result in ((ours, found), (peer.language_model, expected))
    )
    torch.testing.assert_close(ours_scores, theirs, atol=1e-4, rtol=1e-4)
    if beam_indices is not None:
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_dictionary_with_attentions_and_hidden_states(family: str) -> None:
    ours = build(family)
    ours.set_attn_implementation("eager")
    found = ours.generate(
        **inputs(),
        **BEAMS,
        max_new_tokens=3,
        return_dict_in_generate=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    prefix = "decoder_" if family == "t5" else ""
    assert len(found[f"{prefix}attentions"]) == len(found[f"{prefix}hidden_states"]) == 3
    assert found[f"{prefix}attentions"][0][0].shape[0] == 6


# -- assisted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["whole", "between"])
@pytest.mark.parametrize("assistant", ["other", "wider", "itself"])
def test_assistant(assistant: str, layout: str) -> None:
    """Greedy tokens, also where the assistant guesses right from the first step (`transformers`' BLIP-2 does not)."""
    ours = model("opt")
    helper = ours.language_model
    if assistant != "itself":
        config = text_config("opt")
        if assistant == "wider":
            config.hidden_size = config.word_embed_proj_dim = 48
        helper = randomised(transformers.OPTForCausalLM(config), seed=5)
    batch = ragged("between")
    text = (
        inputs(1) if layout == "whole" else {"pixel_values": pixels()[1:], **{k: v[1:] for k, v in batch.text.items()}}
    )
    expected = ours.generate(**text, max_new_tokens=12)
    assert torch.equal(ours.generate(**text, max_new_tokens=12, assistant_model=helper), expected)
    assert not ours.get_input_embeddings()._forward_hooks


def test_assistant_of_an_encoder_decoder() -> None:
    ours = model("t5")
    expected = ours.generate(**inputs(1), max_new_tokens=12)
    helper = copy.deepcopy(ours.language_model)
    assert torch.equal(ours.generate(**inputs(1), max_new_tokens=12, assistant_model=helper), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_with_checkpointing_keeps_the_cache(family: str) -> None:
    """`transformers` drops the cache there and goes on from the last token alone."""
    expected = model(family).generate(**inputs(), max_new_tokens=8)
    ours = without_dropout(copy.deepcopy(model(family)))
    enable_checkpointing(ours)
    assert torch.equal(ours.generate(**inputs(), max_new_tokens=8), expected)
    assert any(getattr(module, "gradient_checkpointing", False) for module in ours.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup(family: str) -> None:
    """The prompt repeats itself, so that there are candidates from the first step on."""
    ours = model(family)
    repeating = [20, 30, 40, 20, 30, 40, 20]
    text = {"pixel_values": pixels(1), "input_ids": torch.tensor([[IMAGE_TOKEN] * QUERIES + [2, *repeating]])}
    expected = ours.generate(**text, max_new_tokens=12)
    found = ours.generate(**text, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


def test_assisted_generation_needs_ids() -> None:
    ours = model("opt")
    embeds = ours.get_input_embeddings()(prompt_ids()[:1])
    with pytest.raises(ValueError, match="`input_ids` must be given for assisted generation"):
        ours.generate(pixels(1), inputs_embeds=embeds, prompt_lookup_num_tokens=3)


# -- where the options come from --------------------------------------------------------------------------------------


def test_config_object() -> None:
    ours = model("opt")
    expected = ours.generate(**inputs(), **BEAMS, max_new_tokens=5)
    given = GenerationConfig(num_beams=3, max_new_tokens=5)
    before = given.to_dict()
    assert torch.equal(ours.generate(**inputs(), generation_config=given), expected)
    longer = ours.generate(**inputs(), generation_config=given, max_new_tokens=7)
    assert torch.equal(longer, ours.generate(**inputs(), **BEAMS, max_new_tokens=7)), "arguments come first"
    assert given.to_dict() == before


def test_defaults_of_the_model() -> None:
    ours = build("opt")
    expected = ours.generate(**inputs(), **BEAMS, max_new_tokens=5)
    greedy = ours.generate(**inputs(), max_new_tokens=5)
    ours.generation_config.num_beams = 3
    assert torch.equal(ours.generate(**inputs(), max_new_tokens=5), expected)
    assert torch.equal(ours.generate(**inputs(), max_new_tokens=5, num_beams=1), greedy)
    ours.generation_config.num_beams = None
    ours.language_model.generation_config.num_beams = 3
    assert torch.equal(ours.generate(**inputs(), max_new_tokens=5), expected), "then those of the language model"
    first = int(greedy[0, prompt_ids().shape[1]])
    ours.generation_config.eos_token_id = first
    assert ours.generate(**inputs(1), max_new_tokens=5, num_beams=1).shape[1] == prompt_ids().shape[1] + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_options(family: str) -> None:
    with pytest.raises(ValueError, match="num_beam"):
        model(family).generate(**inputs(), num_beam=3)
    with pytest.raises(TypeError, match="num_beam"):
        model(family)(**inputs(), num_beam=3)


def test_placeholder_outside_of_the_vocabulary() -> None:
    """As with a language model whose embeddings were not grown for it."""
    ours, other = model("opt"), build("opt", image_token_index=VOCAB + 700)
    ids = prompt_ids()
    moved = ids.masked_fill(ids == IMAGE_TOKEN, VOCAB + 700)
    for options in (DECODING["greedy"], DECODING["beams, short"], {"prompt_lookup_num_tokens": 3}):
        rows = 1 if "prompt_lookup_num_tokens" in options else 2
        expected = ours.generate(pixels()[:rows], ids[:rows], **options, max_new_tokens=6)
        found = other.generate(pixels()[:rows], moved[:rows], **options, max_new_tokens=6)
        assert torch.equal(found[:, : ids.shape[1]], moved[:rows])
        assert torch.equal(found[:, ids.shape[1] :], expected[:, ids.shape[1] :])
