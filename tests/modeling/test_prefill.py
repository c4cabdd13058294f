"""Computing the prompt once per row gives the tokens of the plain path, and costs what it should."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig

from blip2_hf.modeling import generation, prefill
from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from generation_pairs import DECODING, FAMILIES, LAYOUTS, build, language_config, model, ragged
from parity import counted
from tiny_models import IMAGE_TOKEN, QUERIES, VOCAB, pixels

REPEATED = [name for name in DECODING if name not in ("greedy", "sampling")]


def run(ours: Blip2ForConditionalGeneration, options: dict, text: dict | None = None):
    torch.manual_seed(3)
    return ours.generate(
        pixels(), **(text or {}), **options, max_new_tokens=6, return_dict_in_generate=True, output_scores=True
    )


def plain_path(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(generation, "can_search", lambda *_: False)
    patch.setattr(generation, "can_prefill_once", lambda *_: False)


def run_plain(monkeypatch: pytest.MonkeyPatch, *args):
    with monkeypatch.context() as patch:
        plain_path(patch)
        return run(*args)


def check_same(found, expected) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("sequences_scores", "beam_indices"):
        if name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)
    for step, plain in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(step, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decoding", REPEATED)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_path(family: str, decoding: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, options, text = model(family), DECODING[decoding], ragged(layout).text
    found = run(ours, options, text)
    check_same(found, run_plain(monkeypatch, ours, options, text))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_prefill_would_be_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, text, options = model(family), ragged("left").text, DECODING["sampling, several"]
    expected = run(ours, options, text)
    name = "prefill_seq2seq" if ours.config.is_encoder_decoder else "prefill_causal"
    right = getattr(generation, name)
    monkeypatch.setattr(
        generation,
        name,
        lambda language_model, prompt, config: right(language_model, replace(prompt, embeds=-prompt.embeds), config),
    )
    with pytest.raises(AssertionError):
        check_same(run(ours, options, text), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_path_without_a_prompt(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = model(family)
    for decoding in REPEATED:
        check_same(run(ours, DECODING[decoding]), run_plain(monkeypatch, ours, DECODING[decoding]))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "t5gemma", "bart", "bloom"])
def test_equals_the_plain_path_of_other_language_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliding windows (shorter than the prompt, also in the decoder over an encoder), and other caches."""
    ours, text = model(family), ragged("left").text
    for decoding in ("beams, short", "sampling, several"):
        options = DECODING[decoding]
        check_same(run(ours, options, text), run_plain(monkeypatch, ours, options, text))


def test_a_state_that_cannot_be_repeated_is_left_alone() -> None:
    ours = model("mamba")
    assert not prefill.can_prefill_once(ours.language_model, GenerationConfig(num_beams=3), {})
    assert run(ours, {"num_beams": 3}, ragged("left").text).sequences.shape[0] == 2


def test_a_convolution_beside_attention_is_left_alone() -> None:
    widths = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    for kinds, expected in ((["full_attention", "conv"], False), (["full_attention", "full_attention"], True)):
        config = transformers.Lfm2Config(**widths, num_hidden_layers=2, num_key_value_heads=2, layer_types=kinds)
        with torch.device("meta"):
            language_model = transformers.AutoModelForCausalLM.from_config(config)
        assert prefill.can_share(language_model) is expected


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, True),
        ({"rope_type": "linear", "factor": 2.0}, True),
        ({"rope_type": "dynamic", "factor": 2.0}, False),
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, False),
    ],
)
def test_frequencies_that_follow_the_longest_row_are_left_alone(rope: dict, expected: bool) -> None:
    config = language_config("llama")
    config.rope_parameters = {"rope_theta": 10000.0, "original_max_position_embeddings": 8, **rope}
    with torch.device("meta"):
        language_model = transformers.AutoModelForCausalLM.from_config(config)
    assert prefill.can_share(language_model) is expected


def test_what_prepares_a_models_inputs_in_its_own_way_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, text = build("opt"), ragged("left").text
    kind = type(ours.language_model)
    usual = kind.prepare_inputs_for_generation

    def louder(self, input_ids, inputs_embeds=None, **kwargs) -> dict:
        return usual(self, input_ids, inputs_embeds=None if inputs_embeds is None else 2 * inputs_embeds, **kwargs)

    before = run(ours, {"num_beams": 3}, text).sequences
    monkeypatch.setattr(kind, "prepare_inputs_for_generation", louder)
    for options in ({"num_beams": 3}, DECODING["sampling, several"]):
        check_same(run(ours, options, text), run_plain(monkeypatch, ours, options, text))
    assert not torch.equal(run(ours, {"num_beams": 3}, text).sequences, before)


