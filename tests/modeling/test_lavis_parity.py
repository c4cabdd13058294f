"""Our modules give what the original code gives, with its weights (fixtures of its tiny models)."""

from __future__ import annotations

import pytest
import torch

from blip2_hf.modeling.masks import contrastive_mask, generation_mask, matching_mask
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from conversion.lavis import to_ours
from lavis_names import QUERIES, fixture, model_with_original_weights, original_state_dict

EXACT = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def model() -> Blip2ForImageTextRetrieval:
    return model_with_original_weights()


@pytest.fixture
def stage1() -> dict[str, torch.Tensor]:
    return fixture("stage1_tiny")


def captioning_ids(stage1: dict[str, torch.Tensor]) -> torch.Tensor:
    """The original's captioning input: [DEC] in the place of [CLS]."""
    ids = stage1["input_ids"].clone()
    ids[:, 0] = 129
    return ids


def test_every_original_parameter_has_its_place(model: Blip2ForImageTextRetrieval) -> None:
    renamed = to_ours(original_state_dict())
    assert {name: tensor.shape for name, tensor in renamed.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


@torch.no_grad()
def test_tower(model: Blip2ForImageTextRetrieval, stage1: dict[str, torch.Tensor]) -> None:
    features = model.vision_model(stage1["image"]).last_hidden_state
    torch.testing.assert_close(features, stage1["image_embeds_after_ln"], **EXACT)
    assert model.vision_model.post_layernorm.eps == 1e-5  # the blocks have 1e-6; too small a difference to be seen


@torch.no_grad()
def test_query_pass(model: Blip2ForImageTextRetrieval, stage1: dict[str, torch.Tensor]) -> None:
    encoded = model.encode_image(stage1["image"])
    torch.testing.assert_close(encoded.query_output, stage1["out/query_last_hidden_state"], **EXACT)
    torch.testing.assert_close(model.get_image_features(image_embeds=encoded), stage1["out/image_feats"], **EXACT)


@torch.no_grad()
def test_text_pass(model: Blip2ForImageTextRetrieval, stage1: dict[str, torch.Tensor]) -> None:
    ids, mask = stage1["input_ids"], stage1["attention_mask"]
    states = model.qformer(model.embeddings(ids), query_length=0, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states, stage1["out/text_last_hidden_state"], **EXACT)
    torch.testing.assert_close(model.get_text_features(ids, mask), stage1["out/text_feat"], **EXACT)


@torch.no_grad()
def test_contrastive_mask_gives_both_passes_at_once(
    model: Blip2ForImageTextRetrieval, stage1: dict[str, torch.Tensor]
) -> None:
    """The paper's uni-modal mask (one pass) against the original's two passes."""
    ids, mask = stage1["input_ids"], stage1["attention_mask"]
    states = model.qformer(
        model.embeddings(ids, query_embeds=model.query_tokens.expand(6, -1, -1)),
        query_length=QUERIES,
        attention_mask=contrastive_mask(QUERIES, mask),
        encoder_hidden_states=stage1["image_embeds_after_ln"],
    ).last_hidden_state
    torch.testing.assert_close(states[:, :QUERIES], stage1["out/query_last_hidden_state"], **EXACT)
    torch.testing.assert_close(states[:, QUERIES:], stage1["out/text_last_hidden_state"], **EXACT)


@torch.no_grad()
def test_matching_pass(model: Blip2ForImageTextRetrieval, stage1: dict[str, torch.Tensor]) -> None:
    """3B pairs of images encoded once: (image, text), (negative image, text), (image, negative text)."""
    ids, mask = stage1["input_ids"], stage1["attention_mask"]
    every = torch.arange(6)
    texts = torch.cat([every, every, stage1["out/neg_text_idx"]])
    images = torch.cat([every, stage1["out/neg_image_idx"], every])
    assert torch.equal(matching_mask(QUERIES, mask[texts])[:, 0, 0], stage1["out/itm_attention_mask"].bool())
    encoded = model.encode_image(stage1["image"])[images]
    torch.testing.assert_close(model.match(encoded, ids[texts], mask[texts]), stage1["out/itm_logits"], **EXACT)
    outputs = model(
        image_embeds=encoded, input_ids=ids[texts], attention_mask=mask[texts], use_image_text_matching_head=True
    )
    torch.testing.assert_close(outputs.text_embeds, stage1["out/itm_last_hidden_state"], **EXACT)
    per_query = model.itm_head(outputs.text_embeds[:, :QUERIES])
    torch.testing.assert_close(per_query, stage1["out/itm_logits_per_query"], **EXACT)


@torch.no_grad()
def test_captioning_pass_on_cached_queries(model: Blip2ForImageTextRetrieval, stage1: dict[str, torch.Tensor]) -> None:
    mask = stage1["attention_mask"]
    allowed = generation_mask(QUERIES, mask)
    assert torch.equal(allowed[:, 0, -1], stage1["out/lm_attention_mask"].bool())  # the last row sees all that is real
    states = model.qformer(
        model.embeddings(captioning_ids(stage1)),
        query_length=0,
        attention_mask=allowed[:, :, QUERIES:],
        past_key_values=model.encode_image(stage1["image"]).cache,
    ).last_hidden_state
    torch.testing.assert_close(states, stage1["out/lm_last_hidden_state"], **EXACT)


@torch.no_grad()
def test_captioning_pass_in_one_piece(model: Blip2ForImageTextRetrieval, stage1: dict[str, torch.Tensor]) -> None:
    states = model.qformer(
        model.embeddings(captioning_ids(stage1), query_embeds=model.query_tokens.expand(6, -1, -1)),
        query_length=QUERIES,
        attention_mask=generation_mask(QUERIES, stage1["attention_mask"]),
        encoder_hidden_states=stage1["image_embeds_after_ln"],
    ).last_hidden_state
    torch.testing.assert_close(states[:, :QUERIES], stage1["out/query_last_hidden_state"], **EXACT)
    torch.testing.assert_close(states[:, QUERIES:], stage1["out/lm_last_hidden_state"], **EXACT)


@torch.no_grad()
def test_feature_extraction(model: Blip2ForImageTextRetrieval) -> None:
    expected, texts = fixture("features_tiny"), fixture("retrieval_tiny")
    encoded = model.encode_image(expected["images"])
    torch.testing.assert_close(encoded.query_output, expected["image/image_embeds"], **EXACT)
    projected = model.get_image_features(image_embeds=encoded)
    torch.testing.assert_close(projected, expected["image/image_embeds_proj"], **EXACT)
    multimodal = model.get_multimodal_features(expected["images"], texts["input_ids"][:4], texts["attention_mask"][:4])
    torch.testing.assert_close(multimodal, expected["multimodal/multimodal_embeds"], **EXACT)


@torch.no_grad()
def test_retrieval_scores(model: Blip2ForImageTextRetrieval) -> None:
    """Similarity matrix, then the original's re-ranking: ITM logit + similarity, for the top 2 of each row."""
    expected = fixture("retrieval_tiny")
    ids, mask = expected["input_ids"], expected["attention_mask"]
    encoded = model.encode_image(expected["images"])
    similarity = model(image_embeds=encoded, input_ids=ids, attention_mask=mask).logits_per_image
    torch.testing.assert_close(similarity, expected["itc"], **EXACT)
    both = similarity + model.match_matrix(encoded, ids, mask)[..., 1]
    for scores, ranked, known in (
        (both, similarity, expected["i2t"]),
        (both.t(), similarity.t(), expected["t2i"]),
    ):
        candidates = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, ranked.topk(2, dim=1).indices, True)
        torch.testing.assert_close(scores.masked_fill(~candidates, -100.0), known, **EXACT)


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.encoder.layers.1.self_attn.qkv.bias",
        "vision_model.post_layernorm.weight",
        "query_tokens",
        "qformer.layernorm.bias",
        "qformer.encoder.layer.2.crossattention.attention.value.weight",
        "qformer.encoder.layer.3.intermediate_query.dense.bias",
        "qformer.encoder.layer.1.output.dense.weight",
        "embeddings.position_embeddings.weight",
        "itm_head.bias",
    ],
)
@torch.no_grad()
def test_any_other_weight_gives_another_score(name: str) -> None:
    """Negative control: the comparisons above notice one changed parameter."""
    model, expected = model_with_original_weights(), fixture("stage1_tiny")
    ids, mask = expected["input_ids"], expected["attention_mask"]
    logits = model.match(model.encode_image(expected["image"]), ids, mask)
    torch.testing.assert_close(logits, expected["out/itm_logits"][:6], **EXACT)
    parameter = model.get_parameter(name)
    parameter.add_(0.05 * torch.randn_like(parameter))
    logits = model.match(model.encode_image(expected["image"]), ids, mask)
    assert (logits - expected["out/itm_logits"][:6]).abs().max() > 1e-4
