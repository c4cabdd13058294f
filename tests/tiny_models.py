"""Tiny random models of every kind, ours and `transformers`', for tests."""

from __future__ import annotations

import torch
from transformers import (
    BartConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

VOCAB = 300
IMAGE_TOKEN = 299
QUERIES = 4
IMAGE_SIZE = 28

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 14,
    "initializer_range": 0.2,
}
QFORMER = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def text_config(family: str):
    """A tiny language model config: "opt", "llama", "t5" or "bart"."""
    if family == "opt":
        return OPTConfig(
            vocab_size=VOCAB,
            ffn_dim=64,
            word_embed_proj_dim=32,
            max_position_embeddings=128,
            init_std=0.2,
            dropout=0.0,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
            **SHAPE,
        )
    if family == "llama":
        return LlamaConfig(
            vocab_size=VOCAB,
            intermediate_size=64,
            num_key_value_heads=2,
            initializer_range=0.2,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
            **SHAPE,
        )
    if family == "t5":
        return T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            initializer_factor=2.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=3,
            decoder_start_token_id=0,
        )
    if family == "bart":
        return BartConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=128,
            init_std=0.2,
            dropout=0.0,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=3,
            forced_eos_token_id=None,
        )
    raise ValueError(f"unknown family {family!r}")


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter drawn anew, so that no bias is 0, no norm is 1 and the queries differ; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and ("norm" in name.lower() and name.endswith("weight")):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()


def peer_config(family: str) -> Blip2Config:
    return Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=text_config(family).to_dict(),
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
        image_token_index=IMAGE_TOKEN,
    )


def peer_generation(family: str) -> Blip2ForConditionalGeneration:
    """`transformers`' generation model with random weights."""
    torch.manual_seed(0)
    return randomised(Blip2ForConditionalGeneration(peer_config(family)))


def peer_retrieval() -> Blip2ForImageTextRetrieval:
    """`transformers`' retrieval model with random weights."""
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**QFORMER, "use_qformer_text_input": True},
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
    )
    return randomised(Blip2ForImageTextRetrieval(config))


def peer_instructblip(family: str) -> InstructBlipForConditionalGeneration:
    """`transformers`' InstructBLIP with random weights."""
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=text_config(family).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    return randomised(InstructBlipForConditionalGeneration(config))


def pixels(images: int = 2, size: int = IMAGE_SIZE, seed: int = 1) -> torch.Tensor:
    """Random normalised images [images, 3, size, size]."""
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(seed))


def prompt_ids(rows: int = 2, length: int = 5, seed: int = 2) -> torch.Tensor:
    """Image placeholders, BOS and `length` random tokens: [rows, QUERIES + 1 + length]."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(10, 290, (rows, length), generator=generator)
    image = torch.full((rows, QUERIES), IMAGE_TOKEN)
    return torch.cat([image, torch.full((rows, 1), 2), text], dim=1)