def test_a_beam_without_numbers_does_not_reach_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, text = build("llama"), ragged("left").text
    options = {"num_beams": 5, "num_return_sequences": 5, "remove_invalid_values": True}
    word = run(ours, {"num_beams": 3}, text).sequences[0, -2]
    with torch.no_grad():
        ours.get_input_embeddings().weight[word] = float("nan")
    expected = run_plain(monkeypatch, ours, options, text).sequences
    assert torch.equal(run(ours, options, text).sequences, expected)


def test_prompt_of_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = build("opt", num_query_tokens=1)
    text = {"input_ids": torch.full((2, 1), IMAGE_TOKEN)}
    check_same(run(ours, {"num_beams": 3}, text), run_plain(monkeypatch, ours, {"num_beams": 3}, text))


# -- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_beams": 5}, True),
        ({"num_return_sequences": 2, "do_sample": True}, True),
        ({"num_beams": 5, "use_cache": True}, True),
        ({}, False),
        ({"num_beams": 1}, False),
        ({"num_beams": 5, "use_cache": False}, False),
        ({"num_beams": 5, "cache_implementation": "static"}, False),
        ({"num_beams": 5, "prefill_chunk_size": 4}, False),
        ({"num_beams": 5, "output_attentions": True}, False),
        ({"num_beams": 5, "output_hidden_states": True}, False),
        ({"num_beams": 5, "encoder_repetition_penalty": 1.5}, False),
        ({"num_beams": 5, "encoder_no_repeat_ngram_size": 2}, False),
    ],
)
def test_when_it_is_done(options: dict, expected: bool) -> None:
    assert prefill.can_prefill_once(model("opt").language_model, GenerationConfig(**options), {}) is expected


@pytest.mark.parametrize("name", ["past_key_values", "decoder_input_ids", "encoder_outputs", "assistant_model"])
def test_not_with_a_prefill_of_the_callers_own(name: str) -> None:
    config = GenerationConfig(num_beams=5)
    assert prefill.can_prefill_once(model("opt").language_model, config, {name: None})
    assert not prefill.can_prefill_once(model("opt").language_model, config, {name: object()})


@pytest.mark.filterwarnings("ignore:Passing .encoder_repetition_penalty")
@pytest.mark.parametrize("family", FAMILIES)
def test_options_that_take_the_plain_path_still_work(family: str) -> None:
    ours, text = model(family), ragged("left").text
    expected = run(ours, {"num_beams": 3}, text).sequences
    plain = {"num_beams": 3, "output_attentions": True, "output_hidden_states": True}
    assert torch.equal(run(ours, plain, text).sequences, expected)
    assert torch.equal(run(ours, {"num_beams": 3, "cache_implementation": "dynamic"}, text).sequences, expected)
    penalty = run(ours, {"num_beams": 3, "encoder_repetition_penalty": 1.5}, text).sequences
    assert penalty.shape[0] == 2  # `generate` ignores it, with a warning, where there are only embeddings


SEARCHED = {"num_beams": 5}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"return_dict_in_generate": True, "output_scores": True, "output_logits": True}, True),
        ({"num_return_sequences": 3, "length_penalty": 2.0, "early_stopping": "never"}, True),
        ({"do_sample": True}, False),
        ({"num_beams": 1, "num_return_sequences": 3, "do_sample": True}, False),
        ({"use_cache": False}, False),
        ({"output_attentions": True}, False),
        ({"stop_strings": ["a"]}, False),
        ({"token_healing": True}, False),
        ({"low_memory": True}, False),
        ({"remove_invalid_values": True}, False),
    ],
)
def test_when_the_search_is_ours(options: dict, expected: bool) -> None:
    config = GenerationConfig(**{**SEARCHED, **options})
    assert prefill.can_search(model("opt").language_model, config, {}) is expected


def test_the_search_is_not_ours_with_other_arguments() -> None:
    language_model, config = model("opt").language_model, GenerationConfig(**SEARCHED)
    for name in ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"):
        assert prefill.can_search(language_model, config, {name: object()})
    for name in ("streamer", "tokenizer", "synced_gpus", "custom_generate", "negative_prompt_ids", "position_ids"):
        assert prefill.can_search(language_model, config, {name: None})
        assert not prefill.can_search(language_model, config, {name: object()})


