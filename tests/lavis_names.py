"""Fixtures of the original code (`tests/fixtures/README.md`), its parameter names, and our model with its weights."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from blip2_hf.configuration import Blip2Config
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval

FIXTURES = Path(__file__).parent / "fixtures"
QUERIES = 8

# Original name -> ours, as regular expressions; the first that matches counts, and every key must match one.
RENAMES = {
    r"^query_tokens$": "query_tokens",
    r"^ln_vision\.": "vision_model.post_layernorm.",
    r"^visual_encoder\.cls_token$": "vision_model.embeddings.class_embedding",
    r"^visual_encoder\.pos_embed$": "vision_model.embeddings.position_embedding",
    r"^visual_encoder\.patch_embed\.proj\.": "vision_model.embeddings.patch_embedding.",
    r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.": r"vision_model.encoder.layers.\1.self_attn.projection.",
    r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.": r"vision_model.encoder.layers.\1.self_attn.qkv.",
    r"^visual_encoder\.blocks\.(\d+)\.norm(\d)\.": r"vision_model.encoder.layers.\1.layer_norm\2.",
    r"^visual_encoder\.blocks\.(\d+)\.mlp\.": r"vision_model.encoder.layers.\1.mlp.",
    r"^Qformer\.bert\.embeddings\.LayerNorm\.": "qformer.layernorm.",
    r"^Qformer\.bert\.embeddings\.(word|position)_embeddings\.": r"embeddings.\1_embeddings.",
    r"^Qformer\.bert\.encoder\.layer\.(\d+\.\w+)\.self\.": r"qformer.encoder.layer.\1.attention.",
    r"^Qformer\.bert\.encoder\.layer\.": "qformer.encoder.layer.",
    r"^vision_proj\.": "vision_projection.",
    r"^text_proj\.": "text_projection.",
    r"^itm_head\.": "itm_head.",
}
# What scoring does not need: the captioning head, the temperature, a buffer.
DROPPED = (r"^Qformer\.cls\.", r"^temp$", r"\.position_ids$")
# Two vectors that are one in ours, with zeros for the keys between them.
QUERY_BIAS = re.compile(r"^visual_encoder\.blocks\.(\d+)\.attn\.q_bias$")


def to_ours(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of the original code under our names."""
    renamed = {}
    for name, tensor in original.items():
        if any(re.search(pattern, name) for pattern in DROPPED) or name.endswith(".v_bias"):
            continue
        if match := QUERY_BIAS.match(name):
            value = original[name.replace("q_bias", "v_bias")]
            renamed[f"vision_model.encoder.layers.{match[1]}.self_attn.qkv.bias"] = torch.cat(
                [tensor, torch.zeros_like(value), value]
            )
            continue
        pattern = next(pattern for pattern in RENAMES if re.search(pattern, name))
        renamed[re.sub(pattern, RENAMES[pattern], name)] = tensor
    return renamed


@cache
def fixture(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"lavis_{name}.safetensors")


def original_state_dict() -> dict[str, torch.Tensor]:
    prefix = "state_dict/"
    return {k.removeprefix(prefix): v for k, v in fixture("stage1_tiny").items() if k.startswith(prefix)}


def model_with_original_weights() -> Blip2ForImageTextRetrieval:
    """Our retrieval model with the weights of the fixtures, in evaluation mode."""
    config = Blip2Config(
        vision_config={
            "hidden_size": 40,
            "intermediate_size": 174,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        qformer_config={
            "vocab_size": 130,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 48,
            "use_qformer_text_input": True,
        },
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
        vision_layernorm_eps=1e-5,
    )
    model = Blip2ForImageTextRetrieval(config)
    model.load_state_dict(to_ours(original_state_dict()))
    return model.eval()
