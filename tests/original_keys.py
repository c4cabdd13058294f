"""Names and shapes of the original project's full-size files, on the meta device: nothing is allocated.

Stage 1 is `fixtures/lavis_stage1_keys.tsv`, written by the original code. The other files are put together from it, and
from its code: a stage-2 file is a stage-1 file without what only texts use (compared at small size with the original's
own in `test_full_size.py`), the towers' own files have one block more and what stands behind it.
"""

from __future__ import annotations

import csv
import re
from functools import cache

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from blip2_hf.checkpoints import CHECKPOINTS
from blip2_hf.configuration import Blip2Config
from conversion.configs import original_vocabulary, target_of
from conversion.steps import Target, TensorInfo
from lavis_names import FIXTURES

StateDict = dict[str, torch.Tensor]
Infos = dict[str, TensorInfo]

# What only texts use, and so stage 2 lacks.
_TEXT_ONLY = re.compile(
    r"temp|(vision_proj|text_proj|itm_head)\..*|Qformer\.cls\..*|Qformer\.bert\.embeddings\.(word|position)_embeddings\..*"
    r"|Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*"
)


@cache
def target(name: str) -> Target:
    """What our model of a released checkpoint has."""
    return target_of(Blip2Config.for_checkpoint(name), CHECKPOINTS[name].kind)


@cache
def stage_1(*, in_file: bool = False) -> StateDict:
    """The original's stage-1 state dict with ViT-g; `in_file`: what its checkpoint file holds."""
    found = {}
    with open(FIXTURES / "lavis_stage1_keys.tsv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            layers = [0] if row["layers"] == "-" else range(*map(int, row["layers"].split(":")))
            shape = () if row["shape"] == "-" else tuple(map(int, row["shape"].split("x")))
            for n in layers:
                if row["in_file"] == "yes" or not in_file:
                    found[row["name"].replace("{n}", str(n))] = _meta(shape, getattr(torch, row["dtype"]))
    return found


def in_original_file(name: str) -> bool:
    """Whether the original writes this tensor of a stage-2 model whose tower and language model are frozen."""
    kept = ("opt_model.lm_head.", "t5_model.encoder.embed_tokens.", "t5_model.decoder.embed_tokens.")
    return name.startswith(kept) or not name.startswith(("visual_encoder.", "opt_model.", "t5_model."))


def without_text(stage_1_keys: StateDict) -> StateDict:
    return {name: tensor for name, tensor in stage_1_keys.items() if not _TEXT_ONLY.fullmatch(name)}


def eva_file() -> StateDict:
    """`eva_vit_g.pth`: float16, 40 blocks, last norm and projection."""
    prefix = "visual_encoder."
    tower = {name.removeprefix(prefix): t for name, t in stage_1().items() if name.startswith(prefix)}
    last = {name.replace("blocks.38.", "blocks.39."): t for name, t in tower.items() if name.startswith("blocks.38.")}
    behind = {"norm.weight": (1408,), "norm.bias": (1408,), "head.weight": (1024, 1408), "head.bias": (1024,)}
    whole = {name: tuple(tensor.shape) for name, tensor in (tower | last).items()} | behind
    return {name: _meta(shape, torch.float16) for name, shape in whole.items()}


def clip_shapes(layers: int, width: int = 1024, side: int = 16, patch: int = 14) -> dict[str, tuple[int, ...]]:
    """Names of `clip_vit.py` of the original project."""
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": (side * side + 1, width),
        "conv1.weight": (width, 3, patch, patch),
        "ln_pre.weight": (width,),
        "ln_pre.bias": (width,),
    }
    for n in range(layers):
        block = {
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width),
            "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width),
            "mlp.c_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
        }
        shapes |= {f"transformer.resblocks.{n}.{name}": shape for name, shape in block.items()}
    return shapes


def clip_file() -> StateDict:
    """`clip_vit_L.pth`: float16, 24 blocks, last norm and projection."""
    behind = {"ln_post.weight": (1024,), "ln_post.bias": (1024,), "proj": (1024, 768)}
    return {name: _meta(shape, torch.float16) for name, shape in (clip_shapes(24) | behind).items()}


def language_folder(config: Blip2Config) -> StateDict:
    """The files of the language model in its own folder, which hold a tied tensor once."""
    text = config.text_config.__class__.from_dict(config.text_config.to_dict())
    text.vocab_size = original_vocabulary(config)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(text)
    tied = {name for name in model.all_tied_weights_keys if not (text.model_type == "t5" and name == "lm_head.weight")}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def original_file(name: str) -> StateDict:
    """The original's file of a released checkpoint: with its tower where that was trained, too."""
    entry = CHECKPOINTS[name]
    fine_tuned = entry.image_size == 364
    found = dict(stage_1() if fine_tuned else stage_1(in_file=True))
    if fine_tuned:
        found["visual_encoder.pos_embed"] = _meta((1, 26 * 26 + 1, 1408))
    if entry.tower == "clip_vit_l":
        found = {key: _meta([1024 if n == 1408 else n for n in t.shape], t.dtype) for key, t in found.items()}
    if entry.kind == "retrieval":
        return found
    text = Blip2Config.for_checkpoint(name).text_config
    words = (original_vocabulary(Blip2Config.for_checkpoint(name)), text.hidden_size)
    language = text.model_type
    again = ["lm_head"] if language == "opt" else ["encoder.embed_tokens", "decoder.embed_tokens"]
    dtype = getattr(torch, entry.language_dtype)
    return {
        **without_text(found),
        **{f"{language}_model.{module}.weight": _meta(words, dtype) for module in again},
        f"{language}_proj.weight": _meta((text.hidden_size, 768)),
        f"{language}_proj.bias": _meta((text.hidden_size,)),
    }


def infos(state_dict: StateDict, source: str | None = None) -> Infos:
    """Shapes and dtypes by name; with `source` in the names as a plan needs them."""
    prefix = "" if source is None else f"{source}:"
    return {prefix + name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state_dict.items()}


def _meta(shape, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")
