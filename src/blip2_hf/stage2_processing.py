"""Tokenizer and processor for a model that `Blip2ForConditionalGeneration.from_backbones` puts together."""

from __future__ import annotations

import os
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .checkpoints import path_or_id, resolve_checkpoint
from .configuration import Blip2Config
from .image_places import image_token_of
from .processing import Blip2Processor
from .stage1_processing import has_tokenizer, stage1_tokenizer, tower_image_processor

# What ends a text of OPT, as in the original code: its own end token is also what every text begins with.
_OPT_END = "\n"


def language_tokenizer(language: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model with an image token, and with a padding token.

    The image token is the tokenizer's own, or `<image>` with the first id behind its vocabulary. Where there is no
    padding token (Llama, GPT-2) it is the unknown token, else the end token: padding is masked everywhere, and no row
    of the language model's embeddings is needed for it.

    Args:
        language: what `from_backbones` was given: a folder or a Hub id.

    Raises:
        ValueError: if there is no tokenizer, or none of the three tokens.
    """
    source = path_or_id("language", language)
    if not has_tokenizer(source):
        raise ValueError(f"`language` {source} has no tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"`language` {source} has a tokenizer without padding, unknown and end token")
    image_token_of(tokenizer)
    return tokenizer


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the image placeholder in what `language_tokenizer` returned."""
    return tokenizer.convert_tokens_to_ids(image_token_of(tokenizer))


def text_end(tokenizer: PreTrainedTokenizerBase, model_type: str) -> str | None:
    """What ends a target text and generation, if not the tokenizer's end token: a line break for OPT.

    Args:
        model_type: of the language model's config.
    """
    if model_type != "opt" or len(tokenizer(_OPT_END, add_special_tokens=False)["input_ids"]) != 1:
        return None
    return _OPT_END


def stage2_processor(
    vision: str | os.PathLike | dict[str, Any] | PreTrainedConfig | None,
    language: str | os.PathLike,
    *,
    stage1: str | os.PathLike | None = None,
    text_branch: bool = False,
    text: str | os.PathLike | None = None,
    image_size: int | None = None,
    num_query_tokens: int | None = None,
) -> Blip2Processor:
    """The processor of `from_backbones(vision, language, stage1)`: same arguments, same token ids.

    Pictures are treated as by `stage1_processor`.

    Args:
        vision, language, stage1, text_branch, text: as in `from_backbones`. With `text_branch` the Q-Former's tokenizer
            is that of `text`, else of `stage1`.
        image_size: side of the pictures in pixels, for `resize_image_positions(image_size)`; None: the tower's.
        num_query_tokens: Q; None: that of `stage1`, else 32.

    Raises:
        ValueError: without a tower or tokenizer, and for a `num_query_tokens` that `stage1` does not have.
    """
    if stage1 is not None:
        stage1 = resolve_checkpoint(path_or_id("stage1", stage1))
        queries = Blip2Config.from_pretrained(stage1).num_query_tokens
        if num_query_tokens not in (None, queries):
            raise ValueError(f"`num_query_tokens` must be that of `stage1`, {queries}, got {num_query_tokens!r}")
        num_query_tokens = queries
    if vision is None and stage1 is None:
        raise ValueError("`vision` must be given without `stage1`, got None")
    if text_branch and text is None and stage1 is None:
        raise ValueError("`text` must be a BERT for `text_branch=True` without `stage1`, got None")
    questions = text if text is not None else stage1
    tokenizer = language_tokenizer(language)
    config = AutoConfig.from_pretrained(os.fspath(language))
    return Blip2Processor(
        tower_image_processor(stage1 if vision is None else vision, image_size),
        tokenizer,
        num_query_tokens=Blip2Config.num_query_tokens if num_query_tokens is None else num_query_tokens,
        qformer_tokenizer=stage1_tokenizer(questions) if text_branch else None,
        is_encoder_decoder=bool(config.is_encoder_decoder),
        suffix_end=text_end(tokenizer, config.model_type),
    )
