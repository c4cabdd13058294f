"""A model for representation learning from its backbones (Li et al. 2023, sec. 3.2 and 3.4)."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from ..configuration import BERT_SEP, Blip2Config, Blip2QFormerConfig
from ..stage1_processing import has_tokenizer, stage1_tokenizer
from .backbone_report import BackboneReport, TensorOrigin, report_rows
from .bert_weights import BertWeights, bert_fields, read_bert
from .loading import CheckpointMixin, without_load_report
from .vision_weights import NOT_USED, VisionSource, drop_later_layers, vision_source

logger = logging.get_logger(__name__)

# Fields of `Blip2Config` that come from the backbones, or mean nothing in a new retrieval model.
_NOT_OVERRIDABLE = {"vision_config", "text_config", "connector_of"}
_HALF = (torch.float16, torch.bfloat16)
_TIED = "lm_head.decoder.weight"
# What no backbone has.
_NEW = (
    r"^query_tokens$",
    r"^temperature$",
    r"^(vision_projection|text_projection|itm_head)\.",
    r"^qformer\.encoder\.layer\.\d+\.crossattention\.",
)


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
        qformer_overrides = _check_overrides(overrides)
        _check_dtype(vision_dtype, freeze_vision)
        text = _name(text)
        bert = bert_fields(text)
        qformer_config = Blip2QFormerConfig(**_qformer_fields(text, bert, qformer_overrides))
        tower = vision_source(vision, vision_dtype or torch.float32)
        config = Blip2Config(**{**tower.fields, **overrides, "qformer_config": qformer_config})
        _check_width(config, qformer_overrides)
        drop_later_layers(tower, config)
        words = read_bert(text, qformer_config, bert["vocab_size"])
        for part, name in ((config.vision_config, tower.name), (config.qformer_config, text)):
            if name is not None:  # the model card names them; a folder means nothing elsewhere
                part._name_or_path = "" if os.path.isdir(name) else name
        # The way around the checkpoint's checks: there is no checkpoint, and what may be missing differs.
        with without_load_report():
            model, info = super(CheckpointMixin, cls).from_pretrained(
                None,
                config=config,
                state_dict={**tower.tensors, **words.tensors},
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        model.config._name_or_path = model.name_or_path = ""
        new = _check_result(model, info, tower, words, text)
        if vision_dtype is not None:
            model.vision_model.to(vision_dtype)
            model.vision_model.post_layernorm.float()
        if freeze_vision:
            model.freeze_vision()
        model.backbone_report = _report(model, tower, words, new)
        logger.info(f"{cls.__name__} from backbones:\n{model.backbone_report}")
        if "lm_head.dense.weight" in new:
            logger.warning(f"{text} has no language-modelling head: newly initialised")
        return model


def _name(text: Any) -> str:
    if not isinstance(text, str | os.PathLike) or not os.fspath(text):
        raise ValueError(f"`text` must be a folder or a Hub id, got {type(text).__name__} {text!r}")
    return os.fspath(text)


def _check_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    """Refuses unknown fields; returns those of the Q-Former, taken out."""
    known = set(Blip2Config.__annotations__) - _NOT_OVERRIDABLE
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"`from_backbones` got unknown fields {unknown}; Blip2Config has {sorted(known)}")
    qformer = overrides.pop("qformer_config", None) or {}
    if not isinstance(qformer, dict):
        raise ValueError(f"`qformer_config` must be a dictionary of the fields to change, got {type(qformer).__name__}")
    known = set(Blip2QFormerConfig.__annotations__)
    if unknown := sorted(set(qformer) - known):
        raise ValueError(f"`qformer_config` has unknown fields {unknown}; Blip2QFormerConfig has {sorted(known)}")
    if not qformer.get("use_qformer_text_input", True):
        raise ValueError("`qformer_config` must have `use_qformer_text_input` True for a retrieval model, got False")
    return qformer


def _check_dtype(vision_dtype: Any, freeze_vision: bool) -> None:
    if vision_dtype not in (None, torch.float32, *_HALF):
        raise ValueError(f"`vision_dtype` must be float32, float16, bfloat16 or None, got {vision_dtype!r}")
    if vision_dtype in _HALF and not freeze_vision:
        raise ValueError(f"`vision_dtype` must be float32 or None for a tower that is trained, got {vision_dtype}")


def _check_width(config: Blip2Config, qformer: dict[str, Any]) -> None:
    width = qformer.get("encoder_hidden_size", config.vision_config.hidden_size)
    if width != config.vision_config.hidden_size:
        raise ValueError(
            f"`encoder_hidden_size` must be the tower's width {config.vision_config.hidden_size}, got {width}"
        )


def _qformer_fields(text: str, bert: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """BERT's config with the special tokens of its tokenizer, `[DEC]` among them, and the overrides."""
    rows = bert["vocab_size"]
    fields = {**bert, "use_qformer_text_input": True}
    if has_tokenizer(text):
        tokenizer = stage1_tokenizer(text)
        fields["pad_token_id"] = tokenizer.pad_token_id
        fields["bos_token_id"] = tokenizer.bos_token_id
        fields["eos_token_id"] = tokenizer.sep_token_id
        needed = max(rows, len(tokenizer), tokenizer.bos_token_id + 1)
    else:
        fields["bos_token_id"] = rows
        fields["eos_token_id"] = BERT_SEP if rows > BERT_SEP else None
        needed = rows + 1
        logger.warning(
            f"{text} has no tokenizer: [DEC] is taken to be token {rows} (new), [SEP] to be {fields['eos_token_id']}"
        )
    fields = {**fields, "vocab_size": needed, **overrides}
    if fields["vocab_size"] < needed:
        raise ValueError(f"`vocab_size` must be at least {needed} (tokens of {text} and [DEC]), got {overrides}")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if fields[name] is not None and not 0 <= fields[name] < fields["vocab_size"]:
            raise ValueError(f"`{name}` must be below `vocab_size` {fields['vocab_size']}, got {fields[name]}")
    return fields


