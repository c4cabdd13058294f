"""Parameter groups: who is decayed, who has which learning rate."""

import pytest
import torch
from torch import nn

from blip2_hf.training.optimizer import learning_rate_scales, parameter_groups, tower_blocks
from tiny_backbones import TOWER
from tiny_models import VISION
from tiny_own_models import CLIP, generation, retrieval

SIGLIP = {**TOWER, "model_type": "siglip_vision_model"}
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "mlp_ratio": 2,
}
RATE, DECAY = 1e-3, 0.05


def groups_of(model: nn.Module, layer_decay: float = 1.0) -> list[dict]:
    return parameter_groups(model, learning_rate=RATE, weight_decay=DECAY, layer_decay=layer_decay)


def settings(model: nn.Module, layer_decay: float = 1.0) -> dict[str, tuple[float, float]]:
    """{parameter: (learning rate, weight decay)}."""
    found = {}
    for group in groups_of(model, layer_decay):
        for name in group["param_names"]:
            assert name not in found
            found[name] = (group["lr"], group["weight_decay"])
    return found


@pytest.mark.parametrize("make", [retrieval, generation], ids=["retrieval", "generation"])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("frozen", [True, False])
def test_each_trained_parameter_is_in_one_group(make, layer_decay: float, frozen: bool) -> None:
    model = make()
    if frozen:
        model.freeze_vision()
    groups = groups_of(model, layer_decay)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(members) == len(set(members)) and set(members) == trained
    assert frozen == (len(trained) < len(list(model.parameters())))
    torch.optim.AdamW([{k: v for k, v in group.items() if k != "param_names"} for group in groups])


def test_biases_norms_and_temperature_are_not_decayed() -> None:
    model = retrieval()
    for name, (rate, decay) in settings(model).items():
        exempt = name.endswith("bias") or "norm" in name.lower() or name == "temperature"
        assert decay == (0.0 if exempt else DECAY), name
        assert rate == RATE
    assert len(groups_of(model)) == 2
    assert settings(model)["query_tokens"][1] == settings(model)["embeddings.word_embeddings.weight"][1] == DECAY


def test_scales_of_the_eva_tower_by_hand() -> None:
    # 3 blocks, d = 1/2: embeddings 2^-4, blocks 2^-3, 2^-2, 2^-1, all else 1
    found = settings(retrieval(), 0.5)
    expected = {
        "vision_model.embeddings.patch_embedding.weight": 1 / 16,
        "vision_model.embeddings.class_embedding": 1 / 16,
        "vision_model.embeddings.position_embedding": 1 / 16,
        "vision_model.encoder.layers.0.mlp.fc1.weight": 1 / 8,
        "vision_model.encoder.layers.1.layer_norm1.bias": 1 / 4,
        "vision_model.encoder.layers.2.self_attn.qkv.weight": 1 / 2,
        "vision_model.post_layernorm.weight": 1.0,
        "qformer.encoder.layer.0.attention.attention.query.weight": 1.0,
        "itm_head.bias": 1.0,
        "temperature": 1.0,
    }
    for name, scale in expected.items():
        assert found[name][0] == pytest.approx(RATE * scale), name


def test_groups_of_one_rate_follow_each_other_from_the_largest() -> None:
    rates = [group["lr"] for group in groups_of(retrieval(), 0.5)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == RATE  # what `Trainer` logs is that of the first group


@pytest.mark.parametrize(
    ("tower", "depth", "before", "block", "behind"),
    [
        (CLIP, 2, "pre_layrnorm.weight", "encoder.layers.1.mlp.fc1.weight", None),
        (SIGLIP, 3, "embeddings.position_embedding.weight", "encoder.layers.2.mlp.fc1.weight", "post_layernorm.weight"),
        (DINOV2, 3, "embeddings.cls_token", "encoder.layer.2.norm1.weight", "layernorm.weight"),
    ],
    ids=["clip", "siglip", "dinov2"],
)
def test_scales_of_other_towers(tower: dict, depth: int, before: str, block: str, behind: str | None) -> None:
    # the features are those of the second-last layer, and the layers behind it are not built
    model = retrieval(tower)
    found = settings(model, 0.5)
    assert len(tower_blocks(model.vision_model)) == depth

    def rate(end: str) -> float:
        names = [n for n in found if n.startswith("vision_model.tower.") and n.endswith(end)]
        assert names, end
        return found[names[0]][0]

    assert rate(before) == pytest.approx(RATE * 0.5 ** (depth + 1))
    assert rate(block) == pytest.approx(RATE * 0.5)
    if behind is not None:
        assert found[f"vision_model.tower.{behind}"][0] == RATE
    assert found["vision_model.post_layernorm.weight"][0] == RATE


def test_a_frozen_tower_is_not_scaled() -> None:
    model = retrieval()
    model.freeze_vision()
    assert learning_rate_scales(model, 0.5) == {}
    assert {group["lr"] for group in groups_of(model, 0.5)} == {RATE}


def test_schedulers_keep_the_ratios() -> None:
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in groups_of(retrieval(), 0.5)]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["initial_lr"] / 4)


def test_wrapped_models_are_scaled_alike() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module):
            super().__init__()
            self.module = module

    model = retrieval()
    plain, wrapped = settings(model, 0.5), settings(Wrapper(model), 0.5)
    assert wrapped == {f"module.{name}": value for name, value in plain.items()}


def test_nothing_to_train_and_bad_decay() -> None:
    model = retrieval()
    with pytest.raises(ValueError, match="`layer_decay` must be above 0 and at most 1, got 1.5"):
        groups_of(model, 1.5)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter to train"):
        groups_of(model)
    with pytest.raises(ValueError, match="stack of blocks"):
        tower_blocks(nn.Linear(2, 2))


def test_depth_counts_the_blocks_that_are_there() -> None:
    model = retrieval({**VISION, "num_hidden_layers": 2})
    assert tower_blocks(model.vision_model) == ["encoder.layers.0", "encoder.layers.1"]
