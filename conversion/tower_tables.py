"""Vision towers: the names of the original's files, of `transformers`' CLIP and of BLIP-2 checkpoints, and ours.

EVA ViT-g is `lavis/models/eva_vit.py` of the original code, CLIP ViT-L `lavis/models/clip_vit.py`; inside a model file
their names begin with "visual_encoder.", in the files of their own (`eva_vit_g.pth`, `clip_vit_L.pth`) they do not.
"""

from __future__ import annotations

from dataclasses import replace

from .rows import Relation, Row, Source, Table

IN_MODEL = "visual_encoder."

_EVA, _EVA_LAYER = "vision_model", "vision_model.encoder.layers.{n}"
_CLIP, _CLIP_LAYER = "vision_model.tower", "vision_model.tower.encoder.layers.{n}"
_THEIR_CLIP_LAYER = "transformer.resblocks.{n}"

# fmt: off
EVA: Table = (
    Row("cls_token",                    f"{_EVA}.embeddings.class_embedding"),
    Row("pos_embed",                    f"{_EVA}.embeddings.position_embedding"),
    Row("patch_embed.proj.{p}",         f"{_EVA}.embeddings.patch_embedding.{{p}}"),
    Row("blocks.{n}.norm1.{p}",         f"{_EVA_LAYER}.layer_norm1.{{p}}"),
    Row("blocks.{n}.attn.qkv.weight",   f"{_EVA_LAYER}.self_attn.qkv.weight"),
    Row("blocks.{n}.attn.{qv}_bias",    f"{_EVA_LAYER}.self_attn.qkv.bias", Relation.MERGED,
        "the original has no bias of the keys; ours changes nothing (it cancels in the softmax) and is dropped"),
    Row("blocks.{n}.attn.proj.{p}",     f"{_EVA_LAYER}.self_attn.projection.{{p}}"),
    Row("blocks.{n}.norm2.{p}",         f"{_EVA_LAYER}.layer_norm2.{{p}}"),
    Row("blocks.{n}.mlp.fc1.{p}",       f"{_EVA_LAYER}.mlp.fc1.{{p}}"),
    Row("blocks.{n}.mlp.fc2.{p}",       f"{_EVA_LAYER}.mlp.fc2.{{p}}"),
)
CLIP: Table = (
    Row("class_embedding",                          f"{_CLIP}.embeddings.class_embedding"),
    Row("positional_embedding",                     f"{_CLIP}.embeddings.position_embedding.weight"),
    Row("conv1.weight",                             f"{_CLIP}.embeddings.patch_embedding.weight"),
    Row("ln_pre.{p}",                               f"{_CLIP}.pre_layrnorm.{{p}}"),
    Row(f"{_THEIR_CLIP_LAYER}.ln_1.{{p}}",          f"{_CLIP_LAYER}.layer_norm1.{{p}}"),
    Row(f"{_THEIR_CLIP_LAYER}.attn.in_proj_{{p}}",  f"{_CLIP_LAYER}.self_attn.{{qkv}}_proj.{{p}}", Relation.SPLIT,
        "one matrix and one bias for queries, keys and values there"),
    Row(f"{_THEIR_CLIP_LAYER}.attn.out_proj.{{p}}", f"{_CLIP_LAYER}.self_attn.out_proj.{{p}}"),
    Row(f"{_THEIR_CLIP_LAYER}.ln_2.{{p}}",          f"{_CLIP_LAYER}.layer_norm2.{{p}}"),
    Row(f"{_THEIR_CLIP_LAYER}.mlp.c_fc.{{p}}",      f"{_CLIP_LAYER}.mlp.fc1.{{p}}"),
    Row(f"{_THEIR_CLIP_LAYER}.mlp.c_proj.{{p}}",    f"{_CLIP_LAYER}.mlp.fc2.{{p}}"),
)
# CLIP's own last norm stands behind the layer that is used. The original's tower ends before it.
CLIP_LAST_NORM: Table = (
    Row(None, f"{_CLIP}.post_layernorm.weight", Relation.DROPPED, "CLIP's last norm, which is not used", fill=1.0),
    Row(None, f"{_CLIP}.post_layernorm.bias",   Relation.DROPPED, "CLIP's last norm, which is not used", fill=0.0),
)
# fmt: on


def eva_file(layers: int) -> Table:
    """EVA-CLIP's tower in a file of its own, of which the first `layers` blocks are used (39 of 40)."""
    unused = "of EVA-CLIP, behind the features that BLIP-2 uses"
    return from_source(
        "tower",
        (
            Row(f"blocks.{layers}.{{rest}}", None, Relation.DROPPED, "last block, whose output BLIP-2 does not use"),
            *EVA,
            Row("norm.{p}", None, Relation.DROPPED, f"last norm {unused}"),
            Row("fc_norm.{p}", None, Relation.DROPPED, f"norm of the pooled tokens {unused}"),
            Row("head.{p}", None, Relation.DROPPED, f"projection {unused}"),
        ),
    )


def clip_file(layers: int) -> Table:
    """CLIP's tower in a file of its own under the original's names, of which `layers` blocks are used (23 of 24)."""
    last = f"transformer.resblocks.{layers}.{{rest}}"
    return from_source(
        "tower",
        (
            Row(last, None, Relation.DROPPED, "last block, whose output BLIP-2 does not use"),
            *CLIP,
            Row("ln_post.{p}", f"{_CLIP}.post_layernorm.{{p}}"),
            Row("proj", None, Relation.DROPPED, "projection of CLIP, behind the features that BLIP-2 uses"),
            *CLIP_LAST_NORM,
        ),
    )


def clip_folder(layers: int) -> Table:
    """A CLIP of `transformers`, whole or its tower alone, of which the first `layers` layers are used."""
    behind = "last layer, whose output BLIP-2 does not use"
    other = "not part of the tower"
    alone = ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")
    rows = [
        Row("vision_model.embeddings.position_ids", None, Relation.BUFFER, "0, 1, 2, …"),
        Row("embeddings.position_ids", None, Relation.BUFFER, "0, 1, 2, …"),
        Row(f"vision_model.encoder.layers.{layers}.{{rest}}", None, Relation.DROPPED, behind),
        Row(f"encoder.layers.{layers}.{{rest}}", None, Relation.DROPPED, behind),
        Row("vision_model.{rest}", f"{_CLIP}.{{rest}}"),
        *(Row(f"{part}.{{rest}}", f"{_CLIP}.{part}.{{rest}}") for part in alone),
        *(Row(name, None, Relation.DROPPED, other) for name in ("text_model.{rest}", "text_projection.{p}")),
        *(Row(name, None, Relation.DROPPED, other) for name in ("visual_projection.{p}", "logit_scale")),
    ]
    return from_source("tower", rows)


# The tower of a BLIP-2 under the names of `transformers`, which are ours.
BLIP2_FOLDER: Table = (
    Row(
        "vision_model.post_layernorm.{p}",
        None,
        Relation.DROPPED,
        "trained with its Q-Former: the checkpoint that is converted has its own",
        source="tower",
    ),
    Row("vision_model.{rest}", "vision_model.{rest}", source="tower"),
    Row("{rest}", None, Relation.DROPPED, "not part of the tower", source="tower"),
)


def from_source(source: Source, rows) -> Table:
    return tuple(replace(row, source=source) for row in rows)


def in_model(rows: Table) -> Table:
    """The rows of a tower with the names that it has inside the original's model files."""
    return tuple(row if row.theirs is None else replace(row, theirs=IN_MODEL + row.theirs) for row in rows)
