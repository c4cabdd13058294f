"""What forward and generate take: images in any form, with or without placeholders, ids or embeddings."""

import pytest
import torch

from blip2_hf.modeling.encoded import EncodedImages
from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from generation_pairs import DECODING, FAMILIES, build, model, ragged
from parity import EXACT, counted
from tiny_models import QFORMER, QUERIES, pixels, prompt_ids

QUESTIONS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
QUESTION_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def decoder_inputs(ours: Blip2ForConditionalGeneration, rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[0, 15, 16]]).expand(rows, -1)
    return {"decoder_input_ids": ids} if ours.config.is_encoder_decoder else {}


@torch.no_grad()
def image_inputs(ours: Blip2ForConditionalGeneration, images: torch.Tensor) -> dict[str, dict]:
    """The same images in every form but pixels."""
    tower = ours.vision_model
    return {
        "image_embeds": {"image_embeds": tower(images).last_hidden_state},
        "vision_features": {"vision_features": tower.backbone(images).last_hidden_state},
        "encoded": {"image_embeds": ours.encode_image(images)},
    }


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["image_embeds", "vision_features", "encoded"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forms_of_an_image(family: str, form: str) -> None:
    ours, text = model(family), ragged("left").text
    given = image_inputs(ours, pixels())[form]
    expected = ours(pixels(), **text, **decoder_inputs(ours)).logits
    with counted(ours.vision_model) as calls:
        found = ours(**given, **text, **decoder_inputs(ours)).logits
        torch.testing.assert_close(found, expected, **EXACT)
        other = image_inputs(ours, pixels(seed=7))[form]
        assert (ours(**other, **text, **decoder_inputs(ours)).logits - expected).abs().max() > 1e-2
        calls.clear()
        for options in (DECODING["greedy"], DECODING["beams, short"]):
            tokens = ours.generate(**given, **text, **options, max_new_tokens=5)
            assert not calls, "the tower must not run"
            assert torch.equal(tokens, ours.generate(pixels(), **text, **options, max_new_tokens=5))
            calls.clear()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_image_and_five_prompts(family: str) -> None:
    ours, image, ids = model(family), pixels(1), prompt_ids(5)
    expected = ours(image.expand(5, -1, -1, -1), ids, **decoder_inputs(ours, 5)).logits
    expected_tokens = ours.generate(image.expand(5, -1, -1, -1), ids, num_beams=3, max_new_tokens=5)
    rows = []
    with counted(ours.vision_model, ours.vision_model.encoder) as calls:
        rows.append(ours(image, ids, **decoder_inputs(ours, 5)).logits)
        assert len(calls) == 2, "once each"
    with counted(ours.vision_model) as calls:
        tokens = ours.generate(image, ids, num_beams=3, max_new_tokens=5)
        assert len(calls) == 1
    torch.testing.assert_close(rows[0], expected, **EXACT)
    assert torch.equal(tokens, expected_tokens)
    assert len({tuple(row) for row in tokens[:, -5:].tolist()}) > 1


@torch.no_grad()
def test_one_encoded_image_and_five_calls() -> None:
    ours, ids = model("opt"), prompt_ids(5)
    with counted(ours.vision_model, ours.qformer) as calls:
        encoded = ours.encode_image(pixels())
        assert len(calls) == 2
        one_by_one = [ours.generate(image_embeds=encoded[0], input_ids=row[None], max_new_tokens=5) for row in ids]
        assert len(calls) == 2, "neither tower nor Q-Former runs again"
    together = ours.generate(image_embeds=encoded[[0] * 5], input_ids=ids, max_new_tokens=5)
    assert torch.equal(torch.cat(one_by_one), together)
    assert torch.equal(together, ours.generate(pixels()[:1], ids, max_new_tokens=5))


@torch.no_grad()
def test_questions_on_an_encoded_image() -> None:
    """The question-conditioned Q-Former reuses the image's keys and values; one image may have several questions."""
    ours = build("opt", qformer_config={**QFORMER, "use_qformer_text_input": True})
    question = {"qformer_input_ids": QUESTIONS, "qformer_attention_mask": QUESTION_MASK}
    inputs = {"input_ids": prompt_ids(), **question}
    expected = ours(pixels(), **inputs)
    for given in image_inputs(ours, pixels()).values():
        torch.testing.assert_close(ours(**given, **inputs).logits, expected.logits, **EXACT)
    shared = ours(pixels()[:1], **inputs).logits
    torch.testing.assert_close(shared, ours(pixels()[[0, 0]], **inputs).logits, **EXACT)
    encoded = ours.encode_image(pixels())
    torch.testing.assert_close(ours(image_embeds=encoded[0], **inputs).logits, shared, **EXACT)
    tokens = ours.generate(image_embeds=encoded, **inputs, num_beams=3, max_new_tokens=5)
    assert torch.equal(tokens, ours.generate(pixels(), **inputs, num_beams=3, max_new_tokens=5))
    assert isinstance(encoded, EncodedImages)


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_missing_surplus_and_unfitting_images(method: str) -> None:
    ours, ids = model("opt"), prompt_ids()
    call = getattr(ours, method)
    with pytest.raises(ValueError, match="exactly one of .* must be given, got none"):
        call(input_ids=ids)
    embeds = torch.zeros(2, 5, 32)
    with pytest.raises(ValueError, match="got pixel_values and image_embeds"):
        call(pixels(), ids, image_embeds=embeds)
    with pytest.raises(ValueError, match=r"`image_embeds` must have shape \[images, tokens, 32\], got \(2, 5, 31\)"):
        call(input_ids=ids, image_embeds=embeds[..., 1:])
    with pytest.raises(ValueError, match="encoded images.*must be the only image input"):
        call(pixels(), ids, image_embeds=ours.encode_image(pixels()))
    with pytest.raises(ValueError, match="2 images do not fit 3 rows of text"):
        call(pixels(), prompt_ids(3))
    with pytest.raises(ValueError, match=r"`input_ids` must have 4 image placeholders.*got \[0, 0\]"):
        call(pixels(), ids[:, QUERIES:])
    with pytest.raises(ValueError, match=r"images of 42 x 42 pixels.*`interpolate_pos_encoding=True`"):
        call(pixels(size=42), ids)


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_question_where_there_is_no_reader_and_the_reverse(method: str) -> None:
    inputs = {"pixel_values": pixels(), "input_ids": prompt_ids()}
    with pytest.raises(ValueError, match="`qformer_input_ids` was given, but this model's Q-Former has no text branch"):
        getattr(model("opt"), method)(**inputs, qformer_input_ids=QUESTIONS)
    reader = build("opt", qformer_config={**QFORMER, "use_qformer_text_input": True})
    with pytest.raises(ValueError, match="`qformer_input_ids` must be given, got None"):
        getattr(reader, method)(**inputs)
    with pytest.raises(ValueError, match="`qformer_input_ids` has 3 rows for 2 images"):
        getattr(reader, method)(**inputs, qformer_input_ids=torch.cat([QUESTIONS, QUESTIONS[:1]]))


@torch.no_grad()
def test_larger_images() -> None:
    ours, ids = model("opt"), prompt_ids()
    large = pixels(size=42)
    found = ours(large, ids, interpolate_pos_encoding=True)
    assert found.vision_outputs.last_hidden_state.shape[1] == 10
    tokens = ours.generate(large, ids, interpolate_pos_encoding=True, max_new_tokens=3)
    encoded = ours.encode_image(large, interpolate_pos_encoding=True)
    assert torch.equal(ours.generate(image_embeds=encoded, input_ids=ids, max_new_tokens=3), tokens)


# -- no placeholder token ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_images_before_the_text_without_a_placeholder_token(family: str, layout: str) -> None:
    """As the oldest published files have it; the same as placeholders before each text."""
    ours, old = model(family), build(family, image_token_index=None)
    text = ragged(layout).text if layout == "right" else ragged("between").text
    bare = {name: value[:, QUERIES:] for name, value in text.items()}
    expected = ours(pixels(), **text, **decoder_inputs(ours)).logits
    found = old(pixels(), **bare, **decoder_inputs(old)).logits
    torch.testing.assert_close(found, expected, **EXACT)
    for decoding in ("greedy", "beams, short", "beams, several"):
        expected = ours.generate(pixels(), **text, **DECODING[decoding], max_new_tokens=5)
        found = old.generate(pixels(), **bare, **DECODING[decoding], max_new_tokens=5)
        assert torch.equal(found, expected if ours.config.is_encoder_decoder else expected[:, QUERIES:])
    assert torch.equal(old.generate(pixels(), max_new_tokens=5), strip(ours.generate(pixels(), max_new_tokens=5), ours))


def strip(tokens: torch.Tensor, ours: Blip2ForConditionalGeneration) -> torch.Tensor:
    return tokens if ours.config.is_encoder_decoder else tokens[:, QUERIES:]


@torch.no_grad()
def test_labels_without_a_placeholder_token() -> None:
    ours, old, batch = model("opt"), build("opt", image_token_index=None), ragged("between")
    bare = {name: value[:, QUERIES:] for name, value in batch.text.items()}
    expected = ours(pixels(), **batch.text, labels=batch.input_ids).loss
    torch.testing.assert_close(old(pixels(), **bare, labels=bare["input_ids"]).loss, expected, **EXACT)


# -- embeddings instead of ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_embeddings_with_and_without_ids(family: str) -> None:
    ours, batch = model(family), ragged("left")
    text = batch.text
    embeds = {"inputs_embeds": ours.get_input_embeddings()(batch.input_ids), "attention_mask": batch.attention_mask}
    expected = ours(pixels(), **text, **decoder_inputs(ours)).logits
    for extra in ({}, {"input_ids": batch.input_ids}):
        found = ours(pixels(), **embeds, **extra, **decoder_inputs(ours)).logits
        torch.testing.assert_close(found, expected, **EXACT)
    prompt = 0 if ours.config.is_encoder_decoder else batch.input_ids.shape[1]
    for decoding in ("greedy", "beams, short", "beams, several"):
        expected = ours.generate(pixels(), **text, **DECODING[decoding], max_new_tokens=5)
        with_ids = ours.generate(pixels(), input_ids=batch.input_ids, **embeds, **DECODING[decoding], max_new_tokens=5)
        without = ours.generate(pixels(), **embeds, **DECODING[decoding], max_new_tokens=5)
        assert torch.equal(with_ids, expected)
        assert torch.equal(without, expected[:, prompt:]), "there is no prompt to return"


def test_a_mask_without_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="`attention_mask` was given without `input_ids`"):
        model("opt").generate(pixels(), attention_mask=torch.ones(2, 5))


def test_decoder_inputs_belong_to_encoder_decoders() -> None:
    with pytest.raises(ValueError, match="`decoder_input_ids` was given, but the language model is decoder-only"):
        model("opt")(pixels(), prompt_ids(), decoder_input_ids=torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="needs `labels` or `decoder_input_ids`, got neither"):
        model("t5")(pixels(), prompt_ids())


def test_config_of_something_else_as_a_language_model() -> None:
    from transformers import ViTConfig

    with pytest.raises(ValueError, match="`text_config` of model_type 'vit' is not a language model"):
        build("opt", text_config=ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