def test_the_search_is_not_ours_where_processes_share_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """They must all take the same number of steps."""
    language_model, config = model("opt").language_model, GenerationConfig(**SEARCHED)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert prefill.can_search(language_model, config, {})
    monkeypatch.setattr(prefill, "is_deepspeed_zero3_enabled", lambda: True)
    assert not prefill.can_search(language_model, config, {})


# -- what it costs ----------------------------------------------------------------------------------------------------

BEAMS, NEW = 5, 4


def flops(ours: Blip2ForConditionalGeneration, text_length: int, plain: bool, monkeypatch) -> int:
    """Of the language model while `NEW` tokens are generated for two prompts of this many text tokens."""
    row = [IMAGE_TOKEN] * QUERIES + [10 + i % 200 for i in range(text_length)]
    text = {"input_ids": torch.tensor([row, row[:-1] + [250]])}
    options = {"num_beams": BEAMS, "max_new_tokens": NEW, "min_new_tokens": NEW}
    encoded = ours.encode_image(pixels())
    with monkeypatch.context() as patch, FlopCounterMode(display=False) as counter:
        if plain:
            plain_path(patch)
        ours.generate(image_embeds=encoded, **text, **options)
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def eager() -> dict[str, Blip2ForConditionalGeneration]:
    """Eager attention is made of matrix products, all of which are counted."""
    models = {family: build(family) for family in ("opt", "t5")}
    for ours in models.values():
        ours.set_attn_implementation("eager")
    return models


def test_prompt_tokens_of_a_decoder_are_computed_once(eager, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, length, rows = eager["opt"], 60, 2
    width, hidden, layers = 32, 64, 2
    per_token = layers * 2 * (4 * width**2 + 2 * width * hidden)  # a multiplication and an addition per weight
    head = 2 * width * VOCAB
    prompt = QUERIES + length
    read = rows * prompt * per_token + rows * head  # the first token comes of it
    decode = rows * BEAMS * (NEW - 1) * (per_token + head)
    projection = rows * QUERIES * 2 * 24 * width
    # scores and weighted values: each of the prompt's positions with all, each new one with all of its row
    new = BEAMS * (NEW - 1)
    attention = layers * 4 * width * rows * (prompt**2 + new * (prompt + new))
    bound = read + decode + projection + attention
    once = flops(ours, length, False, monkeypatch)
    assert 0.9 * bound < once <= bound
    assert flops(ours, length, True, monkeypatch) > once + 0.9 * (BEAMS - 1) * read


def test_keys_and_values_of_an_encoder_are_computed_once(eager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per token more in the prompt: the encoder, and the decoder's keys and values of it, once per row."""
    ours, rows, more = eager["t5"], 2, 40
    width, hidden, layers = 32, 64, 2
    encoder = layers * 2 * (4 * width**2 + 3 * width * hidden)
    cross = layers * 2 * 2 * width**2
    long, short = QUERIES + 60, QUERIES + 20
    attention = layers * 4 * width * rows * (long**2 - short**2 + (1 + BEAMS * (NEW - 1)) * more)
    bound = rows * more * (encoder + cross) + attention

    def slope(plain: bool) -> int:
        return flops(ours, 60, plain, monkeypatch) - flops(ours, 20, plain, monkeypatch)

    assert 0.9 * bound < slope(False) <= bound
    assert slope(True) > slope(False) + 0.9 * (BEAMS - 1) * rows * more * cross


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_beams": 5, "min_new_tokens": 6}, [(2, 11)] + 5 * [(2, 5)]),  # the beams of a row as one sequence
        ({"num_return_sequences": 3, "do_sample": True, "min_new_tokens": 6}, [(2, 10)] + 6 * [(6, 1)]),
    ],
)
def test_language_model_reads_the_prompt_in_rows(options: dict, expected: list) -> None:
    ours, sizes = model("opt"), []
    hook = ours.language_model.model.decoder.layers[0].register_forward_pre_hook(
        lambda module, args: sizes.append(tuple(args[0].shape[:2]))
    )
    try:
        run(ours, options, ragged("left").text)
    finally:
        hook.remove()
    assert sizes == expected


def test_tower_and_qformer_run_once_for_all_beams() -> None:
    ours = model("opt")
    with counted(ours.vision_model, ours.qformer) as calls:
        run(ours, {"num_beams": 5}, ragged("left").text)
    assert len(calls) == 2
