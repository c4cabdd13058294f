"""The EVA ViT against `transformers`' class of the same name, and by itself."""

from __future__ import annotations

import pytest
import torch
import transformers

from blip2_hf.configuration import Blip2VisionConfig
from blip2_hf.modeling.vision import Blip2VisionModel
from parity import EXACT, assert_same_gradients, changed, enable_checkpointing, gradients, without_dropout
from tiny_models import VISION, pixels, randomised

PUBLISHED_STD = 1e-10  # what the published configs have as `initializer_range`


def pair(**fields: object) -> tuple[Blip2VisionModel, transformers.Blip2VisionModel]:
    """Our tower and `transformers`', with the same random weights."""
    shape = {**VISION, **fields}
    peer = randomised(transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**shape)))
    ours = Blip2VisionModel(Blip2VisionConfig(**shape)).eval()
    ours.load_state_dict(peer.state_dict())  # strict: the same keys and shapes
    return ours, peer


def image(height: int, width: int, images: int = 2) -> torch.Tensor:
    return torch.randn(images, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_equals_transformers() -> None:
    ours, peer = pair()
    expected = peer(pixels(), output_hidden_states=True, output_attentions=True)
    outputs = ours(pixels(), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, **EXACT)
    assert len(outputs.hidden_states) == len(expected.hidden_states) == 4
    torch.testing.assert_close(outputs.hidden_states, expected.hidden_states, **EXACT)
    assert ours(pixels()).keys() == {"last_hidden_state"}
    with changed(ours, "encoder.layers.2.mlp.fc2.bias"):
        assert (ours(pixels()).last_hidden_state - expected.last_hidden_state).abs().max() > 1e-3


@pytest.mark.parametrize("fields", [{"qkv_bias": False}, {"hidden_act": "quick_gelu"}, {"layer_norm_eps": 0.1}])
@torch.no_grad()
def test_fields_of_the_config_equal_transformers(fields: dict) -> None:
    ours, peer = pair(**fields)
    expected = peer(pixels()).last_hidden_state
    torch.testing.assert_close(ours(pixels()).last_hidden_state, expected, **EXACT)
    assert (expected - pair()[1](pixels()).last_hidden_state).abs().max() > 1e-3


@torch.no_grad()
def test_equals_transformers_at_full_width() -> None:
    """Two layers of ViT-g: 1408 wide, 16 heads of 88, 257 tokens."""
    shape = {"hidden_size": 1408, "intermediate_size": 6144, "num_attention_heads": 16, "num_hidden_layers": 2}
    peer = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**shape, image_size=224))
    for parameter in peer.parameters():  # biases and norms too
        parameter.add_(0.02 * torch.randn_like(parameter))
    ours = Blip2VisionModel(Blip2VisionConfig(**shape)).eval()
    ours.load_state_dict(peer.state_dict())
    picture = image(224, 224, images=1)
    outputs = ours(picture).last_hidden_state
    assert outputs.shape == (1, 257, 1408)
    torch.testing.assert_close(outputs, peer.eval()(picture).last_hidden_state, **EXACT)


