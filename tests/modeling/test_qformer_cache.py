"""Cached keys and values of the Q-Former: the same results with less work."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, EncoderDecoderCache

from blip2_hf.configuration import Blip2QFormerConfig
from blip2_hf.modeling.encoded import EncodedImages
from blip2_hf.modeling.masks import generation_mask, matching_mask
from blip2_hf.modeling.qformer import Blip2QFormerModel
from parity import EXACT, assert_same_gradients, counted, enable_checkpointing, gradients, without_dropout
from tiny_models import QFORMER, randomised

IMAGES, QUERIES, TEXT, TOKENS = 3, 4, 5, 6
WIDTH, IMAGE_WIDTH = QFORMER["hidden_size"], 32
PADDED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


FEATURES = noise(IMAGES, TOKENS, IMAGE_WIDTH)
QUERY_STATES = noise(1, QUERIES, WIDTH, seed=4).expand(IMAGES, -1, -1)
TEXT_STATES = noise(IMAGES, TEXT, WIDTH, seed=5)


def new_model() -> Blip2QFormerModel:
    shape = {**QFORMER, "encoder_hidden_size": IMAGE_WIDTH, "use_qformer_text_input": True}
    return randomised(Blip2QFormerModel(Blip2QFormerConfig(**shape)))


@pytest.fixture(scope="module")
def model() -> Blip2QFormerModel:
    return new_model()


def encode(model: Blip2QFormerModel) -> EncodedImages:
    outputs = model(QUERY_STATES, encoder_hidden_states=FEATURES, use_cache=True)
    return EncodedImages(FEATURES, outputs.last_hidden_state, outputs.past_key_values)


def one_pass(model: Blip2QFormerModel, mask: torch.Tensor = PADDED) -> torch.Tensor:
    """Queries and text together under the captioning mask: what decoding from a cache must reproduce."""
    return model(
        torch.cat([QUERY_STATES, TEXT_STATES], dim=1),
        query_length=QUERIES,
        attention_mask=generation_mask(QUERIES, mask),
        encoder_hidden_states=FEATURES,
    ).last_hidden_state


@torch.no_grad()
def test_cache_holds_queries_and_images(model: Blip2QFormerModel) -> None:
    cache = encode(model).cache
    assert [layer.keys.shape for layer in cache.self_attention_cache.layers] == 4 * [(IMAGES, 4, QUERIES, 6)]
    held = {i: layer.keys.shape for i, layer in enumerate(cache.cross_attention_cache.layers) if layer.is_initialized}
    assert held == {0: (IMAGES, 4, TOKENS, 6), 2: (IMAGES, 4, TOKENS, 6)}  # layers 0, 2, 4, … attend to the image
    assert model(QUERY_STATES, encoder_hidden_states=FEATURES).past_key_values is None


@torch.no_grad()
def test_text_on_cached_queries_equals_one_pass(model: Blip2QFormerModel) -> None:
    expected = one_pass(model)
    rows = generation_mask(QUERIES, PADDED)[:, :, QUERIES:]
    states = model(
        TEXT_STATES, query_length=0, attention_mask=rows, past_key_values=encode(model).cache
    ).last_hidden_state
    torch.testing.assert_close(states, expected[:, QUERIES:], **EXACT)
    unmasked = model(TEXT_STATES, query_length=0, past_key_values=encode(model).cache).last_hidden_state
    assert (unmasked - expected[:, QUERIES:]).abs().max() > 1e-2  # negative control


@torch.no_grad()
def test_token_by_token_equals_one_pass(model: Blip2QFormerModel) -> None:
    expected = one_pass(model, torch.ones_like(PADDED))
    cache, steps = encode(model).cache, []
    for step in range(TEXT):
        outputs = model(
            TEXT_STATES[:, step : step + 1],
            query_length=0,
            attention_mask=torch.ones(IMAGES, QUERIES + step + 1),
            past_key_values=cache,
            use_cache=True,
        )
        assert outputs.past_key_values is cache
        steps.append(outputs.last_hidden_state)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected[:, QUERIES:], **EXACT)
    assert cache.get_seq_length() == QUERIES + TEXT


@torch.no_grad()
def test_a_cache_is_only_read_without_use_cache(model: Blip2QFormerModel) -> None:
    cache = encode(model).cache
    before = [layer.keys for layer in cache.self_attention_cache.layers]
    model(TEXT_STATES, query_length=0, past_key_values=cache)
    assert all(layer.keys is keys for layer, keys in zip(cache.self_attention_cache.layers, before, strict=True))


@torch.no_grad()
def test_cached_images_are_not_projected_again(model: Blip2QFormerModel) -> None:
    """Same result, no projection of the image's keys and values, and that many fewer multiplications."""
    encoded = encode(model)
    both = torch.cat([QUERY_STATES, TEXT_STATES], dim=1)
    arguments = {"query_length": QUERIES, "attention_mask": matching_mask(QUERIES, PADDED)}
    cross = [layer.crossattention.attention for layer in model.encoder.layer[::2]]
    projections = [projection for attention in cross for projection in (attention.key, attention.value)]
    with counted(*projections) as calls, FlopCounterMode(display=False) as recomputed:
        expected = model(both, **arguments, encoder_hidden_states=FEATURES).last_hidden_state
    assert len(calls) == 4
    with counted(*projections) as calls, FlopCounterMode(display=False) as cached:
        outputs = model(both, **arguments, past_key_values=encoded.image_cache()).last_hidden_state
    assert not calls
    torch.testing.assert_close(outputs, expected, **EXACT)
    saved = recomputed.get_total_flops() - cached.get_total_flops()
    assert saved == 4 * 2 * IMAGES * TOKENS * IMAGE_WIDTH * WIDTH


