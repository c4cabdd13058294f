from __future__ import annotations

import pytest
import torch

import tiny_own_models
from blip2_hf.modeling import attention
from blip2_hf.modeling.attention_maps import matching_maps, query_maps
from tiny_models import pixels, prompt_ids

TEXTS = prompt_ids(rows=3)[:, -6:]


@pytest.fixture(scope="module")
def model():
    return tiny_own_models.retrieval().eval()


@pytest.mark.parametrize("family", ["opt", None])
@pytest.mark.parametrize("tower", [tiny_own_models.VISION, tiny_own_models.CLIP])
def test_query_maps_are_the_attention_to_patches(family, tower) -> None:
    build = tiny_own_models.retrieval if family is None else lambda tower: tiny_own_models.generation(family, tower)
    model = build(tower).eval()
    images = pixels(2)
    maps = query_maps(model, images)
    with torch.no_grad():
        features = model.vision_model(images).last_hidden_state
        queries = model.query_tokens.expand(2, -1, -1)
        found = model.qformer(queries, encoder_hidden_states=features, output_attentions=True).cross_attentions
    side = int((features.shape[1] - 1) ** 0.5)
    assert maps.shape == (2, len(found), model.config.num_query_tokens, side, side)
    for layer, weights in enumerate(found):
        for row in range(side):
            for column in range(side):
                expected = weights.mean(dim=1)[..., 1 + row * side + column]  # after the class token
                torch.testing.assert_close(maps[:, layer, :, row, column], expected)
    assert (maps.sum(dim=(-2, -1)) < 1).all() and not torch.equal(maps[0], maps[1])


def test_images_that_are_not_square(model) -> None:
    images = torch.cat([pixels(1), pixels(1, seed=5)], dim=3)
    maps = query_maps(model, images, interpolate_pos_encoding=True)
    assert maps.shape[-1] == 2 * maps.shape[-2]
    assert matching_maps(model, images, TEXTS, interpolate_pos_encoding=True).shape == (
        3,
        *maps.shape[1:2],
        *maps.shape[-2:],
    )


def test_matching_maps_are_gradients_by_the_attention(model, monkeypatch) -> None:
    """The weights are multiplied by ones; the gradient by these is weight times gradient by the weight."""
    images, mask = pixels(3), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    maps = matching_maps(model, images, TEXTS, mask)
    features = model.vision_model(images).last_hidden_state.detach()
    kernel, ones = attention.eager_attention, []

    def scaled(module, query, key, value, *args, **kwargs):
        output, weights = kernel(module, query, key, value, *args, **kwargs)
        if key.shape[2] != features.shape[1]:
            return output, weights
        ones.append(torch.ones_like(weights, requires_grad=True))
        weights = weights * ones[-1]
        return torch.matmul(weights, value).transpose(1, 2), weights

    monkeypatch.setattr(attention, "eager_attention", scaled)
    options = {"use_image_text_matching_head": True, "output_attentions": True}
    logits = model(None, TEXTS, mask, features, **options).logits_per_image
    gradients = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), ones)
    for layer, gradient in enumerate(gradients):
        expected = gradient.clamp(min=0).sum(dim=(1, 2))[:, 1:].reshape(maps[:, layer].shape)
        torch.testing.assert_close(maps[:, layer], expected, rtol=1e-4, atol=1e-7)
        assert (expected > 0).any()


def test_one_image_for_all_texts(model) -> None:
    images = pixels(1)
    with torch.no_grad():  # of the caller
        maps = matching_maps(model, images, TEXTS)
    torch.testing.assert_close(maps, matching_maps(model, images.expand(3, -1, -1, -1), TEXTS))
    assert not torch.equal(maps[0], maps[1])


def test_parameters_get_no_gradient_and_may_be_frozen(model) -> None:
    before = matching_maps(model, pixels(1), TEXTS)
    assert all(parameter.grad is None for parameter in model.parameters())
    frozen = tiny_own_models.retrieval().eval().requires_grad_(False)
    torch.testing.assert_close(matching_maps(frozen, pixels(1), TEXTS), before)


def test_what_does_not_fit(model) -> None:
    with pytest.raises(ValueError, match=r"`pixel_values` must hold one image or as many as texts \(3\), got 2"):
        matching_maps(model, pixels(2), TEXTS)
    other = tiny_own_models.retrieval().eval()
    other.config.vision_config.patch_size = 4  # as of a tower that merges patches
    with pytest.raises(ValueError, match="no grid of patches"):
        query_maps(other, pixels(1), interpolate_pos_encoding=True)
