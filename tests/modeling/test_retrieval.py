"""Contrastive and matching scores against `transformers`, and for any number of images and texts."""

from __future__ import annotations

import pytest
import torch
import transformers

from blip2_hf.configuration import Blip2Config
from blip2_hf.modeling.encoded import EncodedImages
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from parity import EXACT, assert_same_gradients, changed, counted, gradients, without_dropout
from tiny_models import QFORMER, QUERIES, VISION, peer_retrieval, pixels, randomised

PAIRS, LENGTH, PAD, PLACEHOLDER = 3, 6, 0, 299
LENGTHS = (6, 4, 2)


def like(peer: transformers.Blip2ForImageTextRetrieval) -> Blip2ForImageTextRetrieval:
    ours = Blip2ForImageTextRetrieval(Blip2Config.from_dict(peer.config.to_dict())).eval()
    result = ours.load_state_dict(peer.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert {key.split(".")[0] for key in result.missing_keys} == {"temperature", "lm_head"}  # `transformers` has none
    return ours


@pytest.fixture(scope="module")
def peer() -> transformers.Blip2ForImageTextRetrieval:
    return peer_retrieval()


@pytest.fixture(scope="module")
def model(peer: transformers.Blip2ForImageTextRetrieval) -> Blip2ForImageTextRetrieval:
    return like(peer)


def texts(lengths: tuple[int, ...] = LENGTHS, side: str = "right", seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids [M, longest] and their mask, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        part = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        ids[row, part] = torch.randint(10, 290, (length,), generator=generator)
        mask[row, part] = 1
    return ids, mask


IMAGES = pixels(PAIRS)


@pytest.mark.parametrize("matching", [False, True])
@torch.no_grad()
def test_equals_transformers(model, peer, matching: bool) -> None:
    ids, mask = texts()
    expected = peer(IMAGES, ids, mask, use_image_text_matching_head=matching)
    outputs = model(IMAGES, ids, mask, use_image_text_matching_head=matching)
    assert outputs.logits_per_image.shape == ((PAIRS, 2) if matching else (PAIRS, PAIRS))
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        torch.testing.assert_close(outputs[name], expected[name], **EXACT)
    for part in ("text_model_output", "vision_model_output"):
        torch.testing.assert_close(outputs[part].last_hidden_state, expected[part].last_hidden_state, **EXACT)
    for name in ("qformer.encoder.layer.3.output_query.dense.weight", "embeddings.word_embeddings.weight"):
        with changed(model, name):
            other = model(IMAGES, ids, mask, use_image_text_matching_head=matching).logits_per_image
            assert (other - expected.logits_per_image).abs().max() > 1e-3


@pytest.mark.parametrize("matching", [False, True])
@torch.no_grad()
def test_tuples_equal_transformers(model, peer, matching: bool) -> None:
    ids, mask = texts()
    expected = peer(IMAGES, ids, mask, use_image_text_matching_head=matching, return_dict=False)
    outputs = model(IMAGES, ids, mask, use_image_text_matching_head=matching, return_dict=False)
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs[:4], expected[:4], **EXACT)
    torch.testing.assert_close(outputs[4][0], expected[4][0], **EXACT)
    torch.testing.assert_close(outputs[5][0], expected[5][0], **EXACT)


@pytest.mark.parametrize("matching", [False, True])
def test_gradients_equal_transformers(peer, matching: bool) -> None:
    ids, mask = texts()
    ours = without_dropout(like(peer))

    def loss(of: torch.nn.Module) -> torch.Tensor:
        return of(IMAGES, ids, mask, use_image_text_matching_head=matching).logits_per_image.pow(2).sum()

    assert_same_gradients(gradients(peer, lambda: loss(peer)), gradients(ours, lambda: loss(ours)))


@torch.no_grad()
def test_published_layout_with_placeholders() -> None:
    """Where the config names an image placeholder, rows begin with Q of them; they are left out."""
    config = peer_retrieval().config
    config.image_token_index = PLACEHOLDER
    peer = randomised(transformers.Blip2ForImageTextRetrieval(config))
    ours = like(peer)
    ids, mask = texts()
    long_ids = torch.cat([torch.full((PAIRS, QUERIES), PLACEHOLDER), ids], dim=1)
    long_mask = torch.cat([torch.ones(PAIRS, QUERIES, dtype=torch.long), mask], dim=1)
    for matching in (False, True):
        expected = peer(IMAGES, long_ids, long_mask, use_image_text_matching_head=matching).logits_per_image
        for given in ((long_ids, long_mask), (ids, mask)):  # texts without placeholders are taken as well
            outputs = ours(IMAGES, *given, use_image_text_matching_head=matching).logits_per_image
            torch.testing.assert_close(outputs, expected, **EXACT)
    for wrong in (long_ids[:, 1:], long_ids.roll(1, dims=1), torch.cat([long_ids[:2], long_ids[2:].flip(1)])):
        with pytest.raises(ValueError, match=r"must have its 4 image placeholders \(token 299\) before the text"):
            ours(IMAGES, wrong)


@pytest.mark.parametrize(("images", "count"), [(1, 5), (2, 3), (5, 1), (3, 2)])
@torch.no_grad()
def test_any_number_of_images_and_texts(model, images: int, count: int) -> None:
    """Every score of an N x M matrix is that of the pair alone."""
    ids, mask = texts((6, 4, 2, 5, 3)[:count])
    picture = pixels(images)
    contrastive = model(picture, ids, mask)
    assert contrastive.logits_per_image.shape == (images, count)
    torch.testing.assert_close(contrastive.logits_per_text, contrastive.logits_per_image.t())
    matching = model(picture, ids, mask, use_image_text_matching_head=True).logits_per_image
    assert matching.shape == (images * count, 2)  # image by image
    encoded = model.encode_image(picture)
    matrix = model.match_matrix(encoded, ids, mask)
    assert matrix.shape == (images, count, 2)
    torch.testing.assert_close(matching, model.match(encoded, ids, mask), **EXACT)
    torch.testing.assert_close(matching, matrix.flatten(0, 1), **EXACT)
    for i in range(images):
        for t in range(count):
            length = int(mask[t].sum())
            alone = (picture[i : i + 1], ids[t : t + 1, :length])  # no padding, no mask
            torch.testing.assert_close(
                contrastive.logits_per_image[i, t], model(*alone).logits_per_image[0, 0], **EXACT
            )
            single = model(*alone, use_image_text_matching_head=True).logits_per_image
            torch.testing.assert_close(matrix[i, t], single[0], **EXACT)


@torch.no_grad()
def test_as_many_images_as_texts_are_pairs(model) -> None:
    ids, mask = texts()
    encoded = model.encode_image(IMAGES)
    matrix = model.match_matrix(encoded, ids, mask)
    assert matrix.shape == (PAIRS, PAIRS, 2)
    pairs = model.match(encoded, ids, mask)
    torch.testing.assert_close(pairs, matrix.diagonal().t(), **EXACT)
    order = [2, 0, 0]
    torch.testing.assert_close(model.match(encoded[order], ids, mask), matrix[order, range(PAIRS)], **EXACT)
    assert (matrix[0, 0] - matrix[1, 0]).abs().max() > 1e-3  # negative control: the image does matter


@pytest.mark.parametrize("matching", [False, True])
@torch.no_grad()
def test_padding_on_either_side(model, matching: bool) -> None:
    expected = model(IMAGES, *texts(), use_image_text_matching_head=matching).logits_per_image
    left = model(IMAGES, *texts(side="left"), use_image_text_matching_head=matching).logits_per_image
    torch.testing.assert_close(left, expected, **EXACT)
    ids, mask = texts()
    wider = torch.nn.functional.pad(ids, (2, 3), value=17), torch.nn.functional.pad(mask, (2, 3))  # junk under it
    outputs = model(IMAGES, *wider, use_image_text_matching_head=matching).logits_per_image
    torch.testing.assert_close(outputs, expected, **EXACT)
    torch.testing.assert_close(
        model.get_text_features(*texts(side="left")), model.get_text_features(ids, mask), **EXACT
    )
    unmasked = model(IMAGES, ids, use_image_text_matching_head=matching).logits_per_image
    assert (unmasked - expected).abs().max() > 1e-3  # negative control: without the mask, padding is text


@torch.no_grad()
def test_mask_is_optional(model) -> None:
    ids = texts((6, 6, 6))[0]
    for matching in (False, True):
        with_mask = model(IMAGES, ids, torch.ones_like(ids), use_image_text_matching_head=matching).logits_per_image
        without = model(IMAGES, ids, use_image_text_matching_head=matching).logits_per_image
        torch.testing.assert_close(without, with_mask, **EXACT)


@torch.no_grad()
def test_matching_logits_are_not_probabilities(model) -> None:
    """One softmax of the two logits is the probability; it has not been taken already."""
    ids, mask = texts()
    outputs = model(IMAGES, ids, mask, use_image_text_matching_head=True)
    logits = outputs.logits_per_image
    torch.testing.assert_close(logits, model.itm_head(outputs.text_embeds[:, :QUERIES]).mean(1), **EXACT)
    assert (logits.sum(-1) - 1).abs().min() > 1e-2


@torch.no_grad()
def test_features(model) -> None:
    ids, mask = texts()
    images, captions = model.get_image_features(IMAGES), model.get_text_features(ids, mask)
    assert images.shape == (PAIRS, QUERIES, 16)
    assert captions.shape == (PAIRS, 16)
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(PAIRS, QUERIES))
    torch.testing.assert_close(captions.norm(dim=-1), torch.ones(PAIRS))
    outputs = model(IMAGES, ids, mask)
    torch.testing.assert_close(outputs.image_embeds, images, **EXACT)
    torch.testing.assert_close(outputs.text_embeds, captions, **EXACT)
    every = torch.stack([images[:, q] @ captions.t() for q in range(QUERIES)])
    torch.testing.assert_close(outputs.logits_per_image, every.max(0).values, **EXACT)
    multimodal = model.get_multimodal_features(IMAGES, ids, mask)
    assert multimodal.shape == (PAIRS, QUERIES, QFORMER["hidden_size"])
    torch.testing.assert_close(model.itm_head(multimodal).mean(1), model.match(model.encode_image(IMAGES), ids, mask))


