"""Towers for a new model: from `transformers`, from a BLIP-2, in half precision, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from blip2_hf.configuration import Blip2Config
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from blip2_hf.modeling.vision import Blip2VisionModel
from parity import EXACT
from tiny_backbones import TOWER, bert, random_tower, same, save_bert, tower_model
from tiny_models import VISION, peer_retrieval, pixels, randomised
from tiny_own_models import CLIP, retrieval, retrieval_config


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"), bert())


@pytest.mark.parametrize("layer", [-2, -1])
@pytest.mark.parametrize("name", ["clip", "siglip", "clip_vision", "dinov2"])
@torch.no_grad()
def test_tower_features(tmp_path: Path, text_folder: str, name: str, layer: int) -> None:
    source = tower_model(name)
    source.save_pretrained(tmp_path)
    ours = Blip2ForImageTextRetrieval.from_backbones(tmp_path, text_folder, vision_feature_layer=layer)
    tower = getattr(source, "vision_model", source)
    outputs = tower(pixel_values=pixels(), output_hidden_states=True)
    expected = outputs.hidden_states[3] if layer == -2 else outputs.last_hidden_state
    torch.testing.assert_close(ours.vision_model.backbone(pixels()).last_hidden_state, expected, **EXACT)
    assert (outputs.hidden_states[2] - expected).abs().max() > 0.1  # negative control
    assert (ours.vision_model.post_layernorm.weight == 1).all()
    frozen = {key for key, weight in ours.named_parameters() if not weight.requires_grad}
    assert frozen == {key for key, _ in ours.named_parameters() if key.startswith("vision_model.tower.")}
    dropped = {row.note for row in ours.backbone_report.dropped if row.source == str(tmp_path)}
    assert ("behind layer 3, whose output is used" in dropped) == (layer == -2)
    assert ("not part of the tower" in dropped) == (name in ("clip", "siglip"))


@pytest.mark.parametrize("kind", ["ours", "transformers", "tower", "clip"])
@torch.no_grad()
def test_tower_of_a_blip2(tmp_path: Path, text_folder: str, kind: str) -> None:
    if kind == "tower":
        source = randomised(Blip2VisionModel._from_config(retrieval_config().vision_config))
        tower = source
    else:
        source = peer_retrieval() if kind == "transformers" else retrieval(CLIP if kind == "clip" else VISION)
        tower = source.vision_model
    source.save_pretrained(tmp_path, max_shard_size="40KB")
    ours = Blip2ForImageTextRetrieval.from_backbones(tmp_path, text_folder)
    expected = tower(pixels()).last_hidden_state
    torch.testing.assert_close(ours.vision_model(pixels()).last_hidden_state, expected, **EXACT)
    assert same(ours.vision_model.post_layernorm.weight, tower.post_layernorm.weight)
    assert ours.vision_model.post_layernorm.weight.requires_grad
    assert not any("vision_model" in (row.target or "") for row in ours.backbone_report.initialised)
    parameters = dict(ours.vision_model.named_parameters())
    assert parameters.keys() == dict(tower.named_parameters()).keys()


def test_incomplete_towers_are_refused(tmp_path: Path, text_folder: str) -> None:
    source = tower_model("clip")
    state = source.state_dict()
    missing = next(key for key in state if key.startswith("vision_model.") and "layers.1.mlp.fc1.weight" in key)
    source.save_pretrained(tmp_path, state_dict={key: value for key, value in state.items() if key != missing})
    with pytest.raises(ValueError, match=r"`vision` .*mlp.fc1.weight"):
        Blip2ForImageTextRetrieval.from_backbones(tmp_path, text_folder)
    own = retrieval()
    own.save_pretrained(tmp_path / "own")
    config = Blip2Config.from_pretrained(tmp_path / "own")
    config.vision_config.num_hidden_layers += 1
    config.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"`vision` .*missing: vision_model.encoder.layers.3"):
        Blip2ForImageTextRetrieval.from_backbones(tmp_path / "own", text_folder)
    connector = Blip2ForImageTextRetrieval.from_pretrained(_saved(retrieval(), tmp_path / "full"))
    connector.save_pretrained(tmp_path / "connector", connector_only=True)
    with pytest.raises(ValueError, match="connector-only"):
        Blip2ForImageTextRetrieval.from_backbones(tmp_path / "connector", text_folder)
    tower_model("clip").save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="`vision_feature_layer` must name one of the tower's 4 layers"):
        Blip2ForImageTextRetrieval.from_backbones(tmp_path / "clip", text_folder, vision_feature_layer=9)
    with pytest.raises(ValueError, match="`vision` .* is not a vision tower"):
        Blip2ForImageTextRetrieval.from_backbones(text_folder, text_folder)


def _saved(model: Blip2ForImageTextRetrieval, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_tower_of_a_classifier(tmp_path: Path, text_folder: str) -> None:
    """Its pooler is missing, its classifier is not needed; neither has to do with the features."""
    source = randomised(ViTForImageClassification(ViTConfig(**TOWER)))
    source.save_pretrained(tmp_path)
    ours = Blip2ForImageTextRetrieval.from_backbones(tmp_path, text_folder)
    rows = {row.target: row.note for row in ours.backbone_report.initialised}
    assert rows["vision_model.tower.pooler.dense.*"] == "random, not used for the features"
    assert "classifier.*" in {row.source_keys for row in ours.backbone_report.dropped}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tower(tmp_path: Path, text_folder: str, dtype: torch.dtype) -> None:
    for name, source in (("clip", tower_model("clip")), ("own", retrieval())):
        source.save_pretrained(tmp_path / name)
        ours = Blip2ForImageTextRetrieval.from_backbones(tmp_path / name, text_folder, vision_dtype=dtype)
        for key, weight in ours.named_parameters():
            assert weight.dtype == (torch.float32 if weight.requires_grad else dtype), key
        assert ours.vision_model.post_layernorm.weight.dtype == torch.float32
        features = ours.get_image_features(pixels())
        assert features.dtype == torch.float32
        assert features.isfinite().all()
    exact = source.vision_model.encoder.layers[0].mlp.fc1.weight
    assert same(ours.vision_model.encoder.layers[0].mlp.fc1.weight, exact.to(dtype))


def test_unfrozen_tower(text_folder: str) -> None:
    ours = Blip2ForImageTextRetrieval.from_backbones(random_tower(), text_folder, freeze_vision=False)
    assert all(weight.requires_grad for weight in ours.parameters())
