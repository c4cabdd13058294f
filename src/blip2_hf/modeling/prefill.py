"""A prompt that is computed once per row, not once per beam, sample or answer.

`GenerationMixin` repeats the prompt for every beam before its first forward pass. Here the language model reads the
prompt first, and the sequences of a row share its keys and values (`beam_cache`).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .beam_cache import share_prompt
from .prompts import Prompt

# Options with which `generate` runs the prompt in a way of its own.
_OWN_PREFILL = ("past_key_values", "assistant_model", "custom_generate", "encoder_outputs", "decoder_input_ids")
# Arguments of `generate`, beside settings, that a loop of one's own is given what they come to.
_SEARCH_OPTIONS = frozenset({"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"})
# `rope_type` whose frequencies change with the length.
_TURNING = ("dynamic", "longrope")


def repeats(config: GenerationConfig) -> int:
    """How many sequences are decoded per row of the prompt."""
    return max(config.num_beams or 1, config.num_return_sequences or 1)


def can_prefill_once(model: PreTrainedModel, config: GenerationConfig, options: dict[str, Any]) -> bool:
    """Whether the prompt can be computed before `generate` with the same result, and it pays."""
    return (
        repeats(config) > 1
        and config.use_cache is not False
        and config.cache_implementation is None
        and config.prefill_chunk_size is None
        and config.prompt_lookup_num_tokens is None
        # these look at the encoder's input, of which `generate` sees nothing behind given encoder outputs
        and config.encoder_repetition_penalty in (None, 1.0)
        and not config.encoder_no_repeat_ngram_size
        and not config.output_attentions
        and not config.output_hidden_states
        and not any(options.get(name) is not None for name in _OWN_PREFILL)
        and _prepares_as_transformers(model)
        and can_share(model)
    )


def can_search(model: PreTrainedModel, config: GenerationConfig, options: dict[str, Any]) -> bool:
    """Whether `generate` may run `beam_search.beam_search` in place of its own loop, with the same result."""
    return (
        can_prefill_once(model, config, options)
        and config.get_generation_mode() == GenerationMode.BEAM_SEARCH
        # of the arguments that are no settings, what `generate` prepares for a loop of the caller's own
        and all(name in _SEARCH_OPTIONS for name, value in options.items() if value is not None)
        and config.stop_strings is None
        and not config.token_healing
        and not config.low_memory
        # beams that are one sequence see each other's keys at a weight of 0, which is no number times one that is none
        and not config.remove_invalid_values
        and not _in_step(model)
    )


def _prepares_as_transformers(model: PreTrainedModel) -> bool:
    """Whether nobody else has a say in what the model is called with at each step."""
    prepare = getattr(model.prepare_inputs_for_generation, "__func__", None)
    return prepare is not None and prepare.__module__.startswith("transformers.")


def _in_step(model: PreTrainedModel) -> bool:
    """Whether processes share the weights, so that all must take the same number of steps."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)


def can_share(model: PreTrainedModel) -> bool:
    """Whether several sequences can go on from one prompt that the model has read."""
    if not model._supports_default_dynamic_cache() or model._is_stateful:
        return False
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False  # some old models keep no keys and values
    if _turns_with_length(model):
        return False
    # the state of a linear attention or a convolution cannot be repeated
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _turns_with_length(model: PreTrainedModel) -> bool:
    """Whether the frequencies of rotary positions follow the longest sequence of a call: then keys depend on what is
    read together, and when."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # one, or by the layers' type
    return any(kind.get("rope_type") in _TURNING for kind in kinds)


def prefill_causal(model: PreTrainedModel, prompt: Prompt, config: GenerationConfig) -> dict[str, Any]:
    """Arguments for `generate` of a decoder-only model: a cache of all positions but the last, for every beam.

    The last position is left to `generate`, which needs its logits once per beam.
    """
    if prompt.embeds.shape[1] < 2:
        return {}
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    model.base_model(
        inputs_embeds=prompt.embeds[:, :-1],
        attention_mask=prompt.mask[:, :-1],
        past_key_values=cache,
        use_cache=True,
        **position_arguments(model, prompt.position_ids()[:, :-1]),
    )
    share_prompt(cache, repeats(config), room=min(config.max_new_tokens or 32, 128))
    return {"past_key_values": cache}


def prefill_seq2seq(model: PreTrainedModel, prompt: Prompt, config: GenerationConfig) -> dict[str, Any]:
    """Arguments for `generate` of an encoder-decoder model: the encoder's output, and the decoder's keys and values
    of it for every beam."""
    # The step is on any token: its self-attention part is thrown away.
    encoded, _, cache = read_seq2seq(model, prompt, prompt.mask.new_zeros(prompt.mask.shape[0], 1))
    cross = cache.cross_attention_cache
    share_prompt(cross, repeats(config))
    decoder_config = model.config.get_text_config(decoder=True)
    return {
        "encoder_outputs": encoded,
        "past_key_values": EncoderDecoderCache(DynamicCache(config=decoder_config), cross),
    }


def read_causal(model: PreTrainedModel, prompt: Prompt, cache: Cache | None = None) -> torch.Tensor:
    """Reads a prompt whose padding is on the left, into `cache` if there is one: the logits [B, V] behind it."""
    caching = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
    return model(
        inputs_embeds=prompt.embeds,
        attention_mask=prompt.mask,
        **caching,
        return_dict=True,
        **position_arguments(model, prompt.position_ids()),
        **last_logits(model, 1),
    ).logits[:, -1]


def read_seq2seq(
    model: PreTrainedModel, prompt: Prompt, start: torch.Tensor
) -> tuple[BaseModelOutput, torch.Tensor, EncoderDecoderCache]:
    """Reads a prompt and takes one step of the decoder, which computes its keys and values of the encoder's output.

    Args:
        start: [B, 1] the ids of the step.

    Returns:
        the encoder's output, the logits [B, V] behind `start`, and the cache of both.
    """
    encoded = model.get_encoder()(inputs_embeds=prompt.embeds, attention_mask=prompt.mask, return_dict=True)
    return encoded, *read_decoder(model, encoded, prompt.mask, start)


def read_decoder(
    model: PreTrainedModel, encoded: ModelOutput, mask: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, EncoderDecoderCache]:
    """As `read_seq2seq`, behind the encoder's output of a prompt with this mask [B, S]."""
    cross = DynamicCache()  # not of the config: a sliding window of the decoder is not one over the encoder
    cache = EncoderDecoderCache(DynamicCache(config=model.config.get_text_config(decoder=True)), cross)
    logits = model(
        encoder_outputs=encoded,
        attention_mask=mask,
        decoder_input_ids=start,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
    ).logits
    return logits[:, -1], cache


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether a language model is told the positions of its tokens (the others derive them from the mask)."""
    return "position_ids" in inspect.signature(model.forward).parameters


def position_arguments(model: PreTrainedModel, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """`position_ids` for a language model that takes them."""
    return {"position_ids": position_ids} if takes_positions(model) else {}


def last_logits(model: PreTrainedModel, count: int) -> dict[str, int]:
    """The argument that makes a language model compute the logits of its last `count` positions only, if it has one."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