@torch.no_grad()
def test_every_kind_of_image_input(model) -> None:
    """Pixels, features before and after `ln_vision`, and encoded images give the same."""
    ids, mask = texts()
    features = model.vision_model.backbone(IMAGES).last_hidden_state
    image_embeds = model.vision_model(IMAGES).last_hidden_state
    inputs = (
        {"vision_features": features},
        {"image_embeds": image_embeds},
        {"image_embeds": model.encode_image(IMAGES)},
        {"image_embeds": model.encode_image(vision_features=features)},
        {"image_embeds": model.encode_image(image_embeds=image_embeds)},
    )
    for matching in (False, True):
        expected = model(IMAGES, ids, mask, use_image_text_matching_head=matching).logits_per_image
        for given in inputs:
            outputs = model(**given, input_ids=ids, attention_mask=mask, use_image_text_matching_head=matching)
            torch.testing.assert_close(outputs.logits_per_image, expected, **EXACT)
            assert outputs.vision_model_output is None
    for given in inputs:
        torch.testing.assert_close(model.get_image_features(**given), model.get_image_features(IMAGES), **EXACT)
        multimodal = model.get_multimodal_features(**given, input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(multimodal, model.get_multimodal_features(IMAGES, ids, mask), **EXACT)


@torch.no_grad()
def test_an_image_is_encoded_once_for_five_texts(model) -> None:
    ids, mask = texts((6, 4, 2, 5, 3))
    keys = [layer.crossattention.attention.key for layer in model.qformer.encoder.layer[::2]]
    with counted(model.vision_model) as towers, counted(*keys) as projections:
        encoded = model.encode_image(pixels(1))
        assert isinstance(encoded, EncodedImages)
        together = model.match(encoded, ids, mask)
        one_by_one = [model.match(encoded, ids[t : t + 1], mask[t : t + 1]) for t in range(5)]
        model(image_embeds=encoded, input_ids=ids, attention_mask=mask)
    assert len(towers) == 1
    assert len(projections) == 2  # one per layer that attends to the image
    torch.testing.assert_close(torch.cat(one_by_one), together, **EXACT)


@torch.no_grad()
def test_matching_runs_the_qformer_once(model) -> None:
    with counted(model.qformer) as passes:
        model(IMAGES, *texts(), use_image_text_matching_head=True)
    assert len(passes) == 1
    with counted(model.qformer) as passes:
        model(IMAGES, *texts())
    assert len(passes) == 2


@torch.no_grad()
def test_larger_images(model) -> None:
    ids, mask = texts()
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        model(pixels(PAIRS, size=42), ids, mask)
    outputs = model(pixels(PAIRS, size=42), ids, mask, interpolate_pos_encoding=True)
    encoded = model.encode_image(pixels(PAIRS, size=42), interpolate_pos_encoding=True)
    assert encoded.image_embeds.shape == (PAIRS, 10, 32)
    again = model(image_embeds=encoded, input_ids=ids, attention_mask=mask).logits_per_image
    torch.testing.assert_close(again, outputs.logits_per_image, **EXACT)


@pytest.mark.parametrize("matching", [False, True])
@torch.no_grad()
def test_attention_weights(model, matching: bool) -> None:
    """Weights of tower and Q-Former, as for maps of what a text attends to."""
    outputs = model(
        IMAGES,
        *texts(),
        use_image_text_matching_head=matching,
        output_attentions=True,
        output_hidden_states=True,
    )
    tower, qformer = outputs.vision_model_output, outputs.text_model_output
    assert [weights.shape for weights in tower.attentions] == 3 * [(PAIRS, 4, 5, 5)]
    assert len(tower.hidden_states) == 4
    positions = LENGTH + (QUERIES if matching else 0)
    assert [weights.shape for weights in qformer.attentions] == 4 * [(PAIRS, 4, positions, positions)]
    assert [weights.shape for weights in qformer.cross_attentions] == (2 if matching else 0) * [(PAIRS, 4, QUERIES, 5)]
    assert len(qformer.hidden_states) == 5
    plain = model(IMAGES, *texts(), use_image_text_matching_head=matching)
    assert plain.vision_model_output.attentions is None
    assert plain.text_model_output.hidden_states is None
    torch.testing.assert_close(outputs.logits_per_image, plain.logits_per_image, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(peer, dtype: torch.dtype) -> None:
    ids, mask = texts()
    reference, ours = like(peer), like(peer).to(dtype)
    for matching in (False, True):
        expected = reference(IMAGES, ids, mask, use_image_text_matching_head=matching).logits_per_image
        outputs = ours(IMAGES, ids, mask, use_image_text_matching_head=matching).logits_per_image
        assert outputs.dtype == dtype
        torch.testing.assert_close(outputs.float(), expected, atol=0.05, rtol=0.05)
    mixed = reference.match(reference.encode_image(IMAGES).to(dtype), ids, mask)
    torch.testing.assert_close(mixed, expected, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_autocast(model) -> None:
    """Keys cached outside of autocast are taken inside, by either kernel."""
    ids, mask = texts()
    encoded = model.encode_image(IMAGES)
    expected = model.match(encoded, ids, mask)
    for kernel in ("eager", "sdpa"):
        model.set_attn_implementation(kernel)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cached = model.match(encoded, ids, mask)
            direct = model(IMAGES, ids, mask, use_image_text_matching_head=True).logits_per_image
        torch.testing.assert_close(cached.float(), expected, atol=0.05, rtol=0.05)
        torch.testing.assert_close(direct.float(), expected, atol=0.05, rtol=0.05)


ERRORS = [
    ({"input_ids": None}, "`input_ids` must be given, got None"),
    ({"pixel_values": None}, "exactly one of pixel_values, image_embeds, vision_features must be given, got none"),
    ({"image_embeds": torch.zeros(3, 5, 32)}, "got pixel_values and image_embeds"),
    (
        {"pixel_values": None, "image_embeds": torch.zeros(3, 5, 31)},
        r"`image_embeds` must have shape \[images, tokens, 32\], got \(3, 5, 31\)",
    ),
    ({"pixel_values": None, "vision_features": torch.zeros(3, 32)}, "`vision_features` must have shape"),
    ({"input_ids": torch.ones(6, dtype=torch.long)}, r"`input_ids` must be integers of shape .* shape \(6,\)"),
    ({"input_ids": torch.ones(3, 0, dtype=torch.long)}, r"of shape \(3, 0\)"),
    ({"attention_mask": torch.ones(3, 5)}, r"`attention_mask` must have the shape of `input_ids` \(3, 6\), got"),
    ({"input_ids": torch.ones(3, 65, dtype=torch.long), "attention_mask": None}, "takes at most 64"),
]


@pytest.mark.parametrize("matching", [False, True])
@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_errors(model, matching: bool, arguments: dict, message: str) -> None:
    ids, mask = texts()
    given = {"pixel_values": IMAGES, "input_ids": ids, "attention_mask": mask, **arguments}
    with pytest.raises(ValueError, match=message):
        model(**given, use_image_text_matching_head=matching)


def test_errors_of_the_smaller_methods(model) -> None:
    ids, mask = texts()
    encoded = model.encode_image(IMAGES)
    with pytest.raises(ValueError, match=r"`image_embeds` \(encoded images\) must be the only image input"):
        model(IMAGES, ids, mask, image_embeds=encoded)
    with pytest.raises(ValueError, match=r"`image_embeds` \(encoded images\) must be the only image input"):
        model.get_multimodal_features(IMAGES, ids, mask, image_embeds=encoded)
    with pytest.raises(ValueError, match="`input_ids` must be"):
        model.match(encoded, None)
    for score in (model.match, model.match_matrix):
        with pytest.raises(ValueError, match="`encoded` must be what `encode_image` returns, got Tensor"):
            score(IMAGES, ids)
        with pytest.raises(ValueError, match="`encoded` must hold at least one image"):
            score(encoded[:0], ids)
    assert model.encode_image(image_embeds=encoded) is encoded
    with pytest.raises(ValueError, match="`attention_mask` must have the shape"):
        model.match_matrix(encoded, ids, mask[:1])
    with pytest.raises(ValueError, match="`attention_mask` must have the shape"):
        model.get_text_features(ids, mask[:, :2])
    with pytest.raises(ValueError, match="`config.qformer_config.use_qformer_text_input` must be True"):
        Blip2ForImageTextRetrieval(Blip2Config(vision_config=VISION, qformer_config=QFORMER))


def test_a_model_from_scratch_is_alive() -> None:
    """Queries differ (equal ones would stay equal), and nothing is zero that trains."""
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config={**VISION, "initializer_range": 1e-10},  # as published
        qformer_config={**QFORMER, "use_qformer_text_input": True, "initializer_range": 0.02},
        num_query_tokens=QUERIES,
    )
    model = Blip2ForImageTextRetrieval(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert 0.01 < parameter.std() < 0.03, name
    assert torch.pdist(model.query_tokens[0]).min() > 0.05
    assert not model.embeddings.word_embeddings.weight[0].any()  # padding
    ids, mask = texts((6, 4, 3))
    found = gradients(model, lambda: model(IMAGES, ids, mask, return_loss=True).loss)
    silent = {name for name, _ in model.named_parameters() if name not in found or not found[name].any()}
    assert silent <= {f"qformer.encoder.layer.{i}.attention.attention.key.bias" for i in range(4)} | {
        f"qformer.encoder.layer.{i}.crossattention.attention.key.bias" for i in (0, 2)
    }, "a constant on all keys cancels in the softmax; everything else must get a gradient"


def test_resized_vocabulary(tmp_path) -> None:
    """[DEC] stays where it is, the language model's config as well, and the result can be loaded."""
    model = Blip2ForImageTextRetrieval(
        Blip2Config(
            vision_config=VISION,
            qformer_config={**QFORMER, "use_qformer_text_input": True},
            num_query_tokens=QUERIES,
            image_text_hidden_size=16,
        )
    ).eval()
    ids, mask = texts()
    before = model.get_text_features(ids, mask)
    start, rows = model.config.qformer_config.decoder_start_token_id, model.config.qformer_config.vocab_size
    language_model = model.config.text_config.to_dict()
    model.resize_token_embeddings(rows + 7)
    assert model.lm_head.decoder.weight is model.embeddings.word_embeddings.weight
    assert model.lm_head.decoder.bias.shape == (rows + 7,)
    assert model.config.qformer_config.decoder_start_token_id == start
    assert model.config.text_config.to_dict() == language_model
    model.save_pretrained(tmp_path)
    again = Blip2ForImageTextRetrieval.from_pretrained(tmp_path)
    assert again.config.qformer_config.vocab_size == rows + 7
    torch.testing.assert_close(again.get_text_features(ids, mask), before, **EXACT)


def test_ids_outside_the_vocabulary(model) -> None:
    ids, mask = texts()
    ids[0, 0] = 300
    encoded = model.encode_image(IMAGES)
    for call in (
        model.get_text_features,
        lambda *text: model.match(encoded, *text),
        lambda *text: model(IMAGES, *text),
    ):
        with pytest.raises(ValueError, match="`input_ids` must be in 0 … 299, got"):
            call(ids, mask)


def test_the_loss_comes_first(model) -> None:
    outputs = model(IMAGES, texts((6, 4, 3))[0], texts((6, 4, 3))[1], return_loss=True)
    assert outputs[0] is outputs.loss and outputs.to_tuple()[0] is outputs.loss
    assert list(outputs)[:4] == ["loss", "loss_itc", "loss_itm", "loss_itg"]


def test_temperature_stays_in_float32(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    half = Blip2ForImageTextRetrieval.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.temperature.dtype == torch.float32 and half.itm_head.weight.dtype == torch.bfloat16
