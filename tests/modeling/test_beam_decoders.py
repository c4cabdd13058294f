"""Decoders of beams against the language model on each beam's whole text, and what they keep."""

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from blip2_hf.modeling import beam_decoders
from blip2_hf.modeling.beam_attention import NAME, can_share_rows, shared_rows
from blip2_hf.modeling.beam_decoders import BeamDecoder, read_prompts
from blip2_hf.modeling.beam_search import beam_search
from tiny_searches import CONFIGS, OTHERS, SEQ2SEQ, language_model, prompts

ROWS, BEAMS = 3, 4
KINDS = dict.fromkeys(("bloom", "mistral", "gpt_neo", "doge"), beam_decoders._CausalBeams)


def begin(family: str, model: nn.Module, new_tokens: int = 30) -> tuple[BeamDecoder, dict[str, torch.Tensor]]:
    inputs = prompts(family, ROWS, 5)
    ids, mask = (states.repeat_interleave(BEAMS, dim=0) for states in inputs.values())
    given: dict[str, object] = {"attention_mask": mask}
    if family in SEQ2SEQ:
        given["encoder_outputs"] = model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
        ids = torch.full((ROWS * BEAMS, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        return read_prompts(model, ids, BEAMS, new_tokens, given), inputs


@torch.no_grad()
def whole(family: str, model: nn.Module, inputs: dict[str, torch.Tensor], answers: torch.Tensor) -> torch.Tensor:
    """Logits [R, n, V] behind the prompts and these answers [R, n, G]."""
    rows, beams, length = answers.shape
    ids, mask = (states.repeat_interleave(beams, dim=0) for states in inputs.values())
    answers = answers.flatten(0, 1)
    if family in SEQ2SEQ:
        start = torch.full((rows * beams, 1), model.config.decoder_start_token_id)
        logits = model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=torch.cat([start, answers], dim=1), use_cache=False
        ).logits
        return logits[:, -1].unflatten(0, (rows, beams))
    mask = torch.cat([mask, torch.ones_like(answers)], dim=1)
    positions = {} if family == "bloom" else {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    logits = model(input_ids=torch.cat([ids, answers], dim=1), attention_mask=mask, use_cache=False, **positions).logits
    return logits[:, -1].unflatten(0, (rows, beams))


def walk(family: str, model: nn.Module, steps: int, leave: dict[int, list[int]], seed: int = 0) -> BeamDecoder:
    """Random tokens of random beams; after some steps rows leave. Every step is compared."""
    decoder, inputs = begin(family, model)
    generator = torch.Generator().manual_seed(seed)
    answers = torch.empty(ROWS, BEAMS, 0, dtype=torch.long)
    expected = whole(family, model, inputs, answers)
    torch.testing.assert_close(decoder.logits[:, None].expand_as(expected), expected, atol=1e-4, rtol=1e-4)
    for step in range(steps):
        parents = torch.randint(0, BEAMS, answers.shape[:2], generator=generator)
        tokens = torch.randint(4, 12, answers.shape[:2], generator=generator)
        answers = answers.gather(1, parents[..., None].expand_as(answers))
        answers = torch.cat([answers, tokens[..., None]], dim=2)
        with torch.no_grad(), shared_rows(model) if decoder.shares_rows else torch.no_grad():
            found = decoder.step(tokens, parents)
        expected = whole(family, model, inputs, answers)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        if step in leave:
            kept = leave[step]
            decoder.keep(kept)
            answers, inputs = answers[kept], {name: states[kept] for name, states in inputs.items()}
    return decoder


@pytest.mark.parametrize("family", [*CONFIGS, *OTHERS])
def test_each_beam_goes_on_from_its_own_text(family: str) -> None:
    decoder = walk(family, language_model(family, 2, 0.4), 6, {2: [2, 1], 4: [1]})
    expected = beam_decoders._Seq2SeqBeams if family in SEQ2SEQ else beam_decoders._TreeBeams
    assert type(decoder) is KINDS.get(family, expected)
    assert decoder.shares_rows is (family in SEQ2SEQ and family not in OTHERS)


@pytest.mark.parametrize("family", ["opt", "llama", "t5"])
def test_with_eager_attention(family: str) -> None:
    model = language_model(family, 2, 0.4)
    model.set_attn_implementation("eager")
    for module in model.modules():  # transformers 5.17 leaves out T5's parts
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("eager")
    assert not walk(family, model, 4, {1: [0, 2]}).shares_rows


def test_a_window_that_is_longer_than_everything_is_none() -> None:
    model = language_model("mistral", 2, 0.4)
    model.config.sliding_window = 35  # 5 positions and 30 tokens
    assert type(walk("mistral", model, 4, {})) is beam_decoders._TreeBeams
    model.config.sliding_window = 34
    assert type(begin("mistral", model)[0]) is beam_decoders._CausalBeams


def test_positions_that_no_beam_sees_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beam_decoders, "_ROOM", 3)
    decoder = walk("opt", language_model("opt", 2, 0.4), 24, {10: [1, 2]})
    held = decoder.cache.get_seq_length() - 5
    assert decoder.seen.shape[2] == decoder.cache.get_seq_length()
    assert held < 24 * BEAMS, "not everything that was generated"
    assert held >= 24, "but what a beam goes on from"


# -- what is not copied -----------------------------------------------------------------------------------------------


def test_keys_of_the_prompt_are_there_once_per_row_and_stay_where_they_are() -> None:
    for family in ("opt", "llama", "t5", "bart"):
        model = language_model(family, 2, 0.4)
        decoder, _ = begin(family, model)
        cache = decoder.cache.cross_attention_cache if family in SEQ2SEQ else decoder.cache
        places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        before = [layer.keys[:, :, :5].clone() for layer in cache.layers]
        for _ in range(3):
            parents = torch.tensor([[3, 3, 0, 1]] * ROWS)
            with torch.no_grad(), shared_rows(model) if decoder.shares_rows else torch.no_grad():
                decoder.step(torch.full((ROWS, BEAMS), 7), parents)
        assert all(layer.keys.shape[0] == ROWS for layer in cache.layers)
        assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == places
        assert all(
            torch.equal(layer.keys[:, :, :5], states) for layer, states in zip(cache.layers, before, strict=True)
        )


@pytest.mark.parametrize("family", ["opt", "llama", "t5"])
def test_attention_is_over_rows_not_over_beams(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel sees [rows, heads, beams, d] and keys [rows, …]: for self-attention of a decoder-only model, for
    cross-attention of an encoder-decoder."""
    shapes = []
    kernel = nn.functional.scaled_dot_product_attention

    def spy(query, key, *args, **kwargs):
        shapes.append((query.shape[0], query.shape[2], key.shape[0]))
        return kernel(query, key, *args, **kwargs)

    model = language_model(family, 0, 0.1)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    model.generate(
        **prompts(family, ROWS, 5), num_beams=BEAMS, max_new_tokens=4, min_new_tokens=4, custom_generate=beam_search
    )
    assert shapes.count((ROWS, BEAMS, ROWS)) == 3


# -- the attention implementation -------------------------------------------------------------------------------------


def test_the_models_own_attention_is_put_back() -> None:
    model = language_model("t5")
    chosen = [module.config._attn_implementation for module in (model, model.encoder, model.decoder)]
    with pytest.raises(RuntimeError, match="stop"), shared_rows(model):
        assert model.decoder.config._attn_implementation == NAME
        raise RuntimeError("stop")
    assert [module.config._attn_implementation for module in (model, model.encoder, model.decoder)] == chosen


def test_only_where_attention_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.t5 import modeling_t5

    model = language_model("t5")
    assert can_share_rows(model)
    monkeypatch.setattr(modeling_t5, "ALL_ATTENTION_FUNCTIONS", type(ALL_ATTENTION_FUNCTIONS)())
    assert not can_share_rows(model), "a model with a kernel of its own under the same name"


def test_more_in_an_encoders_output_than_its_states() -> None:
    """Mixtures of experts hand on their routers' logits, too."""
    from transformers.modeling_outputs import MoEModelOutput

    encoded = MoEModelOutput(last_hidden_state=torch.zeros(4, 2, 3), router_probs=(torch.ones(1),))
    other = beam_decoders._with_states(encoded, torch.zeros(2, 2, 3))
    assert isinstance(other, ModelOutput) and len(other.last_hidden_state) == 2 and other.router_probs
    assert len(encoded.last_hidden_state) == 4
