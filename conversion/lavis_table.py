"""Parameter names of the original code (LAVIS, https://github.com/salesforce/LAVIS) and ours, as one table.

The original's own files hold only what was trained, buffers and second names of frozen tensors, so in most of them
there is no tower and nothing of the language model but its tied embeddings.
"""

from __future__ import annotations

from .rows import Relation, Row, Table
from .tower_tables import CLIP, CLIP_LAST_NORM, EVA, in_model

WORD_EMBEDDINGS = ("Qformer.bert.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight")
POSITION_EMBEDDINGS = ("Qformer.bert.embeddings.position_embeddings.weight", "embeddings.position_embeddings.weight")
HEAD_BIAS = ("Qformer.cls.predictions.bias", "lm_head.decoder.bias")

_LAYER, _OUR_LAYER = "Qformer.bert.encoder.layer.{n}", "qformer.encoder.layer.{n}"
_OPT_WORDS, _T5_WORDS = "language_model.model.decoder.embed_tokens.weight", "language_model.shared.weight"

# fmt: off
TABLE: Table = (
    *in_model(EVA),
    *in_model(CLIP),
    *CLIP_LAST_NORM,
    Row("ln_vision.{p}",                    "vision_model.post_layernorm.{p}"),
    # Q-Former
    Row("query_tokens",                     "query_tokens"),
    Row(*WORD_EMBEDDINGS),
    Row(*POSITION_EMBEDDINGS),
    Row("Qformer.bert.embeddings.position_ids", None, Relation.BUFFER, "0, 1, 2, … as many as there are positions",
        needs="qformer.layernorm.weight", tied_to=POSITION_EMBEDDINGS[1]),
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
    Row("temp",                             "temperature", Relation.RESHAPED, "FSDP2 shards no scalars"),
    Row("Qformer.cls.predictions.transform.dense.{p}",      "lm_head.dense.{p}"),
    Row("Qformer.cls.predictions.transform.LayerNorm.{p}",  "lm_head.layer_norm.{p}"),
    Row(*HEAD_BIAS),
    Row("Qformer.cls.predictions.decoder.bias",     None, Relation.TIED, "the bias under its second name",
        tied_to=HEAD_BIAS[1], needs=HEAD_BIAS[1]),
    Row("Qformer.cls.predictions.decoder.weight",   "lm_head.decoder.weight", Relation.TIED,
        "the word embeddings, which files of ours hold once", tied_to=WORD_EMBEDDINGS[1], needs=HEAD_BIAS[1]),
    # stage 2
    Row("opt_proj.{p}",     "language_projection.{p}",  language="opt"),
    Row("opt_model.model.decoder.embed_tokens.weight", _OPT_WORDS, Relation.VOCABULARY, language="opt"),
    Row("opt_model.lm_head.weight", "language_model.lm_head.weight", Relation.TIED, "the word embeddings, once more",
        language="opt", tied_to=_OPT_WORDS, needs=_OPT_WORDS, alone=True),
    Row("opt_model.{rest}", "language_model.{rest}",    language="opt"),
    Row("t5_proj.{p}",      "language_projection.{p}",  language="t5"),
    Row("t5_model.shared.weight", _T5_WORDS, Relation.VOCABULARY, language="t5"),
    Row("t5_model.encoder.embed_tokens.weight", "language_model.encoder.embed_tokens.weight", Relation.TIED,
        "the word embeddings, once more", language="t5", tied_to=_T5_WORDS, needs=_T5_WORDS, alone=True),
    Row("t5_model.decoder.embed_tokens.weight", "language_model.decoder.embed_tokens.weight", Relation.TIED,
        "the word embeddings, once more", language="t5", tied_to=_T5_WORDS, needs=_T5_WORDS, alone=True),
    Row("t5_model.lm_head.weight", "language_model.lm_head.weight", Relation.VOCABULARY, language="t5"),
    Row("t5_model.{rest}",  "language_model.{rest}",    language="t5"),
)
# What a file as the original's runner writes it leaves out of a model of ours.
FROZEN_TOWER: Table = (
    Row(None, "vision_model.tower.{rest}", Relation.DROPPED, "frozen: the original reads it from clip_vit_L.pth"),
    *(Row(None, f"vision_model.{part}.{{rest}}", Relation.DROPPED, "frozen: the original reads it from eva_vit_g.pth")
      for part in ("embeddings", "encoder")),
)
FROZEN_LANGUAGE_MODEL: Table = (
    Row(None, "language_model.{rest}", Relation.DROPPED, "frozen: the original reads it from its own folder"),
)
# fmt: on
