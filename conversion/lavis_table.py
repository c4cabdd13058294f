"""Parameter names of the original code (LAVIS, https://github.com/salesforce/LAVIS) and ours, as one table.

Placeholders: `{n}` a layer number, `{p}` weight or bias, `{qv}` q or v, `{rest}` anything. A name that no row explains
is not converted but reported (`conversion.lavis`).

The tower is the EVA ViT. The original's own files hold only what was trained (and buffers), so in most of them there
is no tower at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import cache


class How(Enum):
    """What happens to a tensor between the two names."""

    RENAMED = "the same tensor under the other name"
    RESHAPED = "the same number: a scalar there, [1] here"
    MERGED = "biases of queries and values there, one vector with zeros for the keys between them here"
    TIED = "the word embeddings once more, on both sides"
    REPEATED = "a second name, there only, for the tensor that the row above it has"
    BUFFER = "no parameter: dropped on the way to us, generated on the way back"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        lavis: name or names of the original.
        ours: name or names here; None where we have none.
        how: what else is done.
        why: the reason, where something is dropped, generated, merged or repeated.
        language: "opt" or "t5" where only models with that language model have the name.
    """

    lavis: str
    ours: str | None
    how: How = How.RENAMED
    why: str = ""
    language: str | None = None


WORD_EMBEDDINGS = ("Qformer.bert.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight")
POSITION_EMBEDDINGS = ("Qformer.bert.embeddings.position_embeddings.weight", "embeddings.position_embeddings.weight")
HEAD_BIAS = ("Qformer.cls.predictions.bias", "lm_head.decoder.bias")

_VIT, _OUR_VIT = "visual_encoder", "vision_model"
_BLOCK, _OUR_BLOCK = f"{_VIT}.blocks.{{n}}", f"{_OUR_VIT}.encoder.layers.{{n}}"
_LAYER, _OUR_LAYER = "Qformer.bert.encoder.layer.{n}", "qformer.encoder.layer.{n}"

