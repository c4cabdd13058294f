"""What `from_backbones` of both models shares: checking arguments, building, accounting for every tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from ..configuration import BERT_SEP, Blip2Config, Blip2QFormerConfig
from .backbone_report import BackboneReport, SourceWeights, TensorOrigin, report_rows
from .bert_weights import bert_fields
from .loading import CheckpointMixin, without_load_report
from .vision_weights import NOT_USED, VisionSource

logger = logging.get_logger(__name__)

HALF_PRECISIONS = (torch.float16, torch.bfloat16)
# Keys (regular expressions) that no BERT has, in the parts that both models have.
NOT_IN_BERT = (r"^query_tokens$", r"^qformer\.encoder\.layer\.\d+\.crossattention\.")


# -- arguments -------------------------------------------------------------------------------------------------------


def take_overrides(overrides: dict[str, Any], refused: Collection[str]) -> dict[str, Any]:
    """Refuses unknown fields of `Blip2Config` and `refused` ones; returns those of the Q-Former, taken out."""
    known = set(Blip2Config.__annotations__) - set(refused)
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"`from_backbones` got unknown fields {unknown}; Blip2Config has {sorted(known)}")
    qformer = overrides.pop("qformer_config", None) or {}
    if not isinstance(qformer, dict):
        raise ValueError(f"`qformer_config` must be a dictionary of the fields to change, got {type(qformer).__name__}")
    known = set(Blip2QFormerConfig.__annotations__)
    if unknown := sorted(set(qformer) - known):
        raise ValueError(f"`qformer_config` has unknown fields {unknown}; Blip2QFormerConfig has {sorted(known)}")
    return qformer


def check_dtype(argument: str, dtype: Any, frozen: bool) -> None:
    """Raises ValueError unless it is a floating precision or None, and a half one only for what is frozen."""
    if dtype not in (None, torch.float32, *HALF_PRECISIONS):
        raise ValueError(f"`{argument}` must be float32, float16, bfloat16 or None, got {dtype!r}")
    if dtype in HALF_PRECISIONS and not frozen:
        raise ValueError(f"`{argument}` must be float32 or None for a part that is trained, got {dtype}")


def check_width(config: Blip2Config, qformer: dict[str, Any]) -> None:
    """Raises ValueError for an `encoder_hidden_size` that is not the tower's width."""
    width = qformer.get("encoder_hidden_size", config.vision_config.hidden_size)
    if width != config.vision_config.hidden_size:
        raise ValueError(
            f"`encoder_hidden_size` must be the tower's width {config.vision_config.hidden_size}, got {width}"
        )


def qformer_fields(text: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """BERT's config with the special tokens of its tokenizer, `[DEC]` among them, and the overrides."""
    from ..stage1_processing import has_tokenizer, stage1_tokenizer  # all of the processors, for this alone

    bert = bert_fields(text)
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


# -- building --------------------------------------------------------------------------------------------------------


def name_part(part: PreTrainedConfig, name: str | None) -> None:
    """Puts the source of a part into its config, for the model card; a folder means nothing elsewhere."""
    if name is not None:
        part._name_or_path = "" if os.path.isdir(name) else name


def build_from(model_class: type, config: Blip2Config, tensors: dict[str, torch.Tensor]):
    """A float32 model with these tensors and new values for the rest, and what `transformers` tells of the loading."""
    # The way around the checkpoint's checks: there is no checkpoint, and what may be missing differs.
    with without_load_report():
        model, info = super(CheckpointMixin, model_class).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model.config._name_or_path = model.name_or_path = ""
    return model, info


def new_keys(
    model,
    info: dict[str, Any],
    tower: VisionSource,
    others: tuple[str, str | None],
    optional: Sequence[str],
) -> list[str]:
    """The keys that were newly initialised, in the model's order.

    Args:
        info: of `build_from`.
        tower: where `vision_model` came from; has its own optional keys.
        others: argument and name of where the rest came from.
        optional: keys of the rest (regular expressions) that this may lack.

    Raises:
        ValueError: for keys that should not be missing, that are too many or of another shape (naming them).
    """
    shapes = {key: f"{list(found)} instead of {list(expected)}" for key, found, expected in info["mismatched_keys"]}
    missing = set(info["missing_keys"]) - set(shapes) - model.all_tied_weights_keys.keys()
    absent = {key for key in missing if not any(re.match(place, key) for place in (*optional, tower.optional))}
    kinds = {"missing": absent, "unexpected": set(info["unexpected_keys"]), "of another shape": set(shapes)}
    problems = []
    for argument, source in (("vision", tower.name), others):
        for kind, keys in kinds.items():
            own = sorted(key for key in keys if key.startswith("vision_model.") == (argument == "vision"))
            if own:
                named = ", ".join(f"{key} {shapes[key]}" if key in shapes else key for key in own[:8])
                more = f" and {len(own) - 8} more" if len(own) > 8 else ""
                problems.append(f"`{argument}` {source}: {len(own)} keys {kind}: {named}{more}")
    if problems:
        raise ValueError("the backbones do not fit their configs: " + "; ".join(problems))
    return [key for key in model.state_dict() if key in missing]


# -- report ----------------------------------------------------------------------------------------------------------


def tensor_origins(weights: Sequence[SourceWeights | VisionSource], made: Sequence[TensorOrigin]) -> BackboneReport:
    """The report on what came from these sources, and on what was newly made."""
    initialised = [origin for source in weights for origin in getattr(source, "initialised", ())]
    return BackboneReport(
        loaded=report_rows(origin for source in weights for origin in source.loaded),
        initialised=report_rows([*made, *initialised]),
        dropped=report_rows(origin for source in weights for origin in source.dropped),
    )


def made_origins(model, keys: Sequence[str], tower: VisionSource) -> list[TensorOrigin]:
    """How these tensors of the model were initialised."""
    sizes = {key: tensor.numel() for key, tensor in model.state_dict().items()}
    return [TensorOrigin(key, None, None, sizes[key], _how(key, model.config, tower)) for key in keys]


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
    return drawn if key == "query_tokens" or "embeddings." in key else f"weight {drawn}, bias 0"
