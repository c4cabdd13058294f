"""What both models share: freezing, mixed precision, checkpointing, compilation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from blip2_hf.modeling.base import Blip2PreTrainedModel
from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from parity import EXACT, assert_same_gradients, counted, enable_checkpointing, gradients, without_dropout
from tiny_models import QUERIES, VISION, pixels, prompt_ids
from tiny_own_models import CLIP, generation, retrieval

IMAGES = pixels()


def retrieval_loss(model: Blip2ForImageTextRetrieval) -> torch.Tensor:
    ids = prompt_ids()[:, QUERIES:]
    contrastive = model(IMAGES, ids).logits_per_image
    matching = model(IMAGES, ids, use_image_text_matching_head=True).logits_per_image
    return contrastive.pow(2).sum() + matching.pow(2).sum()


def generation_loss(model: Blip2ForConditionalGeneration) -> torch.Tensor:
    ids = prompt_ids()
    if model.config.is_encoder_decoder:
        return model(IMAGES, ids, labels=ids[:, QUERIES:]).loss
    return model(IMAGES, ids, labels=ids).loss


CASES: dict[str, tuple[Callable[[], Blip2PreTrainedModel], Callable]] = {
    "retrieval": (retrieval, retrieval_loss),
    "retrieval, clip": (lambda: retrieval(CLIP), retrieval_loss),
    "opt": (generation, generation_loss),
    "t5": (lambda: generation("t5"), generation_loss),
}
ALL = pytest.mark.parametrize("case", CASES)


def tower_parameters(model: Blip2PreTrainedModel) -> set[str]:
    names = {name for name, _ in model.named_parameters() if name.startswith("vision_model.")}
    return {name for name in names if not name.startswith("vision_model.post_layernorm.")}


# -- freezing --------------------------------------------------------------------------------------------------------


@ALL
def test_a_frozen_tower_gets_no_gradients_and_the_rest_the_same(case: str) -> None:
    make, loss = CASES[case]
    model = without_dropout(make())
    expected = gradients(model, lambda: loss(model))
    assert tower_parameters(model) & expected.keys()
    model.freeze_vision()
    frozen = gradients(model, lambda: loss(model))
    assert not tower_parameters(model) & frozen.keys()
    assert {"vision_model.post_layernorm.weight", "query_tokens"} <= frozen.keys()  # ln_vision is trained
    assert_same_gradients({k: v for k, v in expected.items() if k not in tower_parameters(model)}, frozen)
    model.unfreeze_vision()
    assert_same_gradients(expected, gradients(model, lambda: loss(model)))


@ALL
def test_a_frozen_tower_stays_in_evaluation_mode(case: str) -> None:
    model = CASES[case][0]().train()
    assert all(module.training for module in model.modules())
    model.freeze_vision()
    for _ in range(2):
        modes = {name: module.training for name, module in model.named_modules()}
        assert modes["vision_model.post_layernorm"]
        assert modes["qformer"]
        assert not any(modes[name] for name in modes if name.startswith("vision_model") and "post_layer" not in name)
        model.train()
    model.eval()
    assert not any(module.training for module in model.modules())
    model.freeze_vision()
    assert not any(module.training for module in model.modules())  # freezing does not start training
    model.unfreeze_vision()
    model.train()
    assert all(module.training for module in model.modules())


def test_a_frozen_language_model() -> None:
    model = without_dropout(generation())
    expected = gradients(model, lambda: generation_loss(model))
    model.freeze_language_model()
    model.train()
    assert not model.language_model.training
    assert not any(module.training for module in model.language_model.modules())
    assert model.qformer.training
    frozen = gradients(model, lambda: generation_loss(model))
    assert not any(name.startswith("language_model.") for name in frozen)
    assert_same_gradients({k: v for k, v in expected.items() if not k.startswith("language_model.")}, frozen)
    model.unfreeze_language_model()
    assert_same_gradients(expected, gradients(model, lambda: generation_loss(model)))
    assert model.language_model.training


def test_no_graph_is_built_in_a_frozen_tower() -> None:
    model = retrieval()
    assert model.vision_model.backbone(IMAGES).last_hidden_state.requires_grad
    model.freeze_vision()
    assert not model.vision_model.backbone(IMAGES).last_hidden_state.requires_grad
    assert model.vision_model(IMAGES).last_hidden_state.requires_grad


@pytest.mark.parametrize("tower", [VISION, CLIP])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_tower_under_float32(tower: dict, dtype: torch.dtype) -> None:
    """What is frozen may be halved; what is trained, and its gradients, stay float32."""
    model = without_dropout(retrieval(tower))
    model.freeze_vision()
    expected = gradients(model, lambda: retrieval_loss(model))
    for name in tower_parameters(model):
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)
    halved = gradients(model, lambda: retrieval_loss(model))
    assert halved.keys() == expected.keys()
    assert {gradient.dtype for gradient in halved.values()} == {torch.float32}
    a, b = (torch.cat([found[k].flatten() for k in expected]) for found in (expected, halved))
    assert torch.cosine_similarity(a, b, dim=0) > 0.99
    assert model.encode_image(IMAGES).image_embeds.dtype == torch.float32
    features = model.vision_model.backbone(IMAGES).last_hidden_state
    assert features.dtype == dtype
    cached = gradients(model, lambda: model.get_image_features(vision_features=features).pow(3).sum())
    direct = gradients(model, lambda: model.get_image_features(IMAGES).pow(3).sum())
    assert_same_gradients(direct, cached)  # features cached in half precision train `post_layernorm` as well


# -- encoding --------------------------------------------------------------------------------------------------------


@ALL
@torch.no_grad()
def test_qformer_features(case: str) -> None:
    model = CASES[case][0]()
    expected = model.encode_image(IMAGES).query_output
    torch.testing.assert_close(model.get_qformer_features(IMAGES), expected, **EXACT)
    for given in (
        {"image_embeds": model.vision_model(IMAGES).last_hidden_state},
        {"vision_features": model.vision_model.backbone(IMAGES).last_hidden_state},
    ):
        torch.testing.assert_close(model.get_qformer_features(**given), expected, **EXACT)
    with counted(model.vision_model) as calls:
        model.get_qformer_features(**given)
    assert not calls
    with pytest.raises(ValueError, match="got pixel_values and vision_features"):
        model.get_qformer_features(IMAGES, **given)


@pytest.mark.parametrize("case", ["opt", "retrieval, clip"])
@pytest.mark.parametrize("size", [28, 42])
@torch.no_grad()
def test_tower_and_qformer_are_one_graph(case: str, size: int) -> None:
    """`fullgraph=True` fails at anything that cannot be traced."""
    torch._dynamo.reset()
    model = CASES[case][0]()
    compiled = torch.compile(model.get_qformer_features, fullgraph=True, backend="eager", dynamic=False)
    arguments = {"pixel_values": pixels(size=size), "interpolate_pos_encoding": size != 28}
    torch.testing.assert_close(compiled(**arguments), model.get_qformer_features(**arguments), **EXACT)


@pytest.mark.slow  # compiles for half a minute
@torch.no_grad()
def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    model = generation()
    compiled = torch.compile(model.get_qformer_features, fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), model.get_qformer_features(IMAGES), **EXACT)


# -- checkpointing ---------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointing_gives_the_same_gradients(case: str, frozen: bool) -> None:
    make, loss = CASES[case]
    model = without_dropout(make())
    if frozen:
        model.freeze_vision()
    expected = gradients(model, lambda: loss(model))
    enable_checkpointing(model)
    runs: list[None] = []
    model.qformer.encoder.layer[1].attention.register_forward_pre_hook(lambda *_: runs.append(None))
    loss(model)
    forward_runs = len(runs)
    assert_same_gradients(expected, gradients(model, lambda: loss(model)))
    assert len(runs) == 3 * forward_runs  # the second loss: forward, and once more in backward
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
    assert_same_gradients(expected, gradients(model, lambda: loss(model)))
    assert len(runs) == 4 * forward_runs


# -- precision of loaded models --------------------------------------------------------------------------------------


def test_qformer_stays_float32_in_float16(tmp_path) -> None:
    retrieval().save_pretrained(tmp_path)
    model = Blip2ForImageTextRetrieval.from_pretrained(tmp_path, dtype=torch.float16)
    assert model.query_tokens.dtype == torch.float32
    assert {parameter.dtype for parameter in model.qformer.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.vision_model.parameters()} == {torch.float16}
    with torch.no_grad():
        assert model(IMAGES, prompt_ids()[:, QUERIES:]).logits_per_image.dtype == torch.float16
