"""Fixtures of the original code (`tests/fixtures/README.md`) and our model with its weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from blip2_hf.configuration import Blip2Config
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from conversion.lavis import to_ours

FIXTURES = Path(__file__).parent / "fixtures"
QUERIES = 8


@cache
def fixture(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"lavis_{name}.safetensors")


def original_state_dict() -> dict[str, torch.Tensor]:
    prefix = "state_dict/"
    return {k.removeprefix(prefix): v for k, v in fixture("stage1_tiny").items() if k.startswith(prefix)}


def model_with_original_weights(**overrides: object) -> Blip2ForImageTextRetrieval:
    """Our retrieval model with the weights of the fixtures, in evaluation mode; `overrides` are config fields."""
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
            "eos_token_id": 3,
        },
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
        vision_layernorm_eps=1e-5,
        **overrides,
    )
    model = Blip2ForImageTextRetrieval(config)
    model.load_state_dict(to_ours(original_state_dict()))
    return model.eval()
