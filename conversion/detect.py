"""What a set of tensors is: told from their names and shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from blip2_hf.checkpoints import CHECKPOINTS, Checkpoint, checkpoint_config

from .rows import listed
from .steps import TensorInfo
from .tower_tables import IN_MODEL

Kind = Literal[
    "lavis_stage1",  # the original's `Blip2Qformer`, with or without its tower
    "lavis_stage2",  # the original's `Blip2OPT` or `Blip2T5`, with or without its frozen parts
    "tower_eva",  # the EVA-CLIP tower alone, under the original's names (eva_vit_g.pth)
    "tower_clip",  # the CLIP tower alone, under the original's names (clip_vit_L.pth)
    "tower_clip_folder",  # a CLIP of `transformers`, whole or the tower alone
    "ours",  # a BLIP-2 with what only ours has: temperature, question-conditioned embeddings, another tower
    "transformers",  # a BLIP-2 as `transformers` has it, too
    "instructblip",  # an InstructBLIP of `transformers`
    "language_model",  # a language model alone, as `transformers` has it
]
# Tensors by which a language model of `transformers` is known: of its embeddings, and of its family.
_WORDS = {
    "opt": "model.decoder.embed_tokens.weight",
    "t5": "shared.weight",
    "llama": "model.embed_tokens.weight",
}
_BERT_WIDTH = 768  # of every released Q-Former


@dataclass(frozen=True)
class Detected:
    """What a file or folder holds.

    Attributes:
        kind: see `Kind`.
        model: "retrieval" or "generation"; None for a part alone.
        tower: "eva" or "clip", which the model was trained with (also if it does not hold it); None: unknown, another.
        language: "opt", "t5", "llama" (any other decoder with its names); None: without language model or unknown.
        language_width: width of the language model's embeddings.
        vocabulary: rows of its embeddings, where they are there.
        image_size: side in pixels that the tower's positions are for; None without a tower.
        has_tower, has_language: whether the tower's and the language model's own weights are there.
        checkpoint: short name of the released checkpoint that this is; None: none of them, or it is not clear.
        candidates: released checkpoints of these names and shapes; more than one where they differ in nothing else.
    """

    kind: Kind
    model: Literal["retrieval", "generation"] | None = None
    tower: Literal["eva", "clip"] | None = None
    language: str | None = None
    language_width: int | None = None
    vocabulary: int | None = None
    image_size: int | None = None
    has_tower: bool = False
    has_language: bool = False
    checkpoint: str | None = None
    candidates: tuple[str, ...] = ()


def detect(infos: Mapping[str, TensorInfo], model: str | None = None, file_name: str | None = None) -> Detected:
    """What the tensors of one file or folder are.

    Args:
        infos: shape and dtype by name (without a source before it).
        model: short name of the released checkpoint that it is, if the caller knows (`--model`).
        file_name: of the file; a file of the original project is told by it from others of the same shapes.

    Raises:
        ValueError: if it is nothing that is known, for an unknown `model` or one of other shapes.
    """
    kind = _kind(infos)
    if kind in ("tower_eva", "tower_clip", "tower_clip_folder"):
        tower = "eva" if kind == "tower_eva" else "clip"
        found = Detected(kind, tower=tower, has_tower=True, image_size=_image_size(infos))
    elif kind == "language_model":
        language, words = _language(infos, "")
        found = Detected(kind, language=language, has_language=True, **_sizes(words))
    elif kind.startswith("lavis"):
        found = _original(kind, infos)
    else:
        found = _folder(kind, infos)
    return _named(found, infos, model, file_name)


def require_checkpoint(found: Detected) -> str:
    """The released checkpoint that `found` is.

    Raises:
        ValueError: if it could be several, naming them, or if it is none.
    """
    if found.checkpoint is not None:
        return found.checkpoint
    if found.candidates:
        raise ValueError(
            f"the tensors are those of {' and '.join(found.candidates)}, which differ in the image size or the "
            "training only: say which it is with `--model NAME`"
        )
    raise ValueError(
        "the tensors are those of no released checkpoint: give the shapes with `--config FILE`, or the name of the "
        "checkpoint it was trained from with `--model NAME`"
    )


def _kind(infos: Mapping[str, TensorInfo]) -> Kind:
    if any(name.startswith(("Qformer.", "opt_proj.", "t5_proj.")) for name in infos):
        if any(name.startswith("llm_proj.") for name in infos):
            raise ValueError(
                "these are the names of an InstructBLIP of the original project; convert that of `transformers` "
                "(Salesforce/instructblip-…), which has the same weights"
            )
        stage_2 = any(name.startswith(("opt_proj.", "t5_proj.", "opt_model.", "t5_model.")) for name in infos)
        return "lavis_stage2" if stage_2 else "lavis_stage1"
    if "query_tokens" in infos and any(name.startswith("qformer.") for name in infos):
        if any(name.startswith("qformer.embeddings.") for name in infos):
            return "instructblip"
        generation = any(name.startswith("language_projection.") for name in infos)
        ours = "temperature" in infos or any(name.startswith(("lm_head.", "vision_model.tower.")) for name in infos)
        question = generation and any(name.startswith("embeddings.") for name in infos)
        return "ours" if ours or question else "transformers"
    if {"cls_token", "pos_embed", "blocks.0.attn.qkv.weight"} <= infos.keys():
        return "tower_eva"
    if {"class_embedding", "positional_embedding", "conv1.weight"} <= infos.keys():
        return "tower_clip"
    if any(re.match(r"(vision_model\.)?pre_layrnorm\.", name) for name in infos):
        return "tower_clip_folder"
    if _language(infos, "")[0] is not None:
        return "language_model"
    names = sorted(infos)
    raise ValueError(
        f"these {len(names)} tensors are no BLIP-2, no tower and no language model that is known: {listed(names[:8])}"
        f"{', …' if len(names) > 8 else ''}"
    )


def _original(kind: Kind, infos: Mapping[str, TensorInfo]) -> Detected:
    bare = {name.removeprefix(IN_MODEL): info for name, info in infos.items() if name.startswith(IN_MODEL)}
    tower = _tower_of_features(infos, "Qformer.bert.encoder.layer.0.crossattention.self.key.weight")
    if bare:
        tower = "clip" if "conv1.weight" in bare else "eva"
    size = _image_size(bare)
    if kind == "lavis_stage1":
        return Detected(kind, "retrieval", tower, image_size=size, has_tower=bool(bare))
    languages = [name for name in ("opt", "t5") if any(key.startswith(f"{name}_") for key in infos)]
    if len(languages) != 1:
        raise ValueError(f"a checkpoint has one language model, got names of {' and '.join(languages)}")
    language = languages[0]
    words = infos.get(f"{language}_model.{_WORDS[language]}")
    bias = infos.get(f"{language}_proj.bias")
    return Detected(
        kind,
        "generation",
        tower,
        language,
        language_width=None if bias is None else bias.shape[0],
        vocabulary=None if words is None else words.shape[0],
        image_size=size,
        has_tower=bool(bare),
        has_language=words is not None,
    )


def _folder(kind: Kind, infos: Mapping[str, TensorInfo]) -> Detected:
    generation = any(name.startswith("language_projection.") for name in infos)
    language, words = _language(infos, "language_model.")
    own = {name.removeprefix("vision_model."): info for name, info in infos.items() if name.startswith("vision_model.")}
    tower = None
    if any(name.startswith("encoder.") for name in own):
        tower = "eva"
    elif "tower.pre_layrnorm.weight" in own:
        tower = "clip"
    sizes = _sizes(words)
    if generation:
        sizes["language_width"] = infos["language_projection.bias"].shape[0]
    return Detected(
        kind,
        "generation" if generation else "retrieval",
        tower or _tower_of_features(infos, "qformer.encoder.layer.0.crossattention.attention.key.weight"),
        language,
        image_size=None if tower is None else _image_size(own),
        has_tower=tower is not None or any(name.startswith("tower.") for name in own),
        has_language=words is not None,
        **sizes,
    )


def _language(infos: Mapping[str, TensorInfo], prefix: str) -> tuple[str | None, TensorInfo | None]:
    for language, words in _WORDS.items():
        if prefix + words in infos:
            return language, infos[prefix + words]
    old_opt = infos.get(f"{prefix}decoder.embed_tokens.weight")  # the model without its head
    return (None, None) if old_opt is None else ("opt", old_opt)


def _sizes(words: TensorInfo | None) -> dict[str, int | None]:
    rows, width = (None, None) if words is None else words.shape
    return {"language_width": width, "vocabulary": rows}


def _tower_of_features(infos: Mapping[str, TensorInfo], key: str) -> Literal["eva", "clip"] | None:
    """From the width of the features that the Q-Former reads."""
    info = infos.get(key)
    return None if info is None else {1408: "eva", 1024: "clip"}.get(info.shape[-1])


def _image_size(infos: Mapping[str, TensorInfo]) -> int | None:
    """From the position embeddings [1, tokens, width] or [tokens, width], of which one is the class token's."""
    patch = _only(infos, r"(^|\.)(patch_embed\.proj|conv1|patch_embedding)\.weight")
    positions = _only(infos, r"(^|\.)(pos_embed|positional_embedding|position_embedding(\.weight)?)")
    if patch is None or positions is None:
        return None
    patches = positions.shape[-2] - 1
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"the tower's positions must be a square of patches and one more, got {positions.shape}")
    return side * patch.shape[-1]


