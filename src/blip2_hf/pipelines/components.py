"""Model and processor of a pipeline, from whatever the caller gave."""

from __future__ import annotations

import copy
import os
from typing import Any

from ..configuration import Blip2Config
from ..image_processing import Blip2ImageProcessor
from ..modeling.generation import Blip2ForConditionalGeneration
from ..processing import Blip2Processor


def our_model(model: Any) -> Blip2ForConditionalGeneration:
    """`model` if it is ours (also inside a PEFT model); `transformers`' class of the same name becomes ours.

    Raises:
        ValueError: for any other model.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(inner, Blip2ForConditionalGeneration):
        return model
    kind = type(model)
    if kind.__name__ == "Blip2ForConditionalGeneration" and kind.__module__.startswith("transformers."):
        return _taken_over(model)
    raise ValueError(f"`model` must be a Blip2ForConditionalGeneration, a name or a folder, got {kind.__name__}")


def _taken_over(peer: Any) -> Blip2ForConditionalGeneration:
    """Our model on the weights of `transformers`' (shared, not copied)."""
    import torch

    config = Blip2Config.from_dict({**peer.config.to_dict(), "name_or_path": peer.config._name_or_path})
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    model.language_model = peer.language_model
    own = {name: tensor for name, tensor in peer.state_dict().items() if not name.startswith("language_model.")}
    _, unexpected = model.load_state_dict(own, strict=False, assign=True)
    left = unexpected + [name for name, tensor in model.named_parameters() if tensor.is_meta]
    left += [name for name, tensor in model.named_buffers() if tensor.is_meta]
    if left:
        raise ValueError(
            f"`model` of transformers cannot be taken over ({', '.join(left[:5])} have no counterpart): load it with "
            "blip2_hf.Blip2ForConditionalGeneration.from_pretrained"
        )
    model.generation_config = copy.deepcopy(peer.generation_config)
    if hasattr(peer, "hf_device_map"):
        raise ValueError(
            "`model` of transformers was spread over devices: load it with "
            "blip2_hf.Blip2ForConditionalGeneration.from_pretrained(..., device_map=...)"
        )
    return model.train(peer.training)


def find_processor(model: Any, processor: Any, tokenizer: Any = None, image_processor: Any = None) -> Blip2Processor:
    """The processor of a model: the given one, one made of the given parts, or that of the model's own folder.

    Raises:
        ValueError: if there is none, or if it writes another image placeholder than the model reads.
    """
    config = model.config
    if isinstance(processor, str | os.PathLike):
        processor = Blip2Processor.from_pretrained(processor)
    elif processor is not None:
        processor = _our_processor(processor, config)
    elif tokenizer is not None and image_processor is not None:
        queries = None if config.image_token_index is None else config.num_query_tokens
        processor = Blip2Processor(
            _our_image_processor(image_processor),
            tokenizer,
            num_query_tokens=queries,
            is_encoder_decoder=config.is_encoder_decoder,
        )
    else:
        processor = _processor_of(config)
    _check_fits(config, processor)
    return processor


def _processor_of(config: Blip2Config) -> Blip2Processor:
    source = config._name_or_path
    missing = "`processor` must be given"
    if not source:
        raise ValueError(f"{missing}: the model was not loaded from a folder or the Hub, where it could be found")
    try:
        return Blip2Processor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{missing}: none could be loaded from {source!r}, where the model is from: {error}"
        ) from error


def _our_processor(processor: Any, config: Blip2Config) -> Blip2Processor:
    if isinstance(processor, Blip2Processor):
        return processor
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ValueError(f"`processor` must be a Blip2Processor, a name or a folder, got {type(processor).__name__}")
    return Blip2Processor(
        _our_image_processor(processor.image_processor),
        processor.tokenizer,
        qformer_tokenizer=getattr(processor, "qformer_tokenizer", None),
        num_query_tokens=getattr(processor, "num_query_tokens", None),
        is_encoder_decoder=config.is_encoder_decoder,
    )


def _our_image_processor(image_processor: Any) -> Any:
    """`transformers`' BLIP image processors become ours, which loads files too; any other is left as it is."""
    if type(image_processor).__name__.startswith("BlipImageProcessor"):
        return Blip2ImageProcessor.from_dict(image_processor.to_dict())
    return image_processor


def _check_fits(config: Blip2Config, processor: Blip2Processor) -> None:
    expected = (None, None)
    if config.image_token_index is not None:
        expected = (config.num_query_tokens, config.image_token_index)
    got = (processor.num_query_tokens, processor.image_token_id)
    if got != expected:
        raise ValueError(
            f"`processor` does not fit the model: it writes {got[0]} placeholders of token {got[1]} for an image, the "
            f"model reads {expected[0]} of token {expected[1]} (`num_query_tokens` and the tokenizer's image token)"
        )
    reads = config.qformer_config.use_qformer_text_input
    if reads != (processor.qformer_tokenizer is not None):
        raise ValueError(
            f"`processor` does not fit the model: its `qformer_tokenizer` must be {'given' if reads else 'None'}, as "
            f"the model's Q-Former {'reads' if reads else 'does not read'} text"
        )
