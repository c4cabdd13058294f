"""Files as the original project has them, from the fixtures of its code: checkpoints, tower, language model, BERT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.models.bert.tokenization_bert import BertTokenizer
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from lavis_names import (
    QFORMER,
    QUERIES,
    SECOND_NAMES,
    STAGE_1_QFORMER,
    VISION,
    original_state_dict,
    stage_2_state_dict,
)
from tiny_tokenizers import WORDS

TOWER = "visual_encoder."
OPT = {
    "model_type": "opt",
    "vocab_size": 260,
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 107,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",  # exact, where Flan-T5's own is the tanh approximation
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
LANGUAGE = {"opt": OPT, "t5": T5}

StateDict = dict[str, torch.Tensor]


def whole(stage: str) -> StateDict:
    """State dict of the whole model; `stage`: "itm" (stage 1), "opt" or "t5" (stage 2)."""
    return original_state_dict() if stage == "itm" else stage_2_state_dict(stage)


def stored(stage: str, with_tower: bool = False) -> StateDict:
    """What the original's runner stores of it."""
    frozen = () if with_tower else (TOWER,)
    kept = SECOND_NAMES.get(stage, ())
    return {
        name: tensor
        for name, tensor in whole(stage).items()
        if not name.startswith((*frozen, "opt_model.", "t5_model.")) or name in kept
    }


def save_stored(path: Path, stage: str, with_tower: bool = False, **beside: object) -> Path:
    torch.save({"model": stored(stage, with_tower), **beside}, path)
    return path


def save_tower(path: Path, stage: str) -> Path:
    """A stand-in for `eva_vit_g.pth`: one block more than is used, and what stands behind the blocks."""
    tensors = {name.removeprefix(TOWER): t for name, t in whole(stage).items() if name.startswith(TOWER)}
    last = {n.replace("blocks.1.", "blocks.2."): t + 1 for n, t in tensors.items() if n.startswith("blocks.1.")}
    behind = {"norm.weight": torch.ones(40), "norm.bias": torch.ones(40), "head.weight": torch.ones(5, 40)}
    torch.save({**tensors, **last, **behind}, path)
    return path


def save_language_folder(folder: Path, family: str) -> Path:
    """The language model in its own folder, as `transformers` writes it, with a tokenizer."""
    prefix = f"{family}_model."
    tensors = {n.removeprefix(prefix): t.contiguous() for n, t in whole(family).items() if n.startswith(prefix)}
    for name in SECOND_NAMES[family]:
        del tensors[name.removeprefix(prefix)]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LANGUAGE[family]))
    {"opt": opt_tokenizer, "t5": t5_tokenizer}[family]().save_pretrained(folder)
    return folder


def save_bert_folder(folder: Path) -> Path:
    """BERT's tokenizer without `[DEC]`, which then is the last of the Q-Former's 130 tokens."""
    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters), "?", "."]
    tokens += [word for word in WORDS if word not in tokens]
    BertTokenizer(vocab={token: n for n, token in enumerate(tokens[:129])}).save_pretrained(folder)
    return folder


def save_config(path: Path, stage: str, image_token: int | None = None, **text: object) -> Path:
    """What `--config` needs for these sizes."""
    config = {"model_type": "blip-2", "vision_config": VISION, "num_query_tokens": QUERIES}
    config["vision_layernorm_eps"] = 1e-5
    if stage == "itm":
        config |= {"qformer_config": STAGE_1_QFORMER, "image_text_hidden_size": 16}
    else:
        config |= {"qformer_config": QFORMER, "text_config": {**LANGUAGE[stage], **text}}
        config["image_token_index"] = image_token
    path.write_text(json.dumps(config))
    return path


def opt_tokenizer() -> GPT2Tokenizer:
    """250 byte-level tokens, so that the placeholder is number 250; "\\n" is one of them."""
    newline, space = "Ċ", "Ġ"
    letters = [chr(code) for code in range(33, 127)]
    specials = ["<s>", "<pad>", "</s>", "<unk>", newline, space]
    spare = [f"<spare{n}>" for n in range(250 - len(specials) - len(letters))]
    vocab = {token: n for n, token in enumerate([*specials, *letters, *spare])}
    roles = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return GPT2Tokenizer(vocab=vocab, merges=[], add_bos_token=True, model_max_length=128, **roles)


def t5_tokenizer() -> T5Tokenizer:
    """100 pieces, so that the placeholder is number 100."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(chr(code), -8.0) for code in range(33, 127)]
    pieces += [("▁a", -4.0), ("▁photo", -4.0)]
    assert len(pieces) == 100
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=128)