@pytest.mark.parametrize(("height", "width"), [(42, 42), (28, 56), (14, 14), (28, 28), (14, 56)])
@torch.no_grad()
def test_interpolated_positions_equal_transformers(height: int, width: int) -> None:
    ours, peer = pair()
    expected = peer(image(height, width), interpolate_pos_encoding=True).last_hidden_state
    outputs = ours(image(height, width), interpolate_pos_encoding=True).last_hidden_state
    assert outputs.shape[1] == 1 + (height // 14) * (width // 14)
    torch.testing.assert_close(outputs, expected, **EXACT)


@pytest.mark.parametrize("size", [364, 490])
@torch.no_grad()
def test_sizes_of_fine_tuning(size: int) -> None:
    """Positions learned at 224 px, used at the paper's fine-tuning resolutions."""
    ours, peer = pair(image_size=224, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    picture = image(size, size, images=1)
    outputs = ours(picture, interpolate_pos_encoding=True).last_hidden_state
    assert outputs.shape[1] == 1 + (size // 14) ** 2
    expected = peer(picture, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(outputs, expected, **EXACT)
    nearest = torch.arange(size // 14) * 224 // size
    table = ours.embeddings.position_embedding[0, 1:].unflatten(0, (16, 16))
    smooth = ours.embeddings.positions(size // 14, size // 14)[0, 1:].unflatten(0, (size // 14, size // 14))
    assert (smooth - table[nearest][:, nearest]).abs().max() > 1e-2  # negative control: bicubic, not copied


@pytest.mark.parametrize(
    ("shape", "interpolate", "message"),
    [
        ((1, 3, 42, 42), False, r"images of 42 x 42 pixels, the tower's positions are for 28 x 28"),
        ((1, 3, 14, 14), False, r"images of 14 x 14 pixels"),
        ((1, 3, 28, 42), False, r"images of 28 x 42 pixels"),
        ((1, 3, 30, 28), True, r"30 x 28 pixels; both sides must be multiples of the patch size 14"),
        ((1, 3, 28, 30), True, r"28 x 30 pixels; both sides must be multiples"),
        ((1, 1, 28, 28), False, r"must have shape \[batch, 3, height, width\], got \(1, 1, 28, 28\)"),
        ((3, 28, 28), False, r"got \(3, 28, 28\)"),
    ],
)
def test_wrong_images_are_refused(shape: tuple[int, ...], interpolate: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blip2VisionModel(Blip2VisionConfig(**VISION))(torch.zeros(shape), interpolate_pos_encoding=interpolate)


def test_an_image_must_be_given() -> None:
    with pytest.raises(ValueError, match="`pixel_values` must be given"):
        Blip2VisionModel(Blip2VisionConfig(**VISION))()


@torch.no_grad()
def test_attention_weights() -> None:
    """They sum to 1 and, applied to the values, give the layer's output."""
    ours, _ = pair()
    outputs = ours(pixels(), output_attentions=True, output_hidden_states=True)
    assert [weights.shape for weights in outputs.attentions] == 3 * [(2, 4, 5, 5)]
    for layer, weights, before, after in zip(
        ours.encoder.layers, outputs.attentions, outputs.hidden_states, outputs.hidden_states[1:], strict=False
    ):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
        values = layer.self_attn.qkv(layer.layer_norm1(before))[..., 64:].unflatten(-1, (4, 8))
        attended = torch.einsum("bhnm,bmhd->bnhd", weights, values).flatten(2)
        middle = before + layer.self_attn.projection(attended)
        torch.testing.assert_close(middle + layer.mlp(layer.layer_norm2(middle)), after, **EXACT)


@torch.no_grad()
def test_config_switches_and_tuples() -> None:
    ours, _ = pair()
    ours.config.output_hidden_states = True
    assert len(ours(pixels()).hidden_states) == 4
    plain = ours(pixels(), output_hidden_states=False, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == 1


@torch.no_grad()
def test_kernels_agree() -> None:
    ours, _ = pair()
    assert ours.config._attn_implementation == "sdpa"
    expected = ours(pixels()).last_hidden_state
    ours.set_attn_implementation("eager")
    torch.testing.assert_close(ours(pixels()).last_hidden_state, expected, **EXACT)


@pytest.mark.slow  # compiles for some seconds
@torch.no_grad()
def test_flex_attention_agrees() -> None:
    ours, _ = pair()
    expected = ours(pixels()).last_hidden_state
    ours.set_attn_implementation("flex_attention")
    torch.testing.assert_close(ours(pixels()).last_hidden_state, expected, **EXACT)


def test_checkpointing_gives_the_same_gradients() -> None:
    ours, _ = pair()
    without_dropout(ours)
    picture = pixels()
    expected = gradients(ours, lambda: ours(picture).last_hidden_state.pow(2).sum())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    enable_checkpointing(ours)
    runs: list[None] = []
    ours.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(None))
    assert_same_gradients(expected, gradients(ours, lambda: ours(picture).last_hidden_state.pow(2).sum()))
    assert len(runs) == 2  # forward, and once more in backward


def test_reentrant_checkpointing_is_refused() -> None:
    ours = Blip2VisionModel(Blip2VisionConfig(**VISION)).train()
    enable_checkpointing(ours, use_reentrant=True)
    with pytest.raises(ValueError, match='must have "use_reentrant" False'):
        ours(pixels())


@pytest.mark.parametrize("std", [PUBLISHED_STD, 0.02])
def test_a_model_from_scratch_is_alive(std: float) -> None:
    torch.manual_seed(0)
    ours = Blip2VisionModel(Blip2VisionConfig(**{**VISION, "initializer_range": std}))
    for name, parameter in ours.named_parameters():
        if parameter.ndim > 1:
            assert 0.01 < parameter.std() < 0.03, name
        else:
            assert (parameter == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
    features = ours(pixels()).last_hidden_state
    assert (features[0] - features[1]).abs().max() > 0.1  # different images, different features


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    ours, _ = pair()
    expected = ours(pixels()).last_hidden_state
    outputs = ours.to(dtype)(pixels()).last_hidden_state  # float32 images are converted
    assert outputs.dtype == dtype
    torch.testing.assert_close(outputs.float(), expected, atol=0.1, rtol=0.05)


@torch.no_grad()
def test_normalisation_keeps_its_own_precision() -> None:
    """A frozen tower in half precision, with the trained `post_layernorm` in float32."""
    ours, _ = pair()
    expected = ours(pixels()).last_hidden_state
    ours.to(torch.bfloat16).post_layernorm.float()
    assert ours.backbone(pixels()).last_hidden_state.dtype == torch.bfloat16
    outputs = ours(pixels()).last_hidden_state
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, expected, atol=0.1, rtol=0.05)


@torch.no_grad()
def test_positions_are_interpolated_in_float32() -> None:
    ours, _ = pair()
    ours.to(torch.bfloat16)
    halved = ours.embeddings.positions(5, 3)
    exact = ours.float().embeddings.positions(5, 3)  # of the same, rounded table
    assert torch.equal(halved, exact.bfloat16())


def test_attention_dropout() -> None:
    ours, _ = pair(attention_dropout=0.5)
    evaluated = ours(pixels()).last_hidden_state
    assert (ours.train()(pixels()).last_hidden_state - evaluated).abs().max() > 1e-2


@torch.no_grad()
def test_epsilon_of_post_layernorm() -> None:
    config = Blip2VisionConfig(**VISION)
    assert Blip2VisionModel(config).post_layernorm.eps == config.layer_norm_eps == 1e-6
    model = Blip2VisionModel(config, post_layernorm_eps=1e-5)
    assert model.post_layernorm.eps == 1e-5
    assert model.encoder.layers[0].layer_norm1.eps == 1e-6
