"""Folders of tiny random backbones for stage 1: BERTs and vision towers, as `transformers` writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
)

from tiny_models import VISION, randomised
from tiny_tokenizers import tiny_bert_tokenizer

BERT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.3,
    "layer_norm_eps": 1e-6,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
BERT_CLASSES = {"BertModel": BertModel, "BertForMaskedLM": BertForMaskedLM, "BertForPreTraining": BertForPreTraining}


def bert(kind: str = "BertForPreTraining", **fields: object) -> PreTrainedModel:
    config = BertConfig(vocab_size=len(tiny_bert_tokenizer(decoder_start=False)), **{**BERT, **fields})
    return randomised(BERT_CLASSES[kind](config))


def save_bert(folder: Path, model: PreTrainedModel, decoder_start: bool = False, **options: object) -> str:
    """The model and its tokenizer; returns the folder's name."""
    model.save_pretrained(folder, **options)
    tiny_bert_tokenizer(decoder_start).save_pretrained(folder)
    return str(folder)


def two_tower(name: str) -> PreTrainedModel:
    if name == "clip":
        return randomised(CLIPModel(CLIPConfig(vision_config=TOWER, text_config=TEXT, projection_dim=8)))
    return randomised(SiglipModel(SiglipConfig(vision_config=TOWER, text_config=TEXT)))


def tower_model(name: str) -> PreTrainedModel:
    """A whole checkpoint: "clip" and "siglip" (two towers), "clip_vision", "dinov2"."""
    if name == "dinov2":
        config = Dinov2Config(**{**TOWER, "mlp_ratio": 2, "intermediate_size": None})
        return randomised(Dinov2Model(config))
    if name == "clip_vision":
        return randomised(CLIPVisionModel(two_tower("clip").config.vision_config))
    return two_tower(name)


def random_tower() -> dict:
    return {**VISION, "num_hidden_layers": 1}


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)
