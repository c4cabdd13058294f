"""Captions written by the Q-Former itself, with the decoder of image-grounded text generation (Li et al. 2023,
sec. 3.2).

Text token t sees all queries, through their keys and values of the query pass, and the text up to t; the image is
seen by the queries alone. So an image is encoded once, and its caption needs neither tower nor cross-attention.

Shapes: N images, B rows, R = B times beams or samples, Q queries, T text tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from ..configuration import Blip2QFormerConfig
from .beam_cache import share_prompt
from .encoded import EncodedImages
from .masks import generation_mask
from .prefill import repeats
from .prompts import check_text, check_vocabulary, pad_right

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
# What `generate` takes beside the settings of a GenerationConfig. Not: assistants, negative prompts, custom loops.
_OPTIONS = frozenset(
    {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "streamer", "tokenizer"}
)
# Settings that would run the decoder in a way of its own, with the values that leave it alone.
_UNSUPPORTED = {
    "cache_implementation": (None,),
    "prefill_chunk_size": (None,),
    "guidance_scale": (None, 1),
    "token_healing": (None, False),
}


class QFormerCaptioningMixin(GenerationMixin):
    """`generate` of `Blip2ForImageTextRetrieval`."""

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @property
    def generation_config(self) -> GenerationConfig:
        """Defaults of `generate`. One that `transformers` derives from the model's config, which would name the tokens
        of the language model in `config.text_config`, is replaced by that of the Q-Former."""
        return self._captioning_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self._captioning_config = (
            _generation_config(self.config.qformer_config) if getattr(value, "_from_model_config", False) else value
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | EncodedImages | None = None,
        vision_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        generation_config: GenerationConfig | None = None,
        **generate_kwargs: Any,
    ) -> torch.Tensor | Any:
        """Captions images; every option of greedy and beam search and of sampling that `GenerationMixin.generate` has
        is taken (processors, stopping criteria, streamer, …).

        Images are encoded once, whatever the number of beams. A caption begins with [DEC]
        (`config.qformer_config.decoder_start_token_id`) and ends with [SEP]; a tokenizer's
        `batch_decode(…, skip_special_tokens=True)` gives its text. Defaults are those of `transformers`; the original
        code's are `num_beams=3, max_length=30, min_length=10` (both lengths with [DEC], as here).

        Args:
            pixel_values, image_embeds, vision_features, interpolate_pos_encoding: N images as in `encode_image`; what
                that returned (as `image_embeds`) is read only.
            input_ids: [B, T] beginnings of the captions, as the Q-Former's tokenizer gives them ([CLS] words [SEP]:
                then [CLS] is taken for [DEC], and [SEP] is left out), or beginning with [DEC]. One image per row, or
                one for all. Default: [DEC] alone.
            attention_mask: [B, T], 1 = real, padding on either side; default all real.
            generation_config, generate_kwargs: as in `GenerationMixin.generate`.

        Returns:
            Ids [R, T + new], the prompt and its continuation; unequal prompts have their padding on the left. A
            dictionary with `return_dict_in_generate=True`; its attentions are [R, heads, new positions, Q + seen].

        Raises:
            ValueError: for missing or surplus images, shapes that do not fit, ids outside the vocabulary, captions
                longer than the position embeddings, and options that are not supported or not known.
        """
        config, options = self._caption_options(generation_config, generate_kwargs)
        encoded = self.encode_image(pixel_values, image_embeds, vision_features, interpolate_pos_encoding)
        if not len(encoded):
            raise ValueError("at least one image must be given, got none")
        ids, mask = self._caption_prompt(len(encoded), input_ids, attention_mask)
        self._check_length(config, ids.shape[1])
        ids, mask = (rows.to(encoded.query_output.device) for rows in (ids, mask))
        decoder = _CaptionDecoder(self, encoded, ids.shape[0])
        if config.use_cache is not False:
            room = min(config.max_new_tokens or config.max_length or 32, 128)
            options["past_key_values"] = decoder.query_cache(repeats(config), room)
        return decoder.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)

    def compute_transition_scores(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `GenerationMixin.compute_transition_scores`, over the Q-Former's vocabulary."""
        return GenerationMixin.compute_transition_scores(
            SimpleNamespace(config=self.config.qformer_config), *args, **kwargs
        )

    def _caption_prompt(
        self, images: int, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [B, T] that begin with [DEC], padding on the left, and their mask; B is N, or any number for N = 1."""
        config = self.config.qformer_config
        start, end, vocabulary = config.decoder_start_token_id, config.eos_token_id, config.vocab_size
        if start >= vocabulary:
            raise ValueError(f"`config.qformer_config.bos_token_id` must be in 0 … {vocabulary - 1}, got {start}")
        if input_ids is None:
            if attention_mask is not None:
                raise ValueError("`attention_mask` was given without `input_ids`")
            ids = torch.full((images, 1), start)
            return ids, torch.ones_like(ids)
        check_text(input_ids, attention_mask)
        input_ids, attention_mask = self._without_placeholders(input_ids, attention_mask)
        if images not in (1, input_ids.shape[0]):
            raise ValueError(
                f"`input_ids` has {input_ids.shape[0]} rows for {images} images; give one per image or one image"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.ne(0).long()
        ids, mask = pad_right(input_ids.long(), mask)
        real = mask.bool()
        if not real.any(dim=1).all():
            raise ValueError(f"`attention_mask` must leave at least one real token in every row, got {mask.tolist()}")
        check_vocabulary(ids, mask, vocabulary)
        if config.pad_token_id is not None and (ids[real] == config.pad_token_id).any():
            raise ValueError(
                f"`input_ids` must have its padding (token {config.pad_token_id}) masked by `attention_mask`"
            )
        last = mask.sum(dim=1, keepdim=True) - 1
        ended = torch.zeros_like(real[:, :1]) if end is None else ids.gather(1, last).eq(end) & (last > 0)
        if not (ended[:, 0] | ids[:, 0].eq(start)).all():
            raise ValueError(
                f"every row of `input_ids` must be as the tokenizer gives it, [CLS] … [SEP] (token {end} at its end), "
                f"or begin with [DEC] (token {start})"
            )
        ids[:, 0] = start
        mask = mask.scatter(1, last, 1 - ended.long())
        ids = ids.masked_fill(mask == 0, config.pad_token_id or 0)
        order = mask.sort(dim=1, stable=True).indices[:, -int(mask.sum(dim=1).max()) :]
        return ids.gather(1, order), mask.gather(1, order)

    def _caption_options(
        self, given: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """The generation config of this call, and the arguments that are no part of it."""
        config = GenerationConfig() if given is None else copy.deepcopy(given)
        for lower in (self.generation_config, _generation_config(self.config.qformer_config)):
            config.update(**lower.to_dict(), defaults_only=True, allow_custom_entries=True)
        options = {name: value for name, value in config.update(**kwargs).items() if value is not None}
        refused = [name for name, off in _UNSUPPORTED.items() if getattr(config, name, None) not in off]
        if refused := refused + sorted(options.keys() - _OPTIONS):
            raise ValueError(f"the Q-Former's captions do not take {', '.join(f'`{name}`' for name in refused)}")
        if (mode := config.get_generation_mode()) not in _MODES:
            raise ValueError(f"the Q-Former's captions are written by search and sampling, not by {mode.value}")
        return config, options

    def _check_length(self, config: GenerationConfig, prompt: int) -> None:
        limit = self.embeddings.position_embeddings.num_embeddings
        if config.max_new_tokens is not None:
            length, described = prompt + config.max_new_tokens, f"`max_new_tokens` {config.max_new_tokens}"
        else:  # where neither is given, `transformers` stops at the limit at the latest
            length, described = max(config.max_length or 0, prompt + 1), f"`max_length` {config.max_length}"
        if length > limit:
            raise ValueError(
                f"captions may have at most {limit} tokens (the Q-Former's position embeddings), got a prompt of "
                f"{prompt} and {described}"
            )


class _CaptionDecoder(PreTrainedModel, GenerationMixin):
    """The retrieval model as `GenerationMixin` wants a language model: text in, scores of the next token out."""

    config_class = Blip2QFormerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, model: PreTrainedModel, encoded: EncodedImages, rows: int):
        """
        Args:
            model: the retrieval model.
            encoded: N images, one per row of text, or one for all `rows`.
        """
        config = copy.deepcopy(model.config.qformer_config)
        config._attn_implementation = "eager"  # it has no attention of its own, so that no kernel need be supported
        super().__init__(config)
        self.model = model
        self._queries = model.config.num_query_tokens
        self._keys_values = _queries_of_rows(encoded.cache.self_attention_cache, rows, _compute_dtype(model))

    @property
    def device(self) -> torch.device:
        return self.model.embeddings.word_embeddings.weight.device

    def query_cache(self, times: int, room: int = 0) -> EncoderDecoderCache:
        """A cache to decode with, that holds the queries of each row for `times` beams or samples, and room for text.

        Without several of them nothing is copied (new keys are appended to a copy, by `DynamicLayer`).
        """
        cache = DynamicCache()
        cache.layers = [copy.copy(layer) for layer in self._keys_values.layers]
        if times > 1:
            share_prompt(cache, times, room)
        return EncoderDecoderCache(cache, DynamicCache())

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: EncoderDecoderCache | None = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **progress: Any,  # of a prompt whose length in the cache is the number of its tokens; here it is not
    ) -> dict[str, Any]:
        return {
            "input_ids": input_ids[:, self._cached(past_key_values) :],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }

    def _cached(self, cache: Cache | None) -> int:
        """How many tokens of text are in the cache."""
        return 0 if cache is None else cache.get_seq_length() - self._queries

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: EncoderDecoderCache | None = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits [R, 1, V] of the token behind `input_ids` [R, n], which follow the text in the cache (without one:
        the queries); attention_mask: [R, T] over all text, padding on the left, default all real."""
        cached = self._cached(past_key_values)
        length = cached + input_ids.shape[1]
        if attention_mask is None:
            attention_mask = input_ids.new_ones(input_ids.shape[0], length)
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, cached:]
        if past_key_values is None:
            past_key_values = self.query_cache(input_ids.shape[0] // self._keys_values.layers[0].keys.shape[0])
        outputs = self.model.qformer(
            self.model.embeddings(input_ids, position_ids=positions),
            query_length=0,
            attention_mask=generation_mask(self._queries, attention_mask)[:, :, self._queries + cached :],
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        return CausalLMOutputWithPast(
            logits=self.model._lm_logits(outputs.last_hidden_state[:, -1:]),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _generation_config(config: Blip2QFormerConfig) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=config.decoder_start_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def _compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """Of the keys that the Q-Former computes."""
    weight = model.qformer.layernorm.weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _queries_of_rows(cache: DynamicCache, rows: int, dtype: torch.dtype) -> DynamicCache:
    """The queries' keys and values for as many rows, in the same memory where the type is the same."""
    shared = DynamicCache()
    for layer in cache.layers:
        own = copy.copy(layer)
        own.keys, own.values = (states.to(dtype).expand(rows, -1, -1, -1) for states in (layer.keys, layer.values))
        shared.layers.append(own)
    return shared
