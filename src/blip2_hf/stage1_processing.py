"""Tokenizer and processor for a model that `Blip2ForImageTextRetrieval.from_backbones` puts together."""

from __future__ import annotations

import os
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .checkpoint_facts import processor_origin, read_json
from .checkpoints import path_or_id, resolve_checkpoint
from .configuration import Blip2Config
from .image_processing import Blip2ImageProcessor
from .processing import Blip2Processor

DECODER_START = "[DEC]"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
# What of a tower's image processor holds for whole, square pictures as well.
_IMAGE_FIELDS = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def has_tokenizer(source: str) -> bool:
    """Whether a folder or Hub repository has files of a tokenizer."""
    from transformers.utils.hub import cached_file

    return any(cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in _TOKENIZER_FILES)


def stage1_tokenizer(text: str | os.PathLike = "bert-base-uncased") -> PreTrainedTokenizerBase:
    """BERT's tokenizer with `[DEC]` as `bos_token`, which is added unless it is there.

    Args:
        text: what `from_backbones` was given: a folder or a Hub id of a BERT; or a checkpoint of stage 1, also a
            connector-only one or a short name.

    Returns:
        The tokenizer; its longest text is at most the number of BERT's positions.

    Raises:
        ValueError: if there is none, or if it has no [CLS], [SEP] or padding token.
    """
    source = resolve_checkpoint(path_or_id("text", text))
    config = read_json(source, "config.json")
    origin = processor_origin(source, config)
    files = source if origin is None else resolve_checkpoint(origin)
    if not has_tokenizer(files):
        raise ValueError(f"`text` {files} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
    tokenizer = AutoTokenizer.from_pretrained(files)
    missing = [name for name in ("cls_token", "sep_token", "pad_token") if getattr(tokenizer, name, None) is None]
    if missing:
        raise ValueError(f"`text` must have a BERT's tokenizer, the one of {files} has no {', '.join(missing)}")
    if tokenizer.bos_token != DECODER_START:
        tokenizer.add_special_tokens({"bos_token": DECODER_START})
    positions = (config.get("qformer_config") or config).get("max_position_embeddings")
    if isinstance(positions, int):
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def stage1_processor(
    vision: str | os.PathLike | dict[str, Any] | PreTrainedConfig,
    text: str | os.PathLike = "bert-base-uncased",
) -> Blip2Processor:
    """The processor of `from_backbones(vision, text)`: same arguments, same token ids.

    Pictures are resized as a whole to the square that the tower's positions are for, as in the original code,
    whatever the tower's own processor cuts off; mean, standard deviation and filter are the tower's where it has a
    `preprocessor_config.json`, else CLIP's and bicubic.

    Raises:
        ValueError: as `stage1_tokenizer`, and for a tower without an image size.
    """
    return Blip2Processor(tower_image_processor(vision), stage1_tokenizer(text))


def tower_image_processor(
    vision: str | os.PathLike | dict[str, Any] | PreTrainedConfig, image_size: int | None = None
) -> Blip2ImageProcessor:
    """The image processor of `stage1_processor`.

    Args:
        vision: what `from_backbones` was given; a connector-only BLIP-2 has its origin's mean, deviation and filter.
        image_size: side in pixels; None: that of the tower.

    Raises:
        ValueError: for a tower without an image size.
    """
    settings: dict[str, Any] = {}
    config: Any = vision
    if isinstance(vision, str | os.PathLike):
        source = resolve_checkpoint(path_or_id("vision", vision))
        raw, _ = PreTrainedConfig.get_config_dict(source)
        config = Blip2Config.from_pretrained(source) if "qformer_config" in raw else _with_class(source, raw)
        origin = processor_origin(source, raw)
        files = source if origin is None else resolve_checkpoint(origin)
        if read_json(files, "preprocessor_config.json") or read_json(files, "processor_config.json"):
            own = Blip2ImageProcessor.from_pretrained(files)
            settings = {name: getattr(own, name) for name in _IMAGE_FIELDS}
    tower = Blip2Config(vision_config=getattr(config, "vision_config", config), vision_feature_layer=-1).vision_config
    return Blip2ImageProcessor(size=image_side(tower) if image_size is None else image_size, **settings)


def image_side(tower: PreTrainedConfig) -> int:
    """Side in pixels of the square images that a tower's positions are for.

    Raises:
        ValueError: if its config has no square image size.
    """
    size = getattr(tower, "image_size", None)
    if size is None and getattr(tower, "num_patches", None):  # SigLIP2 counts patches
        size = int(tower.num_patches**0.5) * tower.patch_size
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1 or not isinstance(next(iter(sides)), int):
        raise ValueError(f"`vision` of model_type {tower.model_type!r} must have a square `image_size`, got {size!r}")
    return sides.pop()


def _with_class(source: str, raw: dict[str, Any]) -> dict[str, Any] | PreTrainedConfig:
    """The config of a tower; our own has no class that AutoConfig knows by this name alone."""
    if raw.get("model_type") in (None, "", "blip_2_vision_model"):
        return raw
    from transformers.models.auto.configuration_auto import AutoConfig

    return AutoConfig.from_pretrained(source)
