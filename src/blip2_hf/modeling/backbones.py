"""A model for representation learning from its backbones (Li et al. 2023, sec. 3.2 and 3.4)."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from ..checkpoints import path_or_id
from ..configuration import Blip2Config, Blip2QFormerConfig
from .backbone_assembly import (
    NOT_IN_BERT,
    build_from,
    check_dtype,
    check_width,
    made_origins,
    name_part,
    new_keys,
    qformer_fields,
    take_overrides,
    tensor_origins,
)
from .backbone_report import BackboneReport, TensorOrigin
from .bert_weights import bert_fields, read_bert
from .vision_weights import drop_later_layers, vision_source

logger = logging.get_logger(__name__)

# Fields of `Blip2Config` that come from the backbones, or mean nothing in a new retrieval model.
_REFUSED = {"vision_config", "text_config", "connector_of", "language_adapter"}
_TIED = "lm_head.decoder.weight"
# What no backbone has.
_NEW = (*NOT_IN_BERT, r"^temperature$", r"^(vision_projection|text_projection|itm_head)\.")


class Stage1BackbonesMixin:
    """`from_backbones` of `Blip2ForImageTextRetrieval`, which also has the `from_pretrained` of `CheckpointMixin`."""

    # Where each tensor came from; None unless the model was made by `from_backbones`.
    backbone_report: BackboneReport | None = None

    @classmethod
    def from_backbones(
        cls,
        vision: str | os.PathLike | dict[str, Any] | PreTrainedConfig,
        text: str | os.PathLike = "bert-base-uncased",
        *,
        vision_dtype: torch.dtype | None = None,
        freeze_vision: bool = True,
        **overrides: Any,
    ):
        """A model to train from a vision tower and a BERT, as the paper starts representation learning.

        BERT becomes the Q-Former's self-attention, feed-forward layers (the queries' are copies of the text's),
        embeddings and language-modelling head; cross-attention and queries are drawn from N(0, 0.02)
        (`initializer_range`); the vocabulary gets a row for `[DEC]`. As in the original code there are no token
        types: BERT's token-type embeddings are dropped. New values are drawn from torch's global generator. Nothing
        is dropped or made up unseen: `model.backbone_report` has where each tensor came from (logged at INFO).

        Args:
            vision: a folder or a Hub id of a vision tower or two-tower model of `transformers` (CLIP, SigLIP,
                DINOv2, …), or of a BLIP-2 (also by short name), whose tower is taken together with its trained
                `post_layernorm`; or a config or its dictionary, for a random tower.
            text: a folder or a Hub id of a BERT of any size, with its tokenizer.
            vision_dtype: precision of the frozen tower (float16, bfloat16); None: float32. Everything trained,
                `post_layernorm` included, is float32.
            freeze_vision: whether the tower is frozen (see `freeze_vision()`).
            overrides: fields of `Blip2Config`, such as `num_query_tokens`, `vision_feature_layer` or
                `itg_weight`; `qformer_config` is a dictionary of the fields of `Blip2QFormerConfig` to be other
                than BERT's.

        Returns:
            The model in evaluation mode, as `from_pretrained` returns it; `stage1_processor(vision, text)` gives its
            processor. Save it in full before `save_pretrained(connector_only=True)`.

        Raises:
            ValueError: for unknown fields, a `text` that is no BERT, files with keys that do not belong there, that
                lack some or have others' shapes (naming them).
            OSError: for a name that is neither a folder nor on the Hub.
        """
        qformer = take_overrides(overrides, _REFUSED)
        if not qformer.get("use_qformer_text_input", True):
            raise ValueError(
                "`qformer_config` must have `use_qformer_text_input` True for a retrieval model, got False"
            )
        check_dtype("vision_dtype", vision_dtype, freeze_vision)
        text = path_or_id("text", text)
        qformer_config = Blip2QFormerConfig(**qformer_fields(text, qformer))
        tower = vision_source(vision, vision_dtype or torch.float32)
        config = Blip2Config(**{**tower.fields, **overrides, "qformer_config": qformer_config})
        check_width(config, qformer)
        drop_later_layers(tower, config)
        words = read_bert(text, qformer_config, bert_fields(text)["vocab_size"])
        name_part(config.vision_config, tower.name)
        name_part(config.qformer_config, text)
        model, info = build_from(cls, config, {**tower.tensors, **words.tensors})
        has_head = any(key.startswith("lm_head.") for key in words.tensors)
        new = new_keys(model, info, tower, ("text", text), _NEW if has_head else (*_NEW, r"^lm_head\."))
        if vision_dtype is not None:
            model.vision_model.to(vision_dtype)
            model.vision_model.post_layernorm.float()
        if freeze_vision:
            model.freeze_vision()
        words.loaded.append(TensorOrigin(_TIED, None, None, 0, "tied to embeddings.word_embeddings.weight"))
        model.backbone_report = tensor_origins([tower, words], made_origins(model, new, tower))
        logger.info(f"{cls.__name__} from backbones:\n{model.backbone_report}")
        if not has_head:
            logger.warning(f"{text} has no language-modelling head: newly initialised")
        return model
