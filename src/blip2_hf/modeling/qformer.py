"""The Querying Transformer (Li et al. 2023, sec. 3.1).

Shapes: B batch, Q queries, T text tokens, S = Q + T, P image tokens (patches and class token), D width, R = B or a
multiple of it (see `Blip2QFormerModel.forward` on folding). Module names are those of `transformers`' blip_2, so the
state dicts are interchangeable.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import PreTrainedModel

from ..configuration import Blip2QFormerConfig
from .attention import attend, run_block

KeyValue = tuple[torch.Tensor, torch.Tensor]


class Blip2TextEmbeddings(nn.Module):
    """Word plus position embeddings of the Q-Former's text, put after the queries (which have no positions).

    As in the original code there are no token types, and the LayerNorm over queries and text is the Q-Former's own.
    """

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        query_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            input_ids: [B, T]; position_ids: [B or 1, T], default 0 … T - 1; query_embeds: [B, Q, D].

        Returns:
            [B, Q + T, D], before the LayerNorm.

        Raises:
            ValueError: if the text is longer than the position embeddings.
        """
        if input_ids is None:
            return query_embeds
        limit = self.position_embeddings.num_embeddings
        if input_ids.shape[1] > limit:
            raise ValueError(f"`input_ids` has {input_ids.shape[1]} tokens, the Q-Former takes at most {limit}")
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        text = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        if query_embeds is None:
            return text
        return torch.cat([query_embeds.to(text.dtype), text], dim=1)


