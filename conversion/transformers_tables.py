"""Names of `transformers`' BLIP-2 and InstructBLIP, and ours.

Ours are those of BLIP-2, with a few more tensors. InstructBLIP is BLIP-2 with a Q-Former that reads the question: what
`transformers` calls BLIP-2 has no place for that Q-Former's embeddings.
"""

from __future__ import annotations

from .rows import Relation, Row, Table

_TEXT = "qformer.embeddings"  # of InstructBLIP
_OPT_WORDS, _T5_WORDS = "language_model.model.decoder.embed_tokens.weight", "language_model.shared.weight"
_AGAIN = "the word embeddings, once more"

# fmt: off
# `transformers` holds a tied tensor once; old files hold it under each name.
_TIED = (
    Row("language_model.encoder.embed_tokens.weight", "language_model.encoder.embed_tokens.weight", Relation.TIED,
        _AGAIN, tied_to=_T5_WORDS, alone=True),
    Row("language_model.decoder.embed_tokens.weight", "language_model.decoder.embed_tokens.weight", Relation.TIED,
        _AGAIN, tied_to=_T5_WORDS, alone=True),
)
_OPT_HEAD = Row("language_model.lm_head.weight", "language_model.lm_head.weight", Relation.TIED, _AGAIN,
                tied_to=_OPT_WORDS, alone=True)
_BUFFERS = (
    Row("embeddings.position_ids", None, Relation.BUFFER, "0, 1, 2, …"),
    Row("qformer.embeddings.position_ids", None, Relation.BUFFER, "0, 1, 2, …"),
    Row("language_model.model.layers.{n}.self_attn.rotary_emb.inv_freq", None, Relation.DROPPED,
        "computed from the config: a buffer in old files"),
)
BLIP2: Table = (
    Row(None, "temperature",        Relation.DROPPED, "of the contrastive loss, which transformers does not compute",
        fill=0.07),
    Row(None, "lm_head.{rest}",     Relation.DROPPED, "head of image-grounded text generation, not in transformers"),
    Row("lm_head.decoder.weight", "lm_head.decoder.weight", Relation.TIED, "the word embeddings, which files hold once",
        tied_to="embeddings.word_embeddings.weight"),
    *_TIED,
    _OPT_HEAD,
    *_BUFFERS,
    Row("{rest}", "{rest}"),
)
INSTRUCTBLIP: Table = (
    Row(f"{_TEXT}.layernorm.{{p}}",                 "qformer.layernorm.{p}"),
    Row(f"{_TEXT}.word_embeddings.weight",          "embeddings.word_embeddings.weight"),
    Row(f"{_TEXT}.position_embeddings.weight",      "embeddings.position_embeddings.weight"),
    *_TIED,
    _OPT_HEAD,
    *_BUFFERS,
    Row("{rest}", "{rest}"),
)
# fmt: on
