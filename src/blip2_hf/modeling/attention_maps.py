"""Where the queries look: the Q-Former's cross-attention as maps over the image.

Shapes: N images, M texts, Q queries, P image tokens, L layers that attend to the image, h x w the grid of patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .towers import tower_side

if TYPE_CHECKING:
    from .base import Blip2PreTrainedModel
    from .retrieval import Blip2ForImageTextRetrieval


@torch.no_grad()
def query_maps(
    model: Blip2PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False
) -> torch.Tensor:
    """How much each query attends to each patch, without any text: the mean over the heads of each layer.

    Args:
        model: either of the two models.
        pixel_values: [N, 3, H, W], normalised.
        interpolate_pos_encoding: take images of another size than the tower's.

    Returns:
        [N, L, Q, h, w], not negative. The patches of a map add up to at most 1: what is left went to tokens that are
        no patch (the class token). Divide by the sum to compare shapes of maps.

    Raises:
        ValueError: if the tower's tokens are not a grid of patches.
    """
    features = model._image_features(pixel_values, None, None, interpolate_pos_encoding).last_hidden_state
    weights = model._query_pass(features, output_attentions=True).cross_attentions
    grid = _grid(model, pixel_values, features)
    return torch.stack([_patches(layer.mean(dim=1), grid) for layer in weights], dim=1)


def matching_maps(
    model: Blip2ForImageTextRetrieval,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    interpolate_pos_encoding: bool = False,
) -> torch.Tensor:
    """What in an image speaks for its matching a text: cross-attention times the gradient of the ITM score by it, where
    that is positive, summed over heads and queries (Grad-CAM, Selvaraju et al. 2017, on attention as in ALBEF, Li et
    al. 2021, sec. 6.5; the score is the difference of the two ITM logits).

    Args:
        pixel_values: [N, 3, H, W], normalised: as many images as texts, or one image for all texts.
        input_ids: [M, T]; attention_mask: [M, T], 1 = real, default all.
        interpolate_pos_encoding: take images of another size than the tower's.

    Returns:
        [M, L, h, w], not negative; no parameter gets a gradient.

    Raises:
        ValueError: for other numbers of images and texts, or if the tower's tokens are not a grid of patches.
    """
    images, texts = len(pixel_values), len(input_ids)
    if images not in (1, texts):
        raise ValueError(f"`pixel_values` must hold one image or as many as texts ({texts}), got {images}")
    with torch.no_grad():
        features = model._image_features(pixel_values, None, None, interpolate_pos_encoding).last_hidden_state
    grid = _grid(model, pixel_values, features)
    # One row of features for each text, not keys shared by several: the gradient is that of each row's own weights.
    with torch.enable_grad():
        outputs = model(
            image_embeds=features.expand(texts, -1, -1).detach().requires_grad_(),  # also where all is frozen
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_image_text_matching_head=True,
            output_attentions=True,
        )
        weights = outputs.text_model_output.cross_attentions
        score = outputs.logits_per_image.float()
        gradients = torch.autograd.grad((score[:, 1] - score[:, 0]).sum(), weights)
    layers = [(w.detach() * g).clamp(min=0).sum(dim=1) for w, g in zip(weights, gradients, strict=True)]
    return torch.stack([_patches(layer, grid).sum(dim=1) for layer in layers], dim=1)


def _grid(model: Blip2PreTrainedModel, pixel_values: torch.Tensor, features: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of patches."""
    patch = tower_side(model.config.vision_config, "patch_size")
    height, width = pixel_values.shape[2:]
    tokens = features.shape[1]
    if patch is None or not 0 < (height // patch) * (width // patch) <= tokens:
        raise ValueError(
            f"`model` has a tower whose {tokens} tokens are no grid of patches of {patch} pixels of images of "
            f"{height} x {width}"
        )
    return height // patch, width // patch


def _patches(weights: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[N, Q, P] -> [N, Q, h, w], float32; tokens that are no patches are before them."""
    height, width = grid
    return weights[..., weights.shape[-1] - height * width :].unflatten(-1, grid).float()