@torch.no_grad()
def test_cached_images_replace_given_ones(model: Blip2QFormerModel) -> None:
    expected = model(QUERY_STATES, encoder_hidden_states=FEATURES).last_hidden_state
    outputs = model(
        QUERY_STATES, encoder_hidden_states=torch.zeros_like(FEATURES), past_key_values=encode(model).image_cache()
    )
    torch.testing.assert_close(outputs.last_hidden_state, expected, **EXACT)


@torch.no_grad()
def test_a_cache_in_use_keeps_its_images(model: Blip2QFormerModel) -> None:
    """More queries on the cache of the pass before: they see the earlier ones, and the image's keys once."""
    cache = encode(model).cache
    more = noise(IMAGES, 2, WIDTH, seed=7)
    outputs = model(more, encoder_hidden_states=FEATURES, past_key_values=cache, use_cache=True).last_hidden_state
    assert cache.get_seq_length() == QUERIES + 2
    assert {layer.keys.shape[2] for layer in cache.cross_attention_cache.layers if layer.is_initialized} == {TOKENS}
    allowed = torch.ones(1, QUERIES + 2, QUERIES + 2).tril()
    allowed[:, :QUERIES, :QUERIES] = 1
    allowed[:, QUERIES:] = 1
    together = model(
        torch.cat([QUERY_STATES, more], dim=1), attention_mask=allowed, encoder_hidden_states=FEATURES
    ).last_hidden_state
    torch.testing.assert_close(outputs, together[:, QUERIES:], **EXACT)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_rows_of_one_image_share_its_keys(kernel: str, cached: bool) -> None:
    """2 rows per image equal the images repeated; keys are projected once per image, not per row."""
    model = new_model()
    encoded = encode(model)
    model.set_attn_implementation(kernel)
    both = noise(2 * IMAGES, QUERIES + TEXT, WIDTH, seed=6)
    image_mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]])
    arguments = {
        "query_length": QUERIES,
        "attention_mask": matching_mask(QUERIES, PADDED.repeat_interleave(2, dim=0)),
        "output_attentions": True,
    }
    expected = model(
        both,
        **arguments,
        encoder_hidden_states=FEATURES.repeat_interleave(2, dim=0),
        encoder_attention_mask=image_mask.repeat_interleave(2, dim=0),
    )
    source = {"past_key_values": encoded.image_cache()} if cached else {"encoder_hidden_states": FEATURES}
    outputs = model(both, **arguments, **source, encoder_attention_mask=image_mask)
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, **EXACT)
    torch.testing.assert_close(outputs.attentions, expected.attentions, **EXACT)
    torch.testing.assert_close(outputs.cross_attentions, expected.cross_attentions, **EXACT)
    arguments["output_attentions"] = False
    torch.testing.assert_close(
        model(both, **arguments, **source, encoder_attention_mask=image_mask).last_hidden_state,
        expected.last_hidden_state,
        **EXACT,
    )
    swapped = model(both.roll(1, 0), **arguments, **source, encoder_attention_mask=image_mask).last_hidden_state
    assert (swapped.roll(-1, 0) - outputs.last_hidden_state).abs().max() > 1e-2  # the order of rows does matter


