"""Vision towers of other families behind BLIP-2, tiny and random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    Aimv2VisionConfig,
    AutoModel,
    BlipVisionConfig,
    CLIPVisionConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    InternVLVisionConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)

from blip2_hf.configuration import Blip2Config
from blip2_hf.modeling.base import Blip2PreTrainedModel
from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from blip2_hf.modeling.towers import Blip2AutoVisionModel, build_vision_model
from blip2_hf.modeling.vision import Blip2VisionModel
from parity import EXACT, assert_same_gradients, enable_checkpointing, gradients, without_dropout
from tiny_models import IMAGE_TOKEN, QFORMER, QUERIES, VISION, pixels, prompt_ids, randomised, text_config

LAYERS = 4
SHAPE = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "patch_size": 14}
# DINOv3 would scale its positions at random in training.
DINOV3 = {"intermediate_size": 48, "image_size": 28, "num_register_tokens": 2, "pos_embed_rescale": None}
# With the number of tokens for 2 x 2 patches: class token and registers, where there are any, and 4.
TOWERS: dict[str, tuple[Callable[[], PreTrainedConfig], int]] = {
    "clip": (lambda: CLIPVisionConfig(**SHAPE, intermediate_size=48, image_size=28), 5),
    "siglip": (lambda: SiglipVisionConfig(**SHAPE, intermediate_size=48, image_size=28), 4),
    "siglip2": (lambda: Siglip2VisionConfig(**SHAPE, intermediate_size=48, num_patches=4), 4),
    "dinov2": (lambda: Dinov2Config(**SHAPE, mlp_ratio=2, image_size=28), 5),
    "dinov3": (lambda: DINOv3ViTConfig(**SHAPE, **DINOV3), 7),
}
ALL = pytest.mark.parametrize("name", TOWERS)


def config_for(name: str, **fields: object) -> Blip2Config:
    return Blip2Config(
        vision_config=TOWERS[name][0](),
        qformer_config={**QFORMER, "use_qformer_text_input": True},
        text_config=text_config("opt"),
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
        image_token_index=IMAGE_TOKEN,
        **fields,
    )


def tower_for(name: str, **fields: object) -> Blip2AutoVisionModel:
    return randomised(build_vision_model(config_for(name, **fields)))


def whole_tower(tower: Blip2AutoVisionModel) -> nn.Module:
    """The tower as `transformers` builds it, all layers, with the weights that ours has."""
    whole = randomised(AutoModel.from_config(tower.config.vision_config), seed=7)
    result = whole.load_state_dict(tower.tower.state_dict(), strict=False)
    assert not result.unexpected_keys
    return whole


def inputs_of(name: str, picture: torch.Tensor) -> dict[str, torch.Tensor]:
    if name != "siglip2":
        return {"pixel_values": picture}
    patches = nn.functional.unfold(picture, kernel_size=14, stride=14).mT  # channels first; SigLIP2 has them last
    patches = patches.unflatten(2, (3, 14, 14)).permute(0, 1, 3, 4, 2).flatten(2)
    sides = torch.tensor([picture.shape[-2] // 14, picture.shape[-1] // 14]).expand(len(picture), -1)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32),
        "spatial_shapes": sides,
    }


@pytest.mark.parametrize("layer", [-2, -4, 2])
@ALL
@torch.no_grad()
def test_features_are_those_of_the_layer(name: str, layer: int) -> None:
    tower = tower_for(name, vision_feature_layer=layer)
    index = layer if layer > 0 else LAYERS + 1 + layer
    expected = whole_tower(tower)(**inputs_of(name, pixels()), output_hidden_states=True).hidden_states
    assert len(expected) == LAYERS + 1
    features = tower.backbone(pixels()).last_hidden_state
    assert features.shape == (2, TOWERS[name][1], 32)
    torch.testing.assert_close(features, expected[index], **EXACT)
    for other in {0, 1, 2, 3} - {index}:  # negative control
        assert (features - expected[other]).abs().max() > 1e-2
    after = nn.functional.layer_norm(features, (32,), tower.post_layernorm.weight, tower.post_layernorm.bias, 1e-5)
    torch.testing.assert_close(tower(pixels()).last_hidden_state, after, **EXACT)


@ALL
@torch.no_grad()
def test_last_layer_is_the_towers_own_output(name: str) -> None:
    tower = tower_for(name, vision_feature_layer=-1)
    expected = whole_tower(tower)(**inputs_of(name, pixels())).last_hidden_state
    torch.testing.assert_close(tower.backbone(pixels()).last_hidden_state, expected, **EXACT)


@ALL
def test_layers_behind_the_feature_layer_are_not_built(name: str) -> None:
    assert Blip2Config(vision_config=TOWERS[name][0]()).vision_feature_layer == -2  # the paper's choice
    sizes = {layer: tower_for(name, vision_feature_layer=layer).num_parameters() for layer in (-1, -2, -3)}
    per_layer = sizes[-1] - sizes[-2]
    assert per_layer > 32 * 32 * 4  # at least its attention
    assert sizes[-2] - sizes[-3] == per_layer
    blocks = [
        module for module in tower_for(name).modules() if type(module).__name__.endswith(("EncoderLayer", "Layer"))
    ]
    assert len(blocks) == LAYERS - 1


@ALL
@torch.no_grad()
def test_hidden_states_and_attention_weights(name: str) -> None:
    tower = tower_for(name)
    tokens = TOWERS[name][1]
    plain = tower.backbone(pixels())
    assert plain.hidden_states is None
    assert plain.attentions is None
    outputs = tower(pixels(), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(outputs.last_hidden_state, tower(pixels()).last_hidden_state, **EXACT)
    expected = whole_tower(tower)(**inputs_of(name, pixels()), output_hidden_states=True).hidden_states
    assert len(outputs.hidden_states) == LAYERS  # embeddings, and three of four layers
    torch.testing.assert_close(tuple(outputs.hidden_states), tuple(expected[:LAYERS]), **EXACT)
    assert [weights.shape for weights in outputs.attentions] == 3 * [(2, 4, tokens, tokens)]
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, tokens))
    assert tower.tower.config._attn_implementation == "sdpa"  # put back


@ALL
@torch.no_grad()
def test_larger_images(name: str) -> None:
    tower = tower_for(name)
    picture = pixels(size=56)
    outputs = tower(picture, interpolate_pos_encoding=True).last_hidden_state
    assert outputs.shape == (2, TOWERS[name][1] + 12, 32)  # 16 patches instead of 4
    options = {"interpolate_pos_encoding": True} if name in ("clip", "siglip") else {}
    expected = whole_tower(tower)(**inputs_of(name, picture), output_hidden_states=True, **options).hidden_states[3]
    torch.testing.assert_close(outputs, tower.post_layernorm(expected), **EXACT)
    wide = torch.cat([pixels(), pixels(seed=9)], dim=3)
    assert tower(wide, interpolate_pos_encoding=True).last_hidden_state.shape[1] == TOWERS[name][1] + 4


@ALL
def test_wrong_sizes_are_refused(name: str) -> None:
    tower = tower_for(name)
    with pytest.raises(ValueError, match="images of 56 x 56 pixels, the tower's positions are for 28 x 28"):
        tower(pixels(size=56))
    with pytest.raises(ValueError, match="multiples of the patch size 14"):
        tower(pixels(size=30), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="`pixel_values` must have shape"):
        tower(pixels()[:, :2])


@ALL
@torch.no_grad()
def test_images_do_not_mix(name: str) -> None:
    tower = tower_for(name)
    together = tower(pixels(images=3)).last_hidden_state
    torch.testing.assert_close(together[1:2], tower(pixels(images=3)[1:2]).last_hidden_state, **EXACT)
    with pytest.raises(ValueError, match="`pixel_values` must be given"):
        tower()


def scores(model: Blip2ForImageTextRetrieval) -> torch.Tensor:
    return model(pixels(), prompt_ids()[:, QUERIES:]).logits_per_image


def logits(model: Blip2ForConditionalGeneration) -> torch.Tensor:
    return model(pixels(), prompt_ids(), qformer_input_ids=prompt_ids()[:, QUERIES:]).logits


@pytest.mark.parametrize(
    ("model_class", "run"), [(Blip2ForConditionalGeneration, logits), (Blip2ForImageTextRetrieval, scores)]
)
@ALL
@torch.no_grad()
def test_whole_models_run_and_come_back(
    name: str, model_class: type[Blip2PreTrainedModel], run: Callable, tmp_path: Path
) -> None:
    model = randomised(model_class(config_for(name)))
    expected = run(model)
    assert expected.isfinite().all()
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded.config.vision_config.model_type == model.config.vision_config.model_type
    torch.testing.assert_close(run(loaded), expected, **EXACT)


@ALL
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    tower = without_dropout(tower_for(name))
    expected = gradients(tower, lambda: tower(pixels()).last_hidden_state.pow(3).sum())
    enable_checkpointing(tower)
    assert_same_gradients(expected, gradients(tower, lambda: tower(pixels()).last_hidden_state.pow(3).sum()))


@ALL
@torch.no_grad()
def test_kernel_and_precision_are_taken_over(name: str) -> None:
    model = randomised(Blip2ForImageTextRetrieval._from_config(config_for(name), attn_implementation="eager"))
    tower = model.vision_model
    assert tower.tower.config._attn_implementation == "eager"
    expected = tower(pixels()).last_hidden_state
    model.set_attn_implementation("sdpa")
    assert tower.tower.config._attn_implementation == "sdpa"
    torch.testing.assert_close(tower(pixels()).last_hidden_state, expected, **EXACT)
    tower.tower.to(torch.bfloat16)  # what is frozen; `post_layernorm` stays as it is
    outputs = tower(pixels())
    assert outputs.last_hidden_state.dtype == torch.float32
    torch.testing.assert_close(outputs.last_hidden_state, expected, atol=0.2, rtol=0.1)


def test_the_tower_is_chosen_by_model_type() -> None:
    assert isinstance(build_vision_model(Blip2Config(vision_config=VISION)), Blip2VisionModel)
    assert isinstance(build_vision_model(config_for("clip")), Blip2AutoVisionModel)
    assert build_vision_model(config_for("clip")).post_layernorm.eps == 1e-5  # as the original's ln_vision
    assert build_vision_model(config_for("clip", vision_layernorm_eps=1e-6)).post_layernorm.eps == 1e-6


def test_the_callers_config_is_not_changed() -> None:
    config = TOWERS["clip"][0]()
    before = config.to_dict()
    build_vision_model(Blip2Config(vision_config=config))
    assert config.to_dict() == before


def test_towers_that_cannot_be_used() -> None:
    shape = {**SHAPE, "intermediate_size": 48, "image_size": 28}
    with pytest.raises(ValueError, match="model_type 'blip_vision_model' is not a tower that AutoModel can build"):
        build_vision_model(Blip2Config(vision_config=BlipVisionConfig(**shape)))
    # one row for all images, as it is made for images of different sizes
    packing = build_vision_model(Blip2Config(vision_config=PixtralVisionConfig(**shape)))
    with pytest.raises(ValueError, match=r"its features of 2 images have shape \(1, 8, 32\)"):
        packing(pixels())
    with pytest.raises(ValueError, match="`vision_config.image_size` must be square"):
        oblong = InternVLVisionConfig(**{**shape, "image_size": [28, 42], "patch_size": [14, 14]})
        build_vision_model(Blip2Config(vision_config=oblong))(pixels())


@torch.no_grad()
def test_a_tower_that_cannot_interpolate() -> None:
    shape = {**SHAPE, "intermediate_size": 48, "image_size": 28}
    tower = randomised(build_vision_model(Blip2Config(vision_config=Aimv2VisionConfig(**shape))))
    assert tower(pixels()).last_hidden_state.shape == (2, 4, 32)
    with pytest.raises(RuntimeError):  # its own error; never a result
        tower(pixels(size=56), interpolate_pos_encoding=True)
