"""A tower from a folder under the names of the original's own tower files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from conversion.detect import detect
from conversion.tensor_sources import open_weights
from conversion.tower_folders import TowerOfFolder, open_tower
from original_keys import clip_shapes
from tiny_models import randomised
from tiny_own_models import CLIP

SHAPE = {name: value for name, value in CLIP.items() if name != "model_type"}


def test_clip_of_transformers(tmp_path):
    peer = randomised(CLIPVisionModel(CLIPVisionConfig(**SHAPE)))
    peer.save_pretrained(tmp_path)
    tower = open_tower(open_weights(tmp_path))
    assert isinstance(tower, TowerOfFolder)
    assert detect(tower.infos).kind == "tower_clip" and set(tower.infos) == set(clip_shapes(3))
    layer = dict(peer.named_modules())[next(n for n, _ in peer.named_modules() if n.endswith("layers.1.self_attn"))]
    expected = torch.cat([getattr(layer, f"{which}_proj").weight for which in "qkv"])
    assert torch.equal(tower.read("transformer.resblocks.1.attn.in_proj_weight"), expected)


def test_files_of_the_original_are_left_alone_and_others_refused(original, tmp_path):
    file = open_weights(original / "itm_tower.pth")
    assert open_tower(file) is file
    with pytest.raises(ValueError, match="`tower` .* holds no tower but a language_model"):
        open_tower(open_weights(original / "opt"))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no BLIP-2, no tower and no language model"):
        open_tower(open_weights(tmp_path))