# fmt: off
TABLE: tuple[Row, ...] = (
    # tower
    Row(f"{_VIT}.cls_token",                f"{_OUR_VIT}.embeddings.class_embedding"),
    Row(f"{_VIT}.pos_embed",                f"{_OUR_VIT}.embeddings.position_embedding"),
    Row(f"{_VIT}.patch_embed.proj.{{p}}",   f"{_OUR_VIT}.embeddings.patch_embedding.{{p}}"),
    Row(f"{_BLOCK}.norm1.{{p}}",            f"{_OUR_BLOCK}.layer_norm1.{{p}}"),
    Row(f"{_BLOCK}.attn.qkv.weight",        f"{_OUR_BLOCK}.self_attn.qkv.weight"),
    Row(f"{_BLOCK}.attn.{{qv}}_bias",       f"{_OUR_BLOCK}.self_attn.qkv.bias", How.MERGED,
        "the original has no bias of the keys; ours changes nothing (it cancels in the softmax) and is dropped"),
    Row(f"{_BLOCK}.attn.proj.{{p}}",        f"{_OUR_BLOCK}.self_attn.projection.{{p}}"),
    Row(f"{_BLOCK}.norm2.{{p}}",            f"{_OUR_BLOCK}.layer_norm2.{{p}}"),
    Row(f"{_BLOCK}.mlp.fc1.{{p}}",          f"{_OUR_BLOCK}.mlp.fc1.{{p}}"),
    Row(f"{_BLOCK}.mlp.fc2.{{p}}",          f"{_OUR_BLOCK}.mlp.fc2.{{p}}"),
    Row("ln_vision.{p}",                    f"{_OUR_VIT}.post_layernorm.{{p}}"),
    # Q-Former
    Row("query_tokens",                     "query_tokens"),
    Row(*WORD_EMBEDDINGS),
    Row(*POSITION_EMBEDDINGS),
    Row("Qformer.bert.embeddings.position_ids", None, How.BUFFER, "0, 1, 2, … as many as there are positions"),
    Row("Qformer.bert.embeddings.LayerNorm.{p}",            "qformer.layernorm.{p}"),
    Row(f"{_LAYER}.attention.self.query.{{p}}",             f"{_OUR_LAYER}.attention.attention.query.{{p}}"),
    Row(f"{_LAYER}.attention.self.key.{{p}}",               f"{_OUR_LAYER}.attention.attention.key.{{p}}"),
    Row(f"{_LAYER}.attention.self.value.{{p}}",             f"{_OUR_LAYER}.attention.attention.value.{{p}}"),
    Row(f"{_LAYER}.attention.output.dense.{{p}}",           f"{_OUR_LAYER}.attention.output.dense.{{p}}"),
    Row(f"{_LAYER}.attention.output.LayerNorm.{{p}}",       f"{_OUR_LAYER}.attention.output.LayerNorm.{{p}}"),
    Row(f"{_LAYER}.crossattention.self.query.{{p}}",        f"{_OUR_LAYER}.crossattention.attention.query.{{p}}"),
    Row(f"{_LAYER}.crossattention.self.key.{{p}}",          f"{_OUR_LAYER}.crossattention.attention.key.{{p}}"),
    Row(f"{_LAYER}.crossattention.self.value.{{p}}",        f"{_OUR_LAYER}.crossattention.attention.value.{{p}}"),
    Row(f"{_LAYER}.crossattention.output.dense.{{p}}",      f"{_OUR_LAYER}.crossattention.output.dense.{{p}}"),
    Row(f"{_LAYER}.crossattention.output.LayerNorm.{{p}}",  f"{_OUR_LAYER}.crossattention.output.LayerNorm.{{p}}"),
    Row(f"{_LAYER}.intermediate.dense.{{p}}",               f"{_OUR_LAYER}.intermediate.dense.{{p}}"),
    Row(f"{_LAYER}.output.dense.{{p}}",                     f"{_OUR_LAYER}.output.dense.{{p}}"),
    Row(f"{_LAYER}.output.LayerNorm.{{p}}",                 f"{_OUR_LAYER}.output.LayerNorm.{{p}}"),
    Row(f"{_LAYER}.intermediate_query.dense.{{p}}",         f"{_OUR_LAYER}.intermediate_query.dense.{{p}}"),
    Row(f"{_LAYER}.output_query.dense.{{p}}",               f"{_OUR_LAYER}.output_query.dense.{{p}}"),
    Row(f"{_LAYER}.output_query.LayerNorm.{{p}}",           f"{_OUR_LAYER}.output_query.LayerNorm.{{p}}"),
    # stage 1: contrastive and matching heads, captioning head
    Row("vision_proj.{p}",                  "vision_projection.{p}"),
    Row("text_proj.{p}",                    "text_projection.{p}"),
    Row("itm_head.{p}",                     "itm_head.{p}"),
    Row("temp",                             "temperature", How.RESHAPED, "FSDP2 shards no scalars"),
    Row("Qformer.cls.predictions.transform.dense.{p}",      "lm_head.dense.{p}"),
    Row("Qformer.cls.predictions.transform.LayerNorm.{p}",  "lm_head.layer_norm.{p}"),
    Row(*HEAD_BIAS),
    Row("Qformer.cls.predictions.decoder.bias",     HEAD_BIAS[1], How.REPEATED, "one parameter with two names"),
    Row("Qformer.cls.predictions.decoder.weight",   "lm_head.decoder.weight", How.TIED,
        "not in every file of ours: safetensors stores tied weights once"),
    # stage 2
    Row("opt_proj.{p}",     "language_projection.{p}",  language="opt"),
    Row("opt_model.{rest}", "language_model.{rest}",    language="opt"),
    Row("t5_proj.{p}",      "language_projection.{p}",  language="t5"),
    Row("t5_model.{rest}",  "language_model.{rest}",    language="t5"),
)
# fmt: on

_PLACEHOLDERS = {"n": r"\d+", "p": "weight|bias", "qv": "q|v", "rest": ".+"}


@cache
def _pattern(names: str) -> re.Pattern:
    expression = re.escape(names)
    for placeholder, values in _PLACEHOLDERS.items():
        expression = expression.replace(rf"\{{{placeholder}\}}", f"(?P<{placeholder}>{values})")
    return re.compile(expression)


def read(names: str | None, name: str) -> dict[str, str] | None:
    """The placeholders' values if `name` is one of `names` (a cell of the table), else None."""
    match = None if names is None else _pattern(names).fullmatch(name)
    return None if match is None else match.groupdict()
