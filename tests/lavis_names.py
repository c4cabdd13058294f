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
VISION = {
    "model_type": "blip_2_vision_model",
    "hidden_size": 40,
    "intermediate_size": 174,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
STAGE_1_QFORMER = {**QFORMER, "vocab_size": 130, "use_qformer_text_input": True, "eos_token_id": 3}
# Word embeddings of a language model, and their other names in the original's files.
WORDS_OF = {"opt": "opt_model.model.decoder.embed_tokens.weight", "t5": "t5_model.shared.weight"}
SECOND_NAMES = {
    "opt": ("opt_model.lm_head.weight",),
    "t5": ("t5_model.encoder.embed_tokens.weight", "t5_model.decoder.embed_tokens.weight"),
}


@cache
def fixture(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"lavis_{name}.safetensors")


def original_state_dict() -> dict[str, torch.Tensor]:
    prefix = "state_dict/"
    return {k.removeprefix(prefix): v for k, v in fixture("stage1_tiny").items() if k.startswith(prefix)}


def stage_2_state_dict(language: str) -> dict[str, torch.Tensor]:
    """The original's whole stage-2 model with "opt" or "t5": the fixture, and what was cut from it when it was stored
    (second names of tied tensors, and a buffer)."""
    prefix = "state_dict/"
    tensors = {k.removeprefix(prefix): v for k, v in fixture(f"stage2_{language}_tiny").items() if k.startswith(prefix)}
    buffer = "Qformer.bert.embeddings.position_ids"
    second = dict.fromkeys(SECOND_NAMES[language], tensors[WORDS_OF[language]])
    return tensors | second | {buffer: original_state_dict()[buffer]}


def model_with_original_weights(**overrides: object) -> Blip2ForImageTextRetrieval:
    """Our retrieval model with the weights of the fixtures, in evaluation mode; `overrides` are config fields."""
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=STAGE_1_QFORMER,
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
        vision_layernorm_eps=1e-5,
        **overrides,
    )
    model = Blip2ForImageTextRetrieval(config)
    model.load_state_dict(to_ours(original_state_dict()))
    return model.eval()