def _check_result(model, info: dict[str, Any], tower: VisionSource, words: BertWeights, text: str) -> list[str]:
    """The keys that were newly initialised; raises for any that should not have been."""
    shapes = {key: f"{list(found)} instead of {list(expected)}" for key, found, expected in info["mismatched_keys"]}
    missing = set(info["missing_keys"]) - set(shapes)
    optional = [*_NEW, tower.optional]
    if not any(key.startswith("lm_head.") for key in words.tensors):
        optional.append(r"^lm_head\.")
    absent = {key for key in missing - {_TIED} if not any(re.match(place, key) for place in optional)}
    kinds = {"missing": absent, "unexpected": set(info["unexpected_keys"]), "of another shape": set(shapes)}
    problems = []
    for argument, source in (("vision", tower.name), ("text", text)):
        for kind, keys in kinds.items():
            own = sorted(key for key in keys if key.startswith("vision_model.") == (argument == "vision"))
            if own:
                named = ", ".join(f"{key} {shapes[key]}" if key in shapes else key for key in own[:8])
                more = f" and {len(own) - 8} more" if len(own) > 8 else ""
                problems.append(f"`{argument}` {source}: {len(own)} keys {kind}: {named}{more}")
    if problems:
        raise ValueError("the backbones do not fit their configs: " + "; ".join(problems))
    return [key for key in model.state_dict() if key in missing and key != _TIED]


def _report(model, tower: VisionSource, words: BertWeights, new: list[str]) -> BackboneReport:
    sizes = {key: tensor.numel() for key, tensor in model.state_dict().items()}
    tied = TensorOrigin(_TIED, None, None, 0, "tied to embeddings.word_embeddings.weight")
    made = [TensorOrigin(key, None, None, sizes[key], _how(key, model.config, tower)) for key in new]
    return BackboneReport(
        loaded=report_rows([*tower.loaded, *words.loaded, tied]),
        initialised=report_rows([*made, *words.initialised]),
        dropped=report_rows([*tower.dropped, *words.dropped]),
    )


def _how(key: str, config: Blip2Config, tower: VisionSource) -> str:
    """How a tensor was initialised, in words; the same for weight and bias of a module."""
    if key.startswith("vision_model.") and not key.startswith("vision_model.post_layernorm."):
        return "random tower" if tower.name is None else NOT_USED
    if key == "temperature":
        return str(config.temperature_init)
    if key == "lm_head.decoder.bias":  # its weight is tied
        return "0"
    if "norm" in key.lower():
        return "weight 1, bias 0"
    part = config.qformer_config if key.startswith(("qformer.", "query_tokens")) else config
    drawn = f"N(0, {part.initializer_range})"
    return drawn if key == "query_tokens" else f"weight {drawn}, bias 0"
