"""What the files of a checkpoint say about its language model, read without building a config or a model."""

import json
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json")


def read_json(name: str, filename: str, **hub: Any) -> dict[str, Any]:
    """A file of a checkpoint; empty if the checkpoint does not have it."""
    path = cached_file(
        name,
        filename,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def processor_origin(name: str, config: dict[str, Any], **hub: Any) -> str | None:
    """The checkpoint whose processor a connector-only checkpoint uses; None if `name` has processor files itself.

    Args:
        config: the `config.json` of `name`.
    """
    origin = config.get("connector_of")
    if not origin or any(read_json(name, filename, **hub) for filename in _PROCESSOR_FILES):
        return None
    return str(origin)


def has_no_image_token(config: dict[str, Any]) -> bool:
    is_blip2 = "qformer_config" in config
    return is_blip2 and config.get("image_token_index") is None and config.get("image_token_id") is None


def is_encoder_decoder(config: dict[str, Any]) -> bool | None:
    """What a model's `config.json` says about its language model; None if nothing."""
    text_config = config.get("text_config") or {}
    if "is_encoder_decoder" in text_config:
        return bool(text_config["is_encoder_decoder"])
    if "use_decoder_only_language_model" in config:
        return not config["use_decoder_only_language_model"]
    if "model_type" in text_config:
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

        return text_config["model_type"] in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return None


def generation_end(
    config: dict[str, Any], generation: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """The token that the checkpoint's generation stops at, if it is not the tokenizer's end token."""
    end = generation.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    end = end[0] if isinstance(end, list) and end else end
    if not isinstance(end, int) or end == tokenizer.eos_token_id or not 0 <= end < len(tokenizer):
        return None
    text = tokenizer.decode([end])
    return (
        text
        if tokenizer(text, add_special_tokens=False)["input_ids"] == [end]
        else tokenizer.convert_ids_to_tokens(end)
    )
