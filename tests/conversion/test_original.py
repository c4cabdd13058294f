"""The forward from the original's names alone against what the original code gave (fixtures/README.md)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conversion.original import OriginalForward, OriginalShape, captioning_loss, contrastive_loss
from lavis_names import fixture, original_state_dict
from parity import EXACT

SHAPE = OriginalShape("eva", 2, 4, 4, 4, frozenset({0, 2}))


def forward(weights: dict[str, torch.Tensor] | None = None, places: list[str] | None = None) -> OriginalForward:
    weights = original_state_dict() if weights is None else weights

    def watch(place: str, states: torch.Tensor) -> torch.Tensor:
        if places is not None:
            places.append(place)
        return states

    return OriginalForward(weights.__getitem__, SHAPE, watch)


def stage1_results(model: OriginalForward) -> dict[str, torch.Tensor]:
    """All of one step, by the names of the fixture."""
    data = fixture("stage1_tiny")
    ids, mask, every = data["input_ids"], data["attention_mask"], torch.arange(6)
    image = model.image(data["image"])
    queries = model.queries(image)
    text = model.text(ids, mask)
    images = torch.cat([every, data["out/neg_image_idx"], every])
    texts = torch.cat([every, every, data["out/neg_text_idx"]])
    matched = model.matching(image[images], ids[texts], mask[texts])
    started = torch.cat([torch.full_like(ids[:, :1], 129), ids[:, 1:]], dim=1)
    captioned = model.captioning(image, started, mask)[:, 8:]
    image_vectors, text_vectors = model.vectors("vision_proj", queries), model.vectors("text_proj", text[:, 0])
    logits, match = model.words_after(captioned), model.match_logits(matched)
    similarity = torch.einsum("iqd,td->itq", image_vectors, text_vectors).amax(dim=-1)
    return {
        "image_embeds_after_ln": image,
        "out/query_last_hidden_state": queries,
        "out/text_last_hidden_state": text,
        "out/itm_last_hidden_state": matched,
        "out/lm_last_hidden_state": captioned,
        "out/image_feats": image_vectors,
        "out/text_feat": text_vectors,
        "out/itm_logits": match,
        "out/lm_logits": logits,
        "out/loss_itc": contrastive_loss(similarity, model.read("temp")),
        "out/loss_itm": nn.functional.cross_entropy(match, torch.tensor([1] * 6 + [0] * 12)),
        "out/loss_lm": captioning_loss(logits, started, mask),
    }


@torch.no_grad()
def test_a_whole_step_is_the_originals() -> None:
    expected, places = fixture("stage1_tiny"), []
    for name, found in stage1_results(forward(places=places)).items():
        torch.testing.assert_close(found, expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    assert places[:4] == ["tower, embeddings", "tower, layer 0", "tower, layer 1", "tower, ln_vision"]
    assert len(places) == len(set(places)) == 4 + 4 * (1 + 4)


def parameters() -> list[str]:
    """All but those of layers that are like others."""
    like_others = ("blocks.0.", ".layer.2.", ".layer.1.attention", ".position_ids")
    return [name for name in sorted(original_state_dict()) if not any(part in name for part in like_others)]


@pytest.mark.parametrize("name", parameters())
@torch.no_grad()
def test_every_parameter_is_read(name: str) -> None:
    """Negative control: any one changed parameter changes a result, except what cannot, or is a second name."""
    weights, expected = original_state_dict(), fixture("stage1_tiny")
    weights[name] = weights[name] + 0.05 * torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(1))
    found = stage1_results(forward(weights))
    changed = any((value - expected[key]).abs().max() > 1e-4 for key, value in found.items())
    second_names = ("Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias")
    cancels = name.endswith(("attention.self.key.bias",))  # in the softmax
    assert changed == (name not in second_names and not cancels)
