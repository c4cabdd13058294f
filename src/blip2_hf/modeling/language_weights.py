"""Language models for a new model: which are taken, and their weights from wherever they are."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..checkpoints import path_or_id
from ..configuration import Blip2Config
from .backbone_report import SourceWeights, TensorOrigin
from .loading import without_load_report
from .windows import T5_KINDS

logger = logging.get_logger(__name__)


@dataclass
class LanguageSource:
    """A language model whose weights are yet to be read.

    Attributes:
        config: its config, with the end of text that BLIP-2 uses.
        model_class: class of `transformers` that it is.
        image_token_index: id of the image placeholder.
        name: the folder or Hub id; None for a random language model.
        dtype: precision to read the weights in; None: that of the files.
        quantization_config: as of `from_pretrained`.
        end_token_id: end of text, if it is another than the checkpoint's own.
        pad_token_id: what generated rows are padded with, if the checkpoint does not say so.
        weights: after `load`, what became of the tensors.
        made: after `load`, the tensors of a random language model.
    """

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    image_token_index: int
    name: str | None = None
    dtype: torch.dtype | None = None
    quantization_config: Any = None
    end_token_id: int | None = None
    pad_token_id: int | None = None
    weights: SourceWeights = field(default_factory=SourceWeights)
    made: list[TensorOrigin] = field(default_factory=list)

    def load(self) -> PreTrainedModel:
        """The language model in evaluation mode, loaded once.

        Raises:
            ValueError: for files that cannot be read, lack tensors or have some of another shape.
        """
        if self.name is None:
            model = self.model_class._from_config(self.config, dtype=self.dtype or torch.float32)
        else:
            model = self._read()
        _check_t5(self.config, {weight.dtype for weight in model.parameters()}, f"in the files of {self.name}")
        if self.end_token_id is not None:
            model.generation_config.eos_token_id = model.config.eos_token_id = self.end_token_id
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = self.pad_token_id
        tied = model.all_tied_weights_keys
        sizes = {key: weight.numel() for key, weight in model.named_parameters()}
        for key in model.state_dict():
            target, size = f"language_model.{key}", sizes.get(key, 0)  # buffers are no parameters
            if key in tied:
                note = f"tied to language_model.{tied[key]}"
                self.weights.loaded.append(TensorOrigin(target, None, None, 0, note))
            elif self.name is None:
                self.made.append(TensorOrigin(target, None, None, size, "random language model"))
            else:
                self.weights.loaded.append(TensorOrigin(target, self.name, key, size))
        return model.eval()

    def _read(self) -> PreTrainedModel:
        options: dict[str, Any] = {"dtype": self.dtype or "auto"}
        if self.quantization_config is not None:
            options["quantization_config"] = self.quantization_config
        try:
            with without_load_report():
                model, info = self.model_class.from_pretrained(
                    self.name, output_loading_info=True, ignore_mismatched_sizes=True, **options
                )
        except (SafetensorError, OSError, RuntimeError, EOFError) as error:
            why = str(error).split("\n")[0]
            raise ValueError(f"`language` {self.name} cannot be loaded: {why}") from error
        shapes = [f"{key} {list(found)} instead of {list(wanted)}" for key, found, wanted in info["mismatched_keys"]]
        for kind, keys in (("lacks", info["missing_keys"]), ("has other shapes for", shapes)):
            if keys:
                raise ValueError(f"`language` {self.name} {kind} {len(keys)} tensors of its model: {sorted(keys)[:8]}")
        why = "not part of the language model"
        self.weights.dropped = [
            TensorOrigin(None, self.name, key, None, why) for key in sorted(info["unexpected_keys"])
        ]
        return model


def language_source(language: Any, dtype: torch.dtype | None, quantization_config: Any) -> LanguageSource:
    """What `language` names; reads its config and tokenizer only.

    Args:
        language: a folder or a Hub id, or a config or its dictionary, for a random language model.
        dtype, quantization_config: as in `LanguageSource`.

    Raises:
        ValueError: for anything else, for models that are no text-only causal or sequence-to-sequence ones, a T5 in
            float16.
        OSError: for a name that is neither a folder nor on the Hub.
    """
    if isinstance(language, dict | PreTrainedConfig):
        if quantization_config is not None:
            raise ValueError("`quantization_config` needs a `language` with weights, got a config")
        config = Blip2Config(text_config=language).text_config
        source = LanguageSource(config, _model_class(config, None), config.get_text_config().vocab_size, dtype=dtype)
        _check_t5(config, {dtype}, f"{dtype}")
        return source
    # All of the processors, for this alone.
    from transformers.models.auto.configuration_auto import AutoConfig

    from ..stage1_processing import has_tokenizer
    from ..stage2_processing import image_token_id, language_tokenizer, text_end
    from ..text_rows import token_id

    name = path_or_id("language", language)
    config = AutoConfig.from_pretrained(name)
    model_class = _model_class(config, name)
    _check_t5(config, {dtype}, f"{dtype}")
    if dtype is None:
        _check_t5(config, {config.dtype}, f"{config.dtype} in the files of {name}")
    source = LanguageSource(config, model_class, config.get_text_config().vocab_size, name, dtype, quantization_config)
    if not has_tokenizer(name):
        logger.warning(f"{name} has no tokenizer: the image placeholder is token {source.image_token_index}")
        return source
    tokenizer = language_tokenizer(name)
    source.image_token_index, source.pad_token_id = image_token_id(tokenizer), tokenizer.pad_token_id
    end = text_end(tokenizer, config.model_type)
    if end is not None:
        source.end_token_id = config.eos_token_id = token_id(tokenizer, end)
    return source


def _model_class(config: PreTrainedConfig, name: str | None) -> type[PreTrainedModel]:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    given = f"`language`{'' if name is None else ' ' + os.fspath(name)} of model_type {config.model_type!r}"
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        raise ValueError(f"{given} is not a causal or sequence-to-sequence language model")
    model_class = mapping[type(config)]
    modalities = model_class.input_modalities
    modalities = {modalities} if isinstance(modalities, str) else set(modalities)
    if modalities != {"text"}:
        raise ValueError(
            f"{given} must be a language model alone, but it takes {' and '.join(sorted(modalities))}; give the "
            "checkpoint of its language model"
        )
    reads_both_ways = not config.is_encoder_decoder and type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if reads_both_ways and not getattr(config, "is_decoder", False):
        raise ValueError(f"{given} is not a causal language model: it was made to fill in masked words")
    return model_class


def _check_t5(config: PreTrainedConfig, dtypes: set[torch.dtype | None], found: str) -> None:
    if config.model_type in T5_KINDS and torch.float16 in dtypes:
        raise ValueError(
            f"`language_dtype` must not be float16 for a language model of type {config.model_type!r}, whose "
            f"activations overflow in it, got {found}; use torch.bfloat16, as the paper does"
        )
