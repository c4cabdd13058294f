"""What `stage2_step.py` runs: our stage-2 model, `transformers`' with the same parameters, and a batch for both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import transformers
from stage1_step import CAPTION_LENGTHS
from torch import nn

import blip2_hf
from blip2_hf.checkpoints import CHECKPOINTS

SIZES = ("small", "reduced", "full")
FIRST_WORD = 1000
_VISION = {
    "small": {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2},
    "reduced": {"hidden_size": 704, "intermediate_size": 3072, "num_attention_heads": 8, "num_hidden_layers": 8},
}
_QFORMER = {"small": {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 192}}
_OPT = {
    "small": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_attention_heads": 4}
    | {"num_hidden_layers": 2},
    "reduced": {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_attention_heads": 12}
    | {"num_hidden_layers": 8},
}
_T5 = {
    "small": {"d_model": 64, "d_kv": 16, "d_ff": 160, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2},
    "reduced": {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_heads": 12, "num_layers": 5, "num_decoder_layers": 5},
}


def config_of(name: str, size: str) -> blip2_hf.Blip2Config:
    """Of the released checkpoint; smaller towers and language models keep images, vocabularies and 32 queries.

    Raises:
        SystemExit: for a name that is no stage-2 checkpoint.
    """
    if name not in CHECKPOINTS or CHECKPOINTS[name].kind != "generation":
        known = [key for key, entry in CHECKPOINTS.items() if entry.kind == "generation"]
        raise SystemExit(f"--models must be among {', '.join(known)}; got {name}")
    config = blip2_hf.Blip2Config.for_checkpoint(name)
    language = _T5 if config.is_encoder_decoder else _OPT
    changes = (
        (config.vision_config, _VISION),
        (config.qformer_config, _QFORMER),
        (config.text_config, language),
    )
    for part, fields in changes:
        for field, value in fields.get(size, {}).items():
            setattr(part, field, value)
    config.qformer_config.encoder_hidden_size = config.vision_config.hidden_size
    return config


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def ours(config: blip2_hf.Blip2Config, device: str, dtype: torch.dtype) -> blip2_hf.Blip2ForConditionalGeneration:
    """Random weights drawn on the device; frozen parts in `dtype`, what is trained in float32; no dropout."""
    with _default_dtype(dtype), torch.device(device):
        model = blip2_hf.Blip2ForConditionalGeneration(config)
    model.freeze_vision()
    model.freeze_language_model()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if parameter.ndim > 1:  # as much variance as comes in, so that small models pass on as much as large ones
            parameter.normal_(std=min(0.02, parameter.shape[-1] ** -0.5), generator=generator)
        else:
            parameter.fill_(float("norm" in name.lower() and name.endswith("weight")))
    return model.eval()


def theirs(model: blip2_hf.Blip2ForConditionalGeneration) -> transformers.Blip2ForConditionalGeneration:
    """`transformers`' class around the very same parameter objects, of which the frozen ones need no gradient."""
    with torch.device("meta"):
        peer = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config.from_dict(model.config.to_dict()))
    if any(True for _ in peer.buffers()):
        raise SystemExit("transformers' model has buffers, which this benchmark does not fill")
    adopt(peer, model)
    return peer.eval()


def adopt(model: nn.Module, source: nn.Module) -> None:
    """Gives `model` the very same parameter objects as `source`.

    Raises:
        SystemExit: if one has a parameter that the other lacks.
    """
    parameters = dict(source.named_parameters(remove_duplicate=False))
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        owner, _, last = name.rpartition(".")
        if name not in parameters:
            raise SystemExit(f"{type(source).__module__}'s model lacks {name}")
        setattr(model.get_submodule(owner), last, parameters.pop(name))
    if parameters:
        raise SystemExit(f"{type(model).__module__}'s model lacks {sorted(parameters)}")


def parts(model: nn.Module) -> tuple[nn.Module, ...]:
    """Those that have an attention implementation of their own."""
    return model.vision_model, model.qformer, model.language_model


def batch_of(config: blip2_hf.Blip2Config, rows: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random pictures, and captions of `CAPTION_LENGTHS` words padded on the right, as a collator gives them.

    Decoder-only: placeholders, BOS, caption with its end token, all of the caption a target. Encoder-decoder:
    placeholders and `</s>` for the encoder, the caption for the decoder (the original's released recipe).
    """
    size = config.vision_config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(rows, 3, size, size, generator=generator).to(dtype)
    lengths = torch.tensor([CAPTION_LENGTHS[row % len(CAPTION_LENGTHS)] for row in range(rows)])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    words = torch.randint(FIRST_WORD, 30_000, mask.shape, generator=generator)
    image = torch.full((rows, config.num_query_tokens), config.image_token_index or 0)
    ignored = torch.full_like(image, -100)
    text = config.text_config
    if config.is_encoder_decoder:
        ids = torch.cat([image, torch.full((rows, 1), text.eos_token_id)], dim=1)
        attention, labels = torch.ones_like(ids), words.masked_fill(mask == 0, -100)
    else:
        start = torch.full((rows, 1), text.bos_token_id)
        ids = torch.cat([image, start, words.masked_fill(mask == 0, text.pad_token_id)], dim=1)
        attention = torch.cat([torch.ones_like(image), torch.ones_like(start), mask], dim=1)
        labels = torch.cat([ignored, ignored[:, :1], words.masked_fill(mask == 0, -100)], dim=1)
    if config.image_token_index is None:  # this model puts the images first by itself
        ids, attention = ids[:, image.shape[1] :], attention[:, image.shape[1] :]
        labels = labels if config.is_encoder_decoder else labels[:, image.shape[1] :]
    batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": attention, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}
