"""Captions by the Q-Former: against teacher forcing and against `transformers`' search over a plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from blip2_hf.modeling.captioning import _CaptionDecoder
from blip2_hf.modeling.encoded import EncodedImages
from captioners import (
    DEC,
    IMAGES,
    PAD,
    PICTURES,
    STEPS,
    Blip2ForImageTextRetrieval,
    captioner,
    common_end,
    greedy,
    plain,
)
from parity import EXACT, changed, counted
from tiny_models import VOCAB


@pytest.fixture(scope="module")
def model() -> Blip2ForImageTextRetrieval:
    return captioner()


# -- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
def test_steps_equal_teacher_forcing(model, use_cache: bool) -> None:
    outputs = model.generate(
        PICTURES, max_new_tokens=STEPS, use_cache=use_cache, output_logits=True, return_dict_in_generate=True
    )
    ids = outputs.sequences
    assert ids.shape == (IMAGES, 1 + STEPS)
    logits = torch.stack(outputs.logits, dim=1)

    def forced() -> torch.Tensor:
        with torch.no_grad():
            encoded = model.encode_image(PICTURES)
            return model._lm_logits(model._decode(ids[:, :-1], torch.ones_like(ids[:, :-1]), encoded))

    torch.testing.assert_close(logits, forced(), **EXACT)
    for name in ("lm_head.dense.weight", "qformer.encoder.layer.0.crossattention.attention.value.weight"):
        with changed(model, name):
            assert (logits - forced()).abs().max() > 1e-3


def test_greedy_is_the_most_probable_token(model) -> None:
    ids = model.generate(PICTURES, max_new_tokens=STEPS, eos_token_id=VOCAB)  # an end that no token is
    assert torch.equal(ids, greedy(model))
    assert (ids[:, 0] == DEC).all()
    assert not torch.equal(ids[0], ids[1])  # negative control: the image does matter


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "short_beams": {"num_beams": 4, "num_return_sequences": 4, "length_penalty": -1.0, "early_stopping": True},
    "long_beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0, "min_new_tokens": 4},
    "processed": {"num_beams": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
    "sampled_beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "top_k": 20},
}


@pytest.mark.parametrize("ends", [False, True], ids=["full_length", "ragged_stop"])
@pytest.mark.parametrize("name", OPTIONS)
def test_search_equals_that_over_a_plain_model(model, name: str, ends: bool) -> None:
    """Token for token and in all scores, cached or not."""
    options = OPTIONS[name] | {"max_new_tokens": STEPS, "eos_token_id": common_end(model) if ends else VOCAB}
    wanted = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}

    def seeded(generate: Callable, *args: Any, **more: Any) -> Any:
        torch.manual_seed(0)
        return generate(*args, **options, **wanted, **more)

    expected = seeded(plain, model)
    for use_cache in (True, False):
        outputs = seeded(model.generate, PICTURES, use_cache=use_cache)
        assert torch.equal(outputs.sequences, expected.sequences)
        for key in ("scores", "logits"):
            torch.testing.assert_close(outputs[key], expected[key], **EXACT)
        if "num_beams" in options:
            torch.testing.assert_close(outputs.sequences_scores, expected.sequences_scores, **EXACT)
    if ends and name == "greedy":
        assert 0 < (expected.sequences[:, -1] == PAD).sum() < IMAGES  # some stopped before others
    with changed(model, "qformer.encoder.layer.1.attention.attention.value.weight", by=0.5):
        other = seeded(plain, model).scores[0]
    assert (other - expected.scores[0]).nan_to_num(0, 0, 0).abs().max() > 1e-3


def test_beams_find_better_captions_than_greedy(model) -> None:
    options = {"max_new_tokens": STEPS, "eos_token_id": VOCAB, "output_scores": True, "return_dict_in_generate": True}
    ids = {beams: model.generate(PICTURES, num_beams=beams, **options) for beams in (1, 5)}
    first, best = (
        model.compute_transition_scores(
            out.sequences, out.scores, getattr(out, "beam_indices", None), normalize_logits="beam_indices" not in out
        )
        for out in ids.values()
    )
    assert (best.sum(dim=1) >= first.sum(dim=1) - 1e-4).all() and (best.sum(dim=1) > first.sum(dim=1) + 1e-3).any()
    torch.testing.assert_close(best.sum(dim=1) / STEPS, ids[5].sequences_scores, **EXACT)


# -- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"do_sample": True, "num_return_sequences": 3}])
@pytest.mark.parametrize("use_cache", [True, False])
def test_images_are_encoded_once(model, options: dict, use_cache: bool) -> None:
    crossed = [layer.crossattention.attention.key for layer in model.qformer.encoder.layer if layer.has_cross_attention]
    with counted(model.vision_model, *crossed) as calls, counted(model.qformer) as passes:
        model.generate(PICTURES, max_new_tokens=STEPS, eos_token_id=VOCAB, use_cache=use_cache, **options)
    assert len(calls) == 1 + len(crossed)
    assert len(passes) == 1 + STEPS


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"do_sample": True, "num_return_sequences": 3}])
@torch.no_grad()
def test_encoded_images_are_read_only(model, options: dict) -> None:
    encoded = model.encode_image(PICTURES)
    layers = encoded.cache.self_attention_cache.layers
    before = [(layer.keys, layer.keys.clone(), layer.values.clone()) for layer in layers]

    def captions(images: EncodedImages) -> torch.Tensor:
        torch.manual_seed(3)
        return model.generate(image_embeds=images, max_new_tokens=STEPS, **options)

    first = captions(encoded)
    assert torch.equal(first, captions(encoded))
    for layer, (same, keys, values) in zip(encoded.cache.self_attention_cache.layers, before, strict=True):
        assert layer.keys is same and torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(PICTURES, max_new_tokens=STEPS, **options))
    features = model.vision_model.backbone(PICTURES)
    features = getattr(features, "last_hidden_state", features)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(vision_features=features, max_new_tokens=STEPS, **options))


@torch.no_grad()
def test_without_beams_the_queries_are_shared_in_place(model) -> None:
    encoded = model.encode_image(PICTURES[:1])
    for rows in (1, 3):  # one image for three prompts, too
        cache = _CaptionDecoder(model, encoded, rows).query_cache(1)
        caches = (cache.self_attention_cache.layers, encoded.cache.self_attention_cache.layers)
        for ours, theirs in zip(*caches, strict=True):
            assert ours.keys.shape[0] == rows and ours.keys.data_ptr() == theirs.keys.data_ptr()
    assert cache.self_attention_cache.layers[0] is not encoded.cache.self_attention_cache.layers[0]


def test_batched_equals_single(model) -> None:
    options = {"num_beams": 3, "max_new_tokens": STEPS, "output_scores": True, "return_dict_in_generate": True}
    batch = model.generate(PICTURES, **options)
    for row in range(IMAGES):
        alone = model.generate(PICTURES[row : row + 1], **options)
        length = alone.sequences.shape[1]
        assert torch.equal(batch.sequences[row, :length], alone.sequences[0])
        torch.testing.assert_close(batch.sequences_scores[row], alone.sequences_scores[0], **EXACT)
