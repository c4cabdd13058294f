"""Tiny language models of a dozen words, which end at any step, and random settings of beam search for them."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import transformers

WORDS = 12
_SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
_WIDTHS = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
_BART = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}
_OPT = {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
_GPT_NEO = {"vocab_size": WORDS, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}
_GPT2 = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}

CONFIGS = {
    "opt": lambda: transformers.OPTConfig(**{**_WIDTHS, **_OPT}, **_SPECIAL),
    "llama": lambda: transformers.LlamaConfig(**_WIDTHS, **_SPECIAL),
    "qwen2": lambda: transformers.Qwen2Config(**_WIDTHS, **_SPECIAL),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2, **_SPECIAL),
    "bloom": lambda: transformers.BloomConfig(vocab_size=WORDS, hidden_size=16, n_layer=1, n_head=2, **_SPECIAL),
    "mistral": lambda: transformers.MistralConfig(**_WIDTHS, **_SPECIAL, sliding_window=3),
    "t5": lambda: transformers.T5Config(**_T5, eos_token_id=3, decoder_start_token_id=0, tie_word_embeddings=False),
    "mt5": lambda: transformers.MT5Config(**_T5, eos_token_id=3, decoder_start_token_id=0),
    "bart": lambda: transformers.BartConfig(**_BART, **_SPECIAL, decoder_start_token_id=3),
}
_T5GEMMA = {**_WIDTHS, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 4, "eos_token_id": 3}
_TOWER = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 14}
# Attention of their own: over the places of keys, to a number of keys, of two kinds of keys at once.
OTHERS = {
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **_GPT_NEO, **_SPECIAL, attention_types=[[["local"], 1]], window_size=4, max_position_embeddings=12
    ),
    "doge": lambda: transformers.DogeConfig(**_WIDTHS, **_SPECIAL, keep_window_size=8),
    "t5gemma2": lambda: transformers.T5Gemma2Config(
        encoder={"text_config": dict(_T5GEMMA), "vision_config": _TOWER, "vocab_size": WORDS},
        decoder=dict(_T5GEMMA),
        dropout_rate=0.0,
        decoder_start_token_id=2,
    ),
}
SEQ2SEQ = ("t5", "mt5", "bart", "t5gemma2")
# What else a call may ask for: each keeps a search from being the plain one in its own way.
FURTHER: dict[str, dict[str, Any]] = {
    "nothing": {},
    "repetition": {"repetition_penalty": 1.5},
    "less than none": {"repetition_penalty": 0.7},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[4], [6, 7]]},
    "allowed": {"prefix_allowed_tokens_fn": lambda row, ids: [3, 4 + row, 9]},
    "bias": {"sequence_bias": {(8,): 3.0}},
    "bias, normalised": {"sequence_bias": {(8,): 3.0}, "renormalize_logits": True},
    "forced end": {"forced_eos_token_id": 3},
    "decay": {"exponential_decay_length_penalty": (2, 1.5)},
    "suppressed": {"suppress_tokens": [4], "begin_suppress_tokens": [3]},
    "two ends": {"eos_token_id": [3, 5]},
    "several": {"num_return_sequences": 2},
}


def language_model(family: str, seed: int = 0, scale: float = 0.5) -> transformers.PreTrainedModel:
    """With random weights: the larger `scale`, the more certain of its words."""
    config = (CONFIGS | OTHERS)[family]()
    auto = transformers.AutoModelForSeq2SeqLM if family in SEQ2SEQ else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + float(is_norm))
    return model.eval()


def ends_with(model: transformers.PreTrainedModel, probability: float) -> transformers.PreTrainedModel:
    """The model, which ends with this probability at each step: so that some beams end while others go on."""

    def end(module, args, outputs) -> None:
        others = outputs.logits.clone()
        others[..., 3] = -float("inf")
        outputs.logits[..., 3] = others.logsumexp(dim=-1) + math.log(probability / (1 - probability))

    model.register_forward_hook(end)
    return model


def prompts(family: str, rows: int, length: int, seed: int = 0, ragged: bool = True) -> dict[str, torch.Tensor]:
    """Random prompts, padded on the side that `transformers` wants."""
    numbers = random.Random(seed)
    ids = torch.tensor([[numbers.randint(4, WORDS - 1) for _ in range(length)] for _ in range(rows)])
    mask = torch.ones_like(ids)
    for row in mask:
        padding = numbers.randint(0, length - 1) if ragged else 0
        row[length - padding : length] = 0
    return {"input_ids": ids, "attention_mask": mask if family in SEQ2SEQ else mask.flip(1)}


def random_search(family: str, seed: int) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
    """A model, and arguments of `generate`."""
    numbers = random.Random(f"{family} {seed}")
    model = language_model(family, seed, numbers.choice([0.1, 0.2, 0.3, 0.5, 0.8, 1.2]))
    if numbers.random() < 0.6:
        ends_with(model, numbers.choice([0.1, 0.3, 0.5, 0.7]))
    new = numbers.choice([1, 2, 3, 5, 8, 14])
    options: dict[str, Any] = {
        **prompts(family, numbers.randint(1, 4), numbers.randint(1, 6), seed, ragged=numbers.random() < 0.6),
        "num_beams": numbers.randint(2, 5),
        "max_new_tokens": new,
        "min_new_tokens": numbers.choice([None, None, None, numbers.randint(1, new)]),
        "length_penalty": numbers.choice([-2.0, -1.0, -1.0, -0.5, 0.0, 0.0, 1.0, 2.0]),
        "early_stopping": numbers.choice([False, False, True, "never"]),
        **FURTHER[numbers.choice(["nothing"] * 8 + list(FURTHER))],
    }
    return model, options
