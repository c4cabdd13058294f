"""`device_map="auto"`: whatever the memory, no residual block is split over two devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes
from torch import nn

from blip2_hf.modeling.base import Blip2PreTrainedModel
from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from tiny_models import VISION, pixels, prompt_ids
from tiny_own_models import CLIP, generation_config, retrieval, retrieval_config

# What adds its input to its output. Written out here, for `_no_split_modules` is what is tested.
BLOCKS = {
    "Blip2VisionLayer",
    "Blip2QFormerLayer",
    "CLIPEncoderLayer",
    "OPTDecoderLayer",
    "LlamaDecoderLayer",
    "T5Block",
    "BartEncoderLayer",
    "BartDecoderLayer",
}
MODELS: dict[str, Callable[[], Blip2PreTrainedModel]] = {
    "retrieval": lambda: Blip2ForImageTextRetrieval(retrieval_config()),
    "retrieval, clip": lambda: Blip2ForImageTextRetrieval(retrieval_config(CLIP)),
    **{
        f"{family}{tower}": lambda family=family, shape=shape: Blip2ForConditionalGeneration(
            generation_config(family, shape)
        )
        for family in ("opt", "llama", "t5", "bart")
        for tower, shape in (("", VISION), (", clip", CLIP))
    },
}


def split_blocks(model: nn.Module, device_map: dict[str, object]) -> tuple[set[str], int]:
    """Blocks whose parameters lie on more than one device, and the number of devices used."""

    def device(parameter: str) -> object:
        prefixes = [name for name in device_map if not name or parameter == name or parameter.startswith(f"{name}.")]
        return device_map[max(prefixes, key=len)]

    blocks = {name: module for name, module in model.named_modules() if type(module).__name__ in BLOCKS}
    split = {
        name
        for name, module in blocks.items()
        if len({device(f"{name}.{parameter}") for parameter, _ in module.named_parameters()}) > 1
    }
    assert blocks
    return split, len({device(name) for name, _ in model.named_parameters()})


def maps(model: nn.Module, no_split: list[str]) -> list[dict[str, object]]:
    """Device maps for a first device of 5 % to 95 % of the model's size."""
    total = compute_module_sizes(model)[""]
    return [
        infer_auto_device_map(
            model, max_memory={"cpu": total * share // 20, "disk": 10 * total}, no_split_module_classes=no_split
        )
        for share in range(1, 20)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_no_block_is_split(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name]()
    model.tie_weights()
    found = [split_blocks(model, device_map) for device_map in maps(model, list(model._no_split_modules))]
    assert {2} <= {devices for _, devices in found}  # budgets at which the model is split at all
    assert not set().union(*(split for split, _ in found))
    careless = [split_blocks(model, device_map)[0] for device_map in maps(model, [])]
    assert set().union(*careless)  # negative control: without the list, blocks are split


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")  # `query_tokens`
@torch.no_grad()
def test_a_split_model_gives_the_same_scores(tmp_path) -> None:
    """Tower, Q-Former and heads on different devices, as `device_map` puts them (CPU memory and disk here)."""
    model = retrieval()
    ids = prompt_ids()[:, 4:]
    model.save_pretrained(tmp_path / "model")
    offloaded = {"vision_model", "qformer", "embeddings", "lm_head"}  # the last two share a matrix
    parts = {name.split(".")[0] for name, _ in model.named_parameters()}
    placed = Blip2ForImageTextRetrieval.from_pretrained(
        tmp_path / "model",
        device_map={part: "disk" if part in offloaded else "cpu" for part in sorted(parts)},
        offload_folder=tmp_path / "offload",
    )
    assert placed.vision_model.post_layernorm.weight.device.type == "meta"
    for matching in (False, True):
        expected = model(pixels(), ids, use_image_text_matching_head=matching).logits_per_image
        outputs = placed(pixels(), ids, use_image_text_matching_head=matching).logits_per_image
        torch.testing.assert_close(outputs, expected)
    features = model.vision_model.backbone(pixels()).last_hidden_state
    encoded = placed.encode_image(vision_features=features)
    torch.testing.assert_close(encoded.query_output, model.encode_image(pixels()).query_output)