def _only(infos: Mapping[str, TensorInfo], expression: str) -> TensorInfo | None:
    return next((info for name, info in infos.items() if re.search(f"{expression}$", name)), None)


def _named(found: Detected, infos: Mapping[str, TensorInfo], model: str | None, file_name: str | None) -> Detected:
    if model is not None and model not in CHECKPOINTS:
        raise ValueError(f"`model` must be one of {', '.join(CHECKPOINTS)}; got {model!r}")
    if found.model is None or found.kind == "instructblip":
        if model is not None:
            raise ValueError(f"`model` names a released BLIP-2, but the tensors are those of a {found.kind}")
        return found
    candidates = tuple(name for name, entry in CHECKPOINTS.items() if _fits(found, infos, name, entry))
    if model is not None:
        if model not in candidates:
            like = f"could be {', '.join(candidates)}" if candidates else "are those of no released checkpoint"
            raise ValueError(f"`model` is {model!r}, but the tensors {like} (found: {_described(found)})")
        candidates = (model,)
    by_file = [name for name in candidates if file_name and CHECKPOINTS[name].original_file == file_name]
    if len(candidates) > 1 and found.kind.startswith("lavis") and by_file:
        candidates = tuple(by_file)
    name = candidates[0] if len(candidates) == 1 else None
    return Detected(**{**vars(found), "checkpoint": name, "candidates": candidates})


def _fits(found: Detected, infos: Mapping[str, TensorInfo], name: str, entry: Checkpoint) -> bool:
    if entry.kind != found.model or entry.tower != {"eva": "eva_vit_g", "clip": "clip_vit_l"}.get(found.tower):
        return False
    if found.image_size not in (None, entry.image_size):
        return False
    config = checkpoint_config(name)
    queries = infos.get("query_tokens")
    if queries is None or queries.shape != (1, config["num_query_tokens"], _BERT_WIDTH):
        return False
    norms = (infos.get("ln_vision.weight"), infos.get("vision_model.post_layernorm.weight"))
    if not any(norm is not None and norm.shape == (config["vision_config"]["hidden_size"],) for norm in norms):
        return False
    if entry.kind == "retrieval":
        return True
    text = config["text_config"]
    width = text.get("hidden_size", text.get("d_model"))
    return (text["model_type"], width) == (found.language or text["model_type"], found.language_width)


def _described(found: Detected) -> str:
    parts = [found.model, found.tower and f"{found.tower} tower", found.language]
    parts += [found.language_width and f"language width {found.language_width}"]
    parts += [found.image_size and f"{found.image_size} px"]
    return ", ".join(part for part in parts if part)
