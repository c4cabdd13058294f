"""BLIP-2 for generation (Li et al. 2023, sec. 3.3): tower, Q-Former, projection, language model.

Shapes: N images, B rows of text, Q queries, P image tokens, S positions of the prompt, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import nn
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy

from ..configuration import Blip2Config
from ..outputs import Blip2ForConditionalGenerationModelOutput
from .adapters import LanguageAdapterMixin
from .attention import eager_if, without_checkpointing
from .base import Blip2PreTrainedModel
from .beam_search import beam_search
from .encoded import EncodedImages
from .generation_backbones import Stage2BackbonesMixin
from .linears import with_fast_linears
from .prefill import can_prefill_once, can_search, position_arguments, prefill_causal, prefill_seq2seq
from .projection import LanguagePromptMixin
from .prompts import Prompt, can_be_targets, prompt_behind_ids
from .ranking import AnswerRankingMixin
from .windows import check_answer, check_labels, check_room, check_targets, check_training_precision


class Blip2ForConditionalGeneration(
    AnswerRankingMixin,
    LanguageAdapterMixin,
    LanguagePromptMixin,
    Stage2BackbonesMixin,
    Blip2PreTrainedModel,
    GenerationMixin,
):
    """Stage 2, captioning, visual question answering and chat, with any causal or sequence-to-sequence LLM.

    With `config.qformer_config.use_qformer_text_input` the Q-Former also reads the question (the paper's figure 7 for
    VQA, and InstructBLIP): pass `qformer_input_ids`.
    """

    _parts = frozenset({"vision_model", "query_tokens", "qformer", "language_projection", "language_model"})
    _optional_parts = frozenset({"embeddings"})  # of a question-conditioned Q-Former
    accepts_loss_kwargs = True  # `num_items_in_batch`, for exact gradient accumulation in Trainer

    def __init__(self, config: Blip2Config):
        super().__init__(config)
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        self._add_connector(config)
        text_config = config.text_config
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        try:
            self.language_model = auto.from_config(text_config)
        except ValueError as error:
            raise ValueError(
                f"`text_config` of model_type {text_config.model_type!r} is not a language model that "
                f"{auto.__name__} can build"
            ) from error
        self.post_init()

    # -- the language model's embeddings -----------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.language_model.get_encoder() if modality is None else super().get_encoder(modality=modality)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """As `PreTrainedModel.resize_token_embeddings`, of the language model (with what it ties and derives)."""
        embeddings = self.language_model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.text_config.get_text_config().vocab_size = embeddings.num_embeddings
        if self._loaded_versions is not None:
            self._loaded_versions["language_model"] = -1  # no longer what its checkpoint holds
        return embeddings

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_embeds: torch.Tensor | EncodedImages | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        decoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Blip2ForConditionalGenerationModelOutput | tuple:
        """
        Args:
            pixel_values: [N, 3, H, W]; or `image_embeds` [N, P, E] (after `ln_vision`) or what `encode_image` returned;
                or `vision_features` [N, P, E] (before `ln_vision`). One image per row of text, or one for all rows; or
                several per row, in the order of their placeholders, row by row.
            input_ids: [B, S] with Q placeholders per image (`Blip2Processor` puts them there); padding may be on
                either side. None: the images alone. `inputs_embeds` [B, S, W] instead of it.
            attention_mask: [B, S], 1 = real.
            labels: decoder-only: [B, S], the ids with -100 where nothing is learned (image placeholders and padding
                are left out in any case); encoder-decoder: [B, T], the decoder's target (padding is left out).
            qformer_input_ids, qformer_attention_mask: [B, Tq] the question for a question-conditioned Q-Former, about
                every image of its row.
            decoder_input_ids, decoder_attention_mask: [B, T] for encoder-decoder models without `labels`.
            num_items_in_batch: number of target tokens that the loss is divided by (of all accumulated batches);
                default: those of this batch. `Blip2Trainer` counts what the loss counts. A plain `Trainer` counts all
                labels but -100: with `labels=input_ids` placeholders and padding, too, so the loss is too small and
                accumulation inexact.
            interpolate_pos_encoding, output_attentions, output_hidden_states: as in `Blip2VisionModel.forward`; the
                latter two apply to tower, Q-Former and language model.

        Raises:
            ValueError: for missing or surplus images, placeholders that do not match, shapes that do not fit, more
                positions than the language model has, targets that are no ids of its vocabulary.
        """
        output_attentions = bool(self.config.output_attentions if output_attentions is None else output_attentions)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        if labels is not None:
            check_labels(labels)
            if self.training:
                check_training_precision(self.language_model)
        prompt, vision_outputs, qformer_outputs = self._read_inputs(
            pixel_values,
            image_embeds,
            vision_features,
            qformer_input_ids,
            qformer_attention_mask,
            interpolate_pos_encoding,
            input_ids,
            inputs_embeds,
            attention_mask,
            output_attentions,
            output_hidden_states,
        )
        flags = {
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": True,
        }
        with eager_if(output_attentions, self.language_model):
            if self.config.is_encoder_decoder:
                loss, outputs = self._seq2seq(
                    prompt, labels, decoder_input_ids, decoder_attention_mask, num_items_in_batch, flags
                )
            elif decoder_input_ids is not None or decoder_attention_mask is not None:
                raise ValueError("`decoder_input_ids` was given, but the language model is decoder-only")
            else:
                loss, outputs = self._causal(prompt, labels, num_items_in_batch, flags)
        result = Blip2ForConditionalGenerationModelOutput(
            loss=loss,
            logits=outputs.logits,
            vision_outputs=vision_outputs,
            qformer_outputs=qformer_outputs,
            language_model_outputs=outputs,
        )
        return result if return_dict is not False else result.to_tuple()

    def _causal(self, prompt: Prompt, labels: torch.Tensor | None, num_items_in_batch, flags: dict):
        # A gap would count as distance where the model slides a window, and predict the token behind it.
        order = prompt.closing_order()
        prompt = prompt if order is None else prompt.reordered(order)
        outputs = self.language_model(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.mask,
            **position_arguments(self.language_model, prompt.position_ids()),
            **flags,
        )
        logits = outputs.logits
        if order is not None:
            outputs.logits = logits.gather(1, order.argsort(dim=1)[..., None].expand_as(logits))
        if labels is None:
            return None, outputs
        queries = self.config.num_query_tokens
        if self.config.image_token_index is None and labels.shape[1] + queries == prompt.mask.shape[1]:
            labels = nn.functional.pad(labels, (queries, 0), value=-100)  # the images were put before the text
        if labels.shape != prompt.mask.shape:
            raise ValueError(
                f"`labels` must have the shape of the tokens {tuple(prompt.mask.shape)}, got {tuple(labels.shape)}"
            )
        labels = labels if order is None else labels.gather(1, order.to(labels.device))
        labels = labels.masked_fill(~can_be_targets(prompt.is_image, prompt.mask).to(labels.device), -100)
        check_targets(labels, logits.shape[-1], num_items_in_batch is not None)
        loss = ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)
        return loss, outputs

    def _seq2seq(
        self, prompt: Prompt, labels, decoder_input_ids, decoder_attention_mask, num_items_in_batch, flags: dict
    ):
        if labels is not None:
            if labels.shape[0] != prompt.mask.shape[0]:
                raise ValueError(
                    f"`labels` must have one row per prompt ({prompt.mask.shape[0]}), got shape {tuple(labels.shape)}"
                )
            padding = self.config.text_config.pad_token_id
            if padding is not None:
                labels = labels.masked_fill(labels == padding, -100)
            check_targets(labels, self.get_output_embeddings().weight.shape[0], num_items_in_batch is not None)
            if decoder_input_ids is None:
                decoder_input_ids = self.language_model.prepare_decoder_input_ids_from_labels(labels)
        if decoder_input_ids is None:
            raise ValueError("an encoder-decoder language model needs `labels` or `decoder_input_ids`, got neither")
        argument = "decoder_input_ids" if labels is None else "labels"
        check_answer(decoder_input_ids.shape[1], prompt.mask, self.config.text_config, argument)
        # Relative positions count padding between tokens, so it is moved behind them.
        prompt = prompt.packed("right")
        outputs = self.language_model(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            **flags,
        )
        if labels is None:
            return None, outputs
        logits = outputs.logits.flatten(0, 1).float()
        labels = labels.flatten().to(logits.device)
        return fixed_cross_entropy(logits, labels, num_items_in_batch, ignore_index=-100), outputs

    # -- generation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @with_fast_linears
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | EncodedImages | None = None,
        vision_features: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        generation_config: GenerationConfig | None = None,
        **generate_kwargs: Any,
    ) -> torch.Tensor | Any:
        """Generates text; every option of `GenerationMixin.generate` is taken (beams, sampling, streamer, …).

        The prompt is computed once per row; beams and samples share its keys and values. Beam search chooses the same
        tokens as `transformers`', and ends as soon as they are settled (see `beam_search`); what cannot be done so
        (sampled beams, attentions, hidden states, other caches, …) takes the plain path, with the same result. Ragged
        prompts may be padded on either side. The defaults are those of `self.generation_config`, then of the language
        model's own.

        Args:
            pixel_values, input_ids, attention_mask, qformer_*, image_embeds, vision_features, inputs_embeds,
            interpolate_pos_encoding: as in `forward`.
            generation_config, generate_kwargs: as in `GenerationMixin.generate`.

        Returns:
            As `transformers`' BLIP-2: decoder-only: the given `input_ids` and the continuation (the continuation
            alone if `inputs_embeds` were given without ids); encoder-decoder: the answer. A dictionary with
            `return_dict_in_generate=True` (of beam search without `past_key_values`: the cache at its end belongs to
            the beams that were still running).

        Raises:
            ValueError: as `forward`, and for options that `generate` does not know.
        """
        given = self._read_inputs(
            pixel_values,
            image_embeds,
            vision_features,
            qformer_input_ids,
            qformer_attention_mask,
            interpolate_pos_encoding,
            input_ids,
            inputs_embeds,
            attention_mask,
        ).prompt
        prompt = given.packed("right" if self.config.is_encoder_decoder else "left")
        generation_config, options = self._generation_options(generation_config, generate_kwargs)
        check_room(prompt.mask, self.language_model, generation_config.max_new_tokens)
        prefill = False
        if can_search(self.language_model, generation_config, options):
            options["custom_generate"] = beam_search
        else:
            prefill = can_prefill_once(self.language_model, generation_config, options)
        if self.config.is_encoder_decoder:
            prompt_arguments = {"attention_mask": prompt.mask}
            if prefill:
                prompt_arguments |= prefill_seq2seq(self.language_model, prompt, generation_config)
            else:
                prompt_arguments["inputs_embeds"] = prompt.embeds
        else:
            prompt_arguments = {"attention_mask": prompt.mask, "inputs_embeds": prompt.embeds}
            if prompt.ids is not None:
                prompt_arguments["input_ids"] = prompt.ids
            if prefill:
                prompt_arguments |= prefill_causal(self.language_model, prompt, generation_config)
        in_place = contextlib.nullcontext()
        mode = generation_config.get_generation_mode(options.get("assistant_model"))
        if mode == GenerationMode.ASSISTED_GENERATION:
            if prompt.ids is None:
                raise ValueError("`input_ids` must be given for assisted generation, got `inputs_embeds` alone")
            prompt_arguments = {"input_ids": prompt.ids, "attention_mask": prompt.mask}
            reader = self.get_encoder() if self.config.is_encoder_decoder else self.language_model
            in_place = prompt_behind_ids(prompt, reader.get_input_embeddings())
        eager = eager_if(bool(generation_config.output_attentions), self.language_model)
        with in_place, eager, without_checkpointing(self.language_model):
            outputs = self.language_model.generate(generation_config=generation_config, **prompt_arguments, **options)
        if self.config.is_encoder_decoder or given.ids is None:
            return outputs
        return self._with_given_prompt(outputs, given.ids)

    def _generation_options(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """The generation config of this call, and the arguments that are no part of it."""
        config = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
        for defaults in (self.generation_config, self.language_model.generation_config):
            config.update(**defaults.to_dict(), defaults_only=True, allow_custom_entries=True)
        return config, config.update(**kwargs)

    def _with_given_prompt(self, outputs: Any, ids: torch.Tensor) -> Any:
        """Puts the prompt back as it was given (its padding had been moved to the left)."""
        sequences = outputs if torch.is_tensor(outputs) else outputs.sequences
        length = ids.shape[1]
        if self.config.image_token_index is None:
            ids = ids[:, self.config.num_query_tokens :]  # there were no placeholders
        prompts = ids.repeat_interleave(sequences.shape[0] // ids.shape[0], dim=0).to(sequences.device)
        sequences = torch.cat([prompts, sequences[:, length:]], dim=1)
        if torch.is_tensor(outputs):
            return sequences
        outputs.sequences = sequences
        return outputs
