"""Language models: names in their own folders (`transformers`) and ours.

A vocabulary may grow on the way to us, for the image placeholder.
"""

from __future__ import annotations

from .rows import Relation, Row, Table
from .tower_tables import from_source

_OPT_WORDS, _T5_WORDS = "language_model.model.decoder.embed_tokens.weight", "language_model.shared.weight"
_AGAIN = "the word embeddings, once more"

# fmt: off
_OPT = (
    Row("model.decoder.embed_tokens.weight", _OPT_WORDS, Relation.VOCABULARY),
    Row("decoder.embed_tokens.weight",  _OPT_WORDS, Relation.VOCABULARY),  # the model without its head
    Row("lm_head.weight",               "language_model.lm_head.weight", Relation.TIED, _AGAIN, tied_to=_OPT_WORDS),
    Row("model.{rest}",                 "language_model.model.{rest}"),
    Row("decoder.{rest}",               "language_model.model.decoder.{rest}"),
)
_T5 = (
    Row("shared.weight",                _T5_WORDS, Relation.VOCABULARY),
    Row("encoder.embed_tokens.weight",  "language_model.encoder.embed_tokens.weight", Relation.TIED, _AGAIN,
        tied_to=_T5_WORDS),
    Row("decoder.embed_tokens.weight",  "language_model.decoder.embed_tokens.weight", Relation.TIED, _AGAIN,
        tied_to=_T5_WORDS),
    Row("lm_head.weight",               "language_model.lm_head.weight", Relation.VOCABULARY),
    Row("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", None, Relation.DROPPED,
        "left over in old files: T5 has no relative positions there"),
    Row("{rest}",                       "language_model.{rest}"),
)
_OTHER = (
    Row("model.embed_tokens.weight",    "language_model.model.embed_tokens.weight", Relation.VOCABULARY),
    Row("lm_head.weight",               "language_model.lm_head.weight", Relation.VOCABULARY),
    Row("model.layers.{n}.self_attn.rotary_emb.inv_freq", None, Relation.DROPPED,
        "computed from the config: a buffer in old files"),
    Row("{rest}",                       "language_model.{rest}"),
)
# fmt: on


def language_folder(family: str) -> Table:
    """The table for a language model's own folder; `family` is the `model_type` of its config."""
    return from_source("llm", {"opt": _OPT, "t5": _T5}.get(family, _OTHER))
