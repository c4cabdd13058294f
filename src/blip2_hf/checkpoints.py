"""The released BLIP-2 checkpoints: their short names, what each is made of, and its config without network.

Sources: the models of Li et al. 2023, tables 2-5; the `config.json` files of the Hub repositories; the model
files of the original code (https://github.com/salesforce/LAVIS/tree/main/lavis/configs/models/blip2).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Checkpoint:
    """One released checkpoint.

    Attributes:
        kind: "generation" (`Blip2ForConditionalGeneration`) or "retrieval" (`Blip2ForImageTextRetrieval`).
        tower: name of the vision tower: "eva_vit_g" or "clip_vit_l".
        image_size: side of the square input images in pixels.
        trained_for: what the weights were last trained for.
        hub_id: repository on the Hub; None if the checkpoint is not there.
        original_file: file of the original code that holds the same weights; None if it was never published.
        language_model: Hub id of the frozen language model; None for retrieval.
        language_dtype: dtype that the language model had in training. A Flan-T5 overflows in float16.
        image_token_index: id of the image placeholder; None where the published files have none (see
            `Blip2Config`).
        license: licence of the published weights as the model card on the Hub states it. The language model's
            own terms come on top.
    """

    kind: Literal["generation", "retrieval"]
    tower: Literal["eva_vit_g", "clip_vit_l"]
    image_size: int
    trained_for: str
    hub_id: str | None = None
    original_file: str | None = None
    language_model: str | None = None
    language_dtype: Literal["float16", "bfloat16"] | None = None
    image_token_index: int | None = None
    license: str | None = None


_STAGE_1 = "vision-language representation learning (stage 1)"
_STAGE_2 = "vision-to-language generative learning (stage 2)"
_CAPTIONING = "captioning on COCO"
_RETRIEVAL = "image-text retrieval on COCO"

_OPT_IMAGE_TOKEN = 50265  # the first id behind OPT's own tokens
_T5_IMAGE_TOKEN = 32100


def _generation(
    language_model: str,
    original_file: str | None,
    *,
    hub_id: str | None = None,
    tower: Literal["eva_vit_g", "clip_vit_l"] = "eva_vit_g",
    coco: bool = False,
    placeholder: bool = True,
) -> Checkpoint:
    is_opt = language_model.startswith("facebook/opt")
    image_token = _OPT_IMAGE_TOKEN if is_opt else _T5_IMAGE_TOKEN
    return Checkpoint(
        kind="generation",
        tower=tower,
        image_size=364 if coco else 224,
        trained_for=_CAPTIONING if coco else _STAGE_2,
        hub_id=hub_id,
        original_file=original_file,
        language_model=language_model,
        language_dtype="float16" if is_opt else "bfloat16",
        image_token_index=image_token if placeholder else None,
        license="mit" if hub_id else None,
    )


CHECKPOINTS: dict[str, Checkpoint] = {
    "blip2-opt-2.7b": _generation(
        "facebook/opt-2.7b", "blip2_pretrained_opt2.7b.pth", hub_id="Salesforce/blip2-opt-2.7b"
    ),
    "blip2-opt-6.7b": _generation(
        "facebook/opt-6.7b", "blip2_pretrained_opt6.7b.pth", hub_id="Salesforce/blip2-opt-6.7b"
    ),
    "blip2-flan-t5-xl": _generation(
        "google/flan-t5-xl", "blip2_pretrained_flant5xl.pth", hub_id="Salesforce/blip2-flan-t5-xl"
    ),
    "blip2-flan-t5-xxl": _generation(
        "google/flan-t5-xxl", "blip2_pretrained_flant5xxl.pth", hub_id="Salesforce/blip2-flan-t5-xxl"
    ),
    # Two of the repositories still have their first files, from before there was a placeholder.
    "blip2-opt-2.7b-coco": _generation(
        "facebook/opt-2.7b",
        "blip2_caption_opt2.7b.pth",
        hub_id="Salesforce/blip2-opt-2.7b-coco",
        coco=True,
        placeholder=False,
    ),
    "blip2-opt-6.7b-coco": _generation(
        "facebook/opt-6.7b", "blip2_caption_opt6.7b.pth", hub_id="Salesforce/blip2-opt-6.7b-coco", coco=True
    ),
    "blip2-flan-t5-xl-coco": _generation(
        "google/flan-t5-xl",
        "blip2_caption_flant5xl.pth",
        hub_id="Salesforce/blip2-flan-t5-xl-coco",
        coco=True,
        placeholder=False,
    ),
    # The paper's models with CLIP ViT-L. No weights of the one with OPT were published.
    "blip2-opt-2.7b-vit-l": _generation("facebook/opt-2.7b", None, tower="clip_vit_l"),
    "blip2-flan-t5-xl-vit-l": _generation(
        "google/flan-t5-xl", "blip2_pretrained_flant5xl_vitL.pth", tower="clip_vit_l"
    ),
    "blip2-itm-vit-g": Checkpoint(
        kind="retrieval",
        tower="eva_vit_g",
        image_size=224,
        trained_for=_STAGE_1,
        hub_id="Salesforce/blip2-itm-vit-g",
        original_file="blip2_pretrained.pth",
        license="mit",
    ),
    "blip2-itm-vit-g-coco": Checkpoint(
        kind="retrieval",
        tower="eva_vit_g",
        image_size=364,
        trained_for=_RETRIEVAL,
        hub_id="Salesforce/blip2-itm-vit-g-coco",
        original_file="blip2_finetune_coco.pth",
        license="mit",
    ),
    "blip2-itm-vit-l": Checkpoint(
        kind="retrieval",
        tower="clip_vit_l",
        image_size=224,
        trained_for=_STAGE_1,
        original_file="blip2_pretrained_vitL.pth",
    ),
}

# Small checkpoints inside this package, trained on its own world of shapes (docs/shapes.md): no network needed.
SHIPPED = ("blip2-tiny-opt", "blip2-tiny-opt-vqa", "blip2-tiny-t5", "blip2-tiny-itm")
_SHIPPED_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shipped")

# Shapes of the vision towers; what is not said is the default of the tower's config class.
_TOWERS: dict[str, dict[str, Any]] = {
    "eva_vit_g": {
        "model_type": "blip_2_vision_model",
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_hidden_layers": 39,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
    },
    "clip_vit_l": {
        "model_type": "clip_vision_model",
        "_name_or_path": "openai/clip-vit-large-patch14",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 768,
    },
}

_OPT = {
    "model_type": "opt",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 50118,  # "\n": what ends a text in training (OPT's own is 2)
}
_FLAN_T5 = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_kv": 64,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",  # exact, as in the original code; Flan-T5's own is the tanh approximation
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "facebook/opt-2.7b": {**_OPT, "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240},
    "facebook/opt-6.7b": {**_OPT, "hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384},
    "google/flan-t5-xl": {**_FLAN_T5, "d_model": 2048, "d_ff": 5120, "num_heads": 32},
    "google/flan-t5-xxl": {**_FLAN_T5, "d_model": 4096, "d_ff": 10240, "num_heads": 64},
}
_OPT_VOCAB_SIZE = 50272
_OPT_VOCAB_SIZE_WITH_IMAGE_TOKEN = 50304  # grown for the placeholder, to a multiple of 64


def resolve_checkpoint(name: str | os.PathLike) -> str:
    """What `from_pretrained` should be given for `name`.

    Args:
        name: a folder, a short name (one of `CHECKPOINTS` or `SHIPPED`) or a Hub id.

    Returns:
        `name` itself if there is a folder of that name, the Hub id of a short name, the folder in this package of a
        shipped one, else `name`.

    Raises:
        ValueError: for the short name of a checkpoint that is not on the Hub, without a folder of that name.
    """
    name = os.fspath(name)
    if name in SHIPPED and not os.path.isdir(name):
        return os.path.join(_SHIPPED_FOLDER, name)
    checkpoint = CHECKPOINTS.get(name)
    if checkpoint is None or os.path.isdir(name):
        return name
    if checkpoint.hub_id is not None:
        return checkpoint.hub_id
    if checkpoint.original_file is not None:
        raise ValueError(
            f"{name!r} is not on the Hub: it must be converted from the original file "
            f"{checkpoint.original_file!r} to a folder, and there is no folder {name!r}"
        )
    raise ValueError(
        f"{name!r} is a model of the paper whose weights are not on the Hub and cannot be converted from an "
        f"original file, for none was published: it has a config only (`Blip2Config.for_checkpoint`), and "
        f"there is no folder {name!r}"
    )


def short_name(path: str | os.PathLike) -> str:
    """The name of a shipped checkpoint, where `path` is its folder in this package (elsewhere on each machine)."""
    path = os.fspath(path)
    name = os.path.basename(path)
    return name if name in SHIPPED and os.path.dirname(path) == _SHIPPED_FOLDER else path


def path_or_id(argument: str, given: Any) -> str:
    """A folder or a Hub id as a string.

    Raises:
        ValueError: for anything else and for a folder that there is not, naming the argument.
    """
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise ValueError(f"`{argument}` must be a folder or a Hub id, got {type(given).__name__} {given!r}")
    given = os.fspath(given)
    if given.startswith((".", "/", "~")) and not os.path.isdir(given):  # no Hub id looks like this
        raise ValueError(f"`{argument}` must be a folder or a Hub id, but there is no folder {given!r}")
    return given


def checkpoint_config(name: str) -> dict[str, Any]:
    """Keyword arguments for `Blip2Config` that describe a released checkpoint as its `config.json` does.

    Args:
        name: a short name (one of `CHECKPOINTS`) or the Hub id of one.

    Returns:
        a new dictionary of plain values at each call.

    Raises:
        ValueError: if `name` is neither, naming those that are known.
    """
    by_hub_id = {entry.hub_id: entry for entry in CHECKPOINTS.values() if entry.hub_id is not None}
    checkpoint = CHECKPOINTS.get(name, by_hub_id.get(name))
    if checkpoint is None:
        known = ", ".join(CHECKPOINTS)
        raise ValueError(f"`name` must be a released checkpoint, one of {known}; got {name!r}")
    vision = {**_TOWERS[checkpoint.tower], "image_size": checkpoint.image_size}
    config = {
        "vision_config": vision,
        "num_query_tokens": 32,
        "image_text_hidden_size": 256,
        "image_token_index": checkpoint.image_token_index,
    }
    qformer = {"model_type": "blip_2_qformer", "encoder_hidden_size": vision["hidden_size"]}
    if checkpoint.kind == "retrieval":
        return config | {
            # bert-base-uncased's 30522 tokens and "[DEC]"
            "qformer_config": {**qformer, "vocab_size": 30523, "use_qformer_text_input": True},
            "text_config": {"model_type": "opt"},  # not used; the published files name the default, too
        }
    text = {**_LANGUAGE_MODELS[checkpoint.language_model], "_name_or_path": checkpoint.language_model}
    if text["model_type"] == "opt":
        placeholder = checkpoint.image_token_index is not None
        text["vocab_size"] = _OPT_VOCAB_SIZE_WITH_IMAGE_TOKEN if placeholder else _OPT_VOCAB_SIZE
    return config | {"qformer_config": {**qformer, "vocab_size": 30522}, "text_config": text}