def test_gradients_of_shared_keys() -> None:
    model = without_dropout(new_model())
    both = noise(2 * IMAGES, QUERIES, WIDTH, seed=6)
    repeated = FEATURES.repeat_interleave(2, dim=0)
    assert_same_gradients(
        gradients(model, lambda: model(both, encoder_hidden_states=repeated).last_hidden_state.pow(2).sum()),
        gradients(model, lambda: model(both, encoder_hidden_states=FEATURES).last_hidden_state.pow(2).sum()),
    )


def test_gradients_through_the_cache() -> None:
    """Text decoded from cached queries trains the query pass as one pass does; with checkpointing too."""
    model = without_dropout(new_model())
    rows = generation_mask(QUERIES, PADDED)[:, :, QUERIES:]

    def decoded() -> torch.Tensor:
        cache = encode(model).cache
        outputs = model(TEXT_STATES, query_length=0, attention_mask=rows, past_key_values=cache)
        return outputs.last_hidden_state.pow(2).sum()

    expected = gradients(model, lambda: one_pass(model)[:, QUERIES:].pow(2).sum())
    assert "encoder.layer.2.crossattention.attention.key.weight" in expected
    ours = gradients(model, decoded)
    # one pass also runs, to no effect, the last layer's part for the queries
    assert_same_gradients({k: v for k, v in expected.items() if k in ours}, ours)
    assert all(not v.any() for k, v in expected.items() if k not in ours)
    enable_checkpointing(model)
    assert_same_gradients(ours, gradients(model, decoded))


def test_checkpointed_steps_with_a_growing_cache() -> None:
    """The second run of a block in the backward pass does not write to the cache again."""
    model = without_dropout(new_model())

    def two_steps() -> torch.Tensor:
        cache = encode(model).cache
        outputs = [
            model(TEXT_STATES[:, part], query_length=0, past_key_values=cache, use_cache=True).last_hidden_state
            for part in (slice(0, 2), slice(2, 5))
        ]
        assert cache.get_seq_length() == QUERIES + TEXT
        return torch.cat(outputs, dim=1).pow(2).sum()

    expected = gradients(model, two_steps)
    enable_checkpointing(model)
    assert_same_gradients(expected, gradients(model, two_steps))


@torch.no_grad()
def test_a_cache_in_half_precision(model: Blip2QFormerModel) -> None:
    expected = model(QUERY_STATES, encoder_hidden_states=FEATURES).last_hidden_state
    halved = encode(model).to(torch.bfloat16)
    outputs = model(QUERY_STATES, past_key_values=halved.image_cache()).last_hidden_state
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, expected, atol=0.05, rtol=0.02)
    text = model(TEXT_STATES, query_length=0, past_key_values=halved.cache).last_hidden_state
    expected = model(TEXT_STATES, query_length=0, past_key_values=encode(model).cache).last_hidden_state
    torch.testing.assert_close(text, expected, atol=0.05, rtol=0.02)


def test_errors(model: Blip2QFormerModel) -> None:
    encoded = encode(model)
    with pytest.raises(ValueError, match="`past_key_values` has 2 images for 3 rows of `query_embeds`"):
        model(QUERY_STATES, past_key_values=encoded[:2].image_cache())
    with pytest.raises(ValueError, match="earlier positions of 3 rows, `query_embeds` has 2 rows"):
        model(TEXT_STATES[:2], query_length=0, past_key_values=encoded.cache)
    with pytest.raises(ValueError, match=r"must cover the 9 positions seen \(4 of them cached\)"):
        model(TEXT_STATES, query_length=0, attention_mask=PADDED, past_key_values=encoded.cache)
    with pytest.raises(ValueError, match="`encoder_hidden_states` must be given for queries"):
        model(QUERY_STATES, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    with pytest.raises(ValueError, match="`encoder_hidden_states` must be given for queries"):
        model(QUERY_STATES)