class Blip2QFormerMultiHeadAttention(nn.Module):
    """Query, key and value projections with the attention kernel; self- or cross-attention."""

    is_causal = False  # read by the SDPA kernel when there is no mask

    def __init__(self, config: Blip2QFormerConfig, source_width: int):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_width, config.hidden_size)
        self.value = nn.Linear(source_width, config.hidden_size)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def key_value(self, source: torch.Tensor) -> KeyValue:
        """[B, N, source width] -> keys and values, each [B, heads, N, d]."""
        return self._heads(self.key(source)), self._heads(self.value(source))

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value: KeyValue,
        attention_mask: torch.Tensor | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [R, N, D] against keys of B images; row i belongs to image i // (R / B)."""
        query = self._heads(self.query(hidden_states))
        key_value = tuple(states.to(query.dtype) for states in key_value)  # cached ones may be in half precision
        rows, images = query.shape[0], key_value[0].shape[0]
        if rows == images:
            return attend(self, query, *key_value, attention_mask, output_attentions)
        # Folding: the rows of one image are queries of one batch entry, so its keys are shared in place, not copied.
        folded = query.unflatten(0, (images, -1)).transpose(1, 2).flatten(2, 3)
        output, weights = attend(self, folded, *key_value, attention_mask, output_attentions)
        if weights is not None:
            weights = weights.unflatten(2, (rows // images, -1)).transpose(1, 2).flatten(0, 1)
        return output.unflatten(1, (rows // images, -1)).flatten(0, 1), weights


class _AddNorm(nn.Module):
    """dense -> dropout -> LayerNorm(x + residual): the end of BERT's attention and feed-forward sub-layers."""

    def __init__(self, config: Blip2QFormerConfig, in_features: int):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class _Intermediate(nn.Module):
    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(hidden_states))


class Blip2QFormerAttention(nn.Module):
    """An attention sub-layer: heads, output projection, residual, LayerNorm."""

    def __init__(self, config: Blip2QFormerConfig, source_width: int):
        super().__init__()
        self.attention = Blip2QFormerMultiHeadAttention(config, source_width)
        self.output = _AddNorm(config, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value: KeyValue,
        attention_mask: torch.Tensor | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads, weights = self.attention(hidden_states, key_value, attention_mask, output_attentions)
        return self.output(heads, hidden_states), weights


class Blip2QFormerLayer(nn.Module):
    """Self-attention over queries and text, cross-attention of the queries (every f-th layer), one feed-forward
    network for the queries and another for the text."""

    def __init__(self, config: Blip2QFormerConfig, layer_idx: int):
        super().__init__()
        self.has_cross_attention = layer_idx % config.cross_attention_frequency == 0
        self.attention = Blip2QFormerAttention(config, config.hidden_size)
        if self.has_cross_attention:
            self.crossattention = Blip2QFormerAttention(config, config.encoder_hidden_size)
        if config.use_qformer_text_input:
            self.intermediate = _Intermediate(config)
            self.output = _AddNorm(config, config.intermediate_size)
        self.intermediate_query = _Intermediate(config)
        self.output_query = _AddNorm(config, config.intermediate_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        query_length: int,
        attention_mask: torch.Tensor | None,
        past: KeyValue | None,
        image: KeyValue | torch.Tensor | None,
        image_mask: torch.Tensor | None,
        output_attentions: bool,
        output_length: int | None = None,
    ) -> tuple[torch.Tensor, KeyValue, KeyValue | None, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: [R, S, D]; the first `query_length` positions are queries.
            past: keys and values of earlier positions, [R, heads, N, d] each.
            image: features of the images [B, P, E], or their keys and values, [B, heads, P, d] each.
            output_length: how many positions, from the first, to compute; the others are only seen. Default: all S.

        Returns:
            hidden states [R, output length, D], keys and values of all S positions, those of the images if their
            features were given, the self- and the cross-attention weights.
        """
        key_value = self.attention.attention.key_value(hidden_states)
        seen = (
            key_value if past is None else tuple(torch.cat(pair, dim=2) for pair in zip(past, key_value, strict=True))
        )
        if output_length is not None:
            hidden_states = hidden_states[:, :output_length].contiguous()
            if attention_mask is not None and attention_mask.shape[2] > 1:  # else one row for all positions
                attention_mask = attention_mask[:, :, :output_length]
        hidden_states, weights = self.attention(hidden_states, seen, attention_mask, output_attentions)
        projected = cross_weights = None
        if isinstance(image, torch.Tensor):
            image = projected = self.crossattention.attention.key_value(image)
        # Copied once: torch multiplies frozen weights with a part of each row by slower, batched products.
        queries, text = hidden_states[:, :query_length].contiguous(), hidden_states[:, query_length:].contiguous()
        outputs = []
        if query_length:
            if self.has_cross_attention:
                queries, cross_weights = self.crossattention(queries, image, image_mask, output_attentions)
            outputs.append(self.output_query(self.intermediate_query(queries), queries))
        if text.shape[1]:
            outputs.append(self.output(self.intermediate(text), text))
        hidden_states = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return hidden_states, key_value, projected, weights, cross_weights


class Blip2QFormerEncoder(nn.Module):
    """The stack of layers; reads and writes the cache outside of them (see `run_block`)."""

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(Blip2QFormerLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        query_length: int,
        attention_mask: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        cache: EncoderDecoderCache | None,
        use_cache: bool,
        output_attentions: bool,
        output_hidden_states: bool,
        output_length: int | None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        all_hidden, all_weights, all_cross = [hidden_states], [], []
        for index, layer in enumerate(self.layer):
            image = None
            if layer.has_cross_attention and query_length:
                image = self._image(index, encoder_hidden_states, cache)
            past = _past(cache, index)
            hidden_states, key_value, projected, weights, cross_weights = run_block(
                self,
                layer,
                hidden_states,
                query_length,
                attention_mask,
                past,
                image,
                encoder_attention_mask,
                output_attentions,
                output_length if index == len(self.layer) - 1 else None,
            )
            if use_cache:
                cache.self_attention_cache.update(*key_value, index)
                if projected is not None:
                    cache.cross_attention_cache.update(*projected, index)
                    cache.is_updated[index] = True
            all_hidden.append(hidden_states)
            all_weights.append(weights)
            if image is not None:
                all_cross.append(cross_weights)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(all_hidden) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
            cross_attentions=tuple(all_cross) if output_attentions else None,
        )

    @staticmethod
    def _image(
        index: int, encoder_hidden_states: torch.Tensor | None, cache: EncoderDecoderCache | None
    ) -> KeyValue | torch.Tensor:
        """What a layer attends to: the image's keys and values, if the cache has them, else its features."""
        if cache is not None and cache.is_updated.get(index):
            cached = cache.cross_attention_cache.layers[index]
            return cached.keys, cached.values
        if encoder_hidden_states is None:
            raise ValueError(
                "`encoder_hidden_states` must be given for queries to attend to the image, or `past_key_values` with "
                "the image's keys and values; got neither"
            )
        return encoder_hidden_states


class Blip2QFormerModel(PreTrainedModel):
    """The Q-Former on embeddings: learned queries, text, or both (queries first).

    Drop-in for `transformers`' class of the same name, with `past_key_values` added: an `EncoderDecoderCache` whose
    self-attention part holds the queries' (and earlier text's) keys and values, and whose cross-attention part holds
    those of the images, projected once however many queries and texts of the image follow.
    """

    config: Blip2QFormerConfig
    config_class = Blip2QFormerConfig
    base_model_prefix = "qformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # One unit: its cache holds keys and values of all layers, and it is small (188M parameters in the paper).
    _no_split_modules = ["Blip2QFormerModel"]
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = Blip2QFormerEncoder(config)
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # `attend` reads the config at every call; the base class only guesses from the source text

    def get_input_embeddings(self) -> None:
        """None: queries and word embeddings belong to the models around it."""
        return None

    def forward(
        self,
        query_embeds: torch.Tensor,
        query_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_length: int | None = None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple:
        """
        Args:
            query_embeds: [R, S, D] queries, then text (before the LayerNorm).
            query_length: how many of the S positions are queries; default all. Only queries attend to the image.
            attention_mask: [R, N] (1 = real, over all N positions seen, cached ones first), or one of the masks of
                `blip2_hf.modeling.masks`: boolean or 0/1 [R, S, N] or [R, 1, S, N]. Default: everything is seen.
            encoder_hidden_states: [B, P, E] image features. R is B or a multiple of B; then row i belongs to image
                i // (R / B), whose keys and values are shared by its rows, not copied.
            encoder_attention_mask: [B, P], 1 = real. Default: every image token is seen.
            past_key_values: cached keys and values; cross-attention entries replace `encoder_hidden_states`.
            use_cache: whether to write to (or make) a cache; default False. Without it a given cache is only read.
            output_attentions: return the weights (computed by the eager kernel).
            output_hidden_states: return the embeddings and every layer's output.
            output_length: how many positions, from the first, the last layer computes; default all S. The others are
                still seen by these.

        Returns:
            `last_hidden_state` [R, S or `output_length`, D], `pooler_output` [R, D] (its first position),
            `past_key_values`, `hidden_states` (L + 1 times [R, S, D]), `attentions` (L times [R, heads, S, N]),
            `cross_attentions` (one [R, heads, Q, P] per layer that attends to the image).

        Raises:
            ValueError: for text without a text branch, shapes that do not fit, or missing image features.
        """
        query_length = query_embeds.shape[1] if query_length is None else query_length
        if output_length is not None and not 0 < output_length <= query_embeds.shape[1]:
            raise ValueError(f"`output_length` must be in 1 … {query_embeds.shape[1]}, got {output_length}")
        self._check(query_embeds, query_length, encoder_hidden_states, past_key_values, attention_mask)
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())

        dtype = self.layernorm.weight.dtype  # float32 also where the tower and the language model are in half precision
        hidden_states = self.dropout(self.layernorm(query_embeds.to(dtype)))
        if encoder_hidden_states is not None:
            encoder_hidden_states = encoder_hidden_states.to(dtype)
        outputs = self.encoder(
            hidden_states,
            query_length,
            _boolean_mask(attention_mask, "attention_mask"),
            encoder_hidden_states,
            _boolean_mask(encoder_attention_mask, "encoder_attention_mask"),
            past_key_values,
            bool(use_cache),
            bool(output_attentions),
            bool(output_hidden_states),
            output_length,
        )
        return outputs if return_dict is not False else outputs.to_tuple()

    def _check(
        self,
        query_embeds: torch.Tensor,
        query_length: int,
        encoder_hidden_states: torch.Tensor | None,
        cache: EncoderDecoderCache | None,
        attention_mask: torch.Tensor | None,
    ) -> None:
        rows, positions, _ = query_embeds.shape
        if not positions or not 0 <= query_length <= positions:
            raise ValueError(f"`query_length` must be in 0 … {positions} (positions given), got {query_length}")
        if query_length < positions and not self.config.use_qformer_text_input:
            raise ValueError(
                f"`query_embeds` has {positions - query_length} text positions behind {query_length} queries, but "
                "this Q-Former has no text branch (`use_qformer_text_input` is False)"
            )
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise ValueError(f"`past_key_values` must be an EncoderDecoderCache, got {type(cache).__name__}")
        past = _past(cache, 0)
        if past is not None and past[0].shape[0] != rows:
            raise ValueError(
                f"`past_key_values` has earlier positions of {past[0].shape[0]} rows, `query_embeds` has {rows} rows"
            )
        if query_length and cache is not None and cache.is_updated.get(0):
            images, source = cache.cross_attention_cache.layers[0].keys.shape[0], "past_key_values"
        elif query_length and encoder_hidden_states is not None:
            images, source = encoder_hidden_states.shape[0], "encoder_hidden_states"
        else:
            images, source = rows, ""
        if not images or rows % images:
            raise ValueError(
                f"`{source}` has {images} images for {rows} rows of `query_embeds`; the rows must be a multiple of "
                "the images"
            )
        seen = positions + (0 if past is None else past[0].shape[2])
        if attention_mask is not None and attention_mask.shape[-1] != seen:
            raise ValueError(
                f"`attention_mask` must cover the {seen} positions seen ({seen - positions} of them cached), got "
                f"shape {tuple(attention_mask.shape)}"
            )


def _past(cache: EncoderDecoderCache | None, index: int) -> KeyValue | None:
    """Self-attention keys and values of earlier positions, None if there are none."""
    if cache is None or not cache.self_attention_cache.get_seq_length(index):
        return None
    layer = cache.self_attention_cache.layers[index]
    return layer.keys, layer.values


def _boolean_mask(mask: torch.Tensor | None, argument: str) -> torch.Tensor | None:
    """[R, N], [R, S, N] or [R, 1 or heads, S, N] of 0/1 or bool -> boolean, broadcastable to [R, heads, S, N]."""
    if mask is None:
        return None
    if mask.ndim not in (2, 3, 4):
        raise ValueError(f"`{argument}` must have 2, 3 or 4 dimensions, got shape {tuple(mask.shape)}")
    if mask.ndim == 4 and mask.is_floating_point():
        raise ValueError(f"`{argument}` with 4 dimensions must be boolean or 0/1, got {mask.dtype}")
    mask = mask.bool()
    if mask.ndim == 2:
        return mask[:, None, None, :]
    return mask[:, None] if mask.ndim == 3 else mask
