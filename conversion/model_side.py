"""A folder or Hub id as a side of a comparison, computed by our classes or by those of `transformers`."""

from __future__ import annotations

import torch
from torch import nn

from conversion.example_inputs import Inputs
from conversion.original_side import Rounding
from conversion.sides import OURS, OpenedSide, quiet_loading
from conversion.traces import Recorder, watched

# A buffer that old files hold and no model of today reads.
_BUFFER = ".position_ids"


class NotAModel(ValueError):
    """The weights of a folder are not those of its model."""


@torch.no_grad()
def run_model(
    opened: OpenedSide, inputs: Inputs, recorder: Recorder, dtype: torch.dtype, device: str, rounded: Rounding
) -> None:
    """Writes the trace of a folder.

    Raises:
        NotAModel: if its weights are not those of the model of its config.
        ValueError: if its classes cannot compute it.
    """
    model, missing, surplus = _loaded(opened, dtype)
    recorder.trace.new, recorder.trace.surplus = missing, surplus
    for name, parameter in model.named_parameters():
        parameter.data = rounded(name, parameter.data).to(parameter.dtype)
    model.to(device).eval()
    inputs = inputs.to(device)
    pixels = inputs.pixels.to(dtype)
    if opened.is_retrieval:
        _retrieval(model, opened.engine, pixels, inputs, recorder)
    else:
        _generation(model, opened, pixels, inputs, recorder)


def _loaded(opened: OpenedSide, dtype: torch.dtype) -> tuple[nn.Module, tuple[str, ...], tuple[str, ...]]:
    """The model, the parameters it was loaded without, and those that it has no place for."""
    try:
        source = opened.weights.source
        with quiet_loading():  # what is missing is in the report
            model, info = _model_class(opened).from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (RuntimeError, ValueError) as error:  # of transformers and of ours
        raise NotAModel(f"{opened.side.source} cannot be loaded: {error}") from error
    found = [sorted(n for n in info[kind] if not n.endswith(_BUFFER)) for kind in ("missing_keys", "unexpected_keys")]
    return model, tuple(found[0]), tuple(found[1])


def _model_class(opened: OpenedSide) -> type:
    if opened.engine == OURS:
        from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
        from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval

        return Blip2ForImageTextRetrieval if opened.is_retrieval else Blip2ForConditionalGeneration
    import transformers

    if opened.is_retrieval:
        return transformers.Blip2ForImageTextRetrieval
    if opened.facts["questions to the Q-Former"]:
        return transformers.InstructBlipForConditionalGeneration
    return transformers.Blip2ForConditionalGeneration


# -- stage 1 -----------------------------------------------------------------------------------------------------------


def _retrieval(model: nn.Module, engine: str, pixels: torch.Tensor, inputs: Inputs, recorder: Recorder) -> None:
    """The passes one by one, then what the model itself gives for the whole."""
    ids, mask, negatives = inputs.ids, inputs.mask, inputs.negatives
    count, every = model.config.num_query_tokens, torch.arange(len(ids), device=ids.device)
    images, texts = torch.cat([every, negatives, every]), torch.cat([every, every, negatives])
    started = torch.cat([torch.full_like(ids[:, :1], inputs.start), ids[:, 1:]], dim=1)
    ones = torch.ones(len(ids), count, dtype=mask.dtype, device=mask.device)
    both, pairs = torch.cat([ones, mask], dim=1), torch.cat([ones.repeat(3, 1), mask[texts]], dim=1)
    length = both.shape[1]
    causal = torch.ones(length, length, dtype=mask.dtype, device=mask.device).tril()
    causal[:count, :count] = 1
    queries = model.query_tokens.expand(len(ids), -1, -1)
    with watched(model, recorder):
        image = model.vision_model(pixel_values=pixels).last_hidden_state
        model.qformer(queries, encoder_hidden_states=image)
        recorder.current = "text"
        recorder.rows("Q-Former, text", mask)
        model.qformer(model.embeddings(ids), query_length=0, attention_mask=mask)
        recorder.current = "matching"
        recorder.rows("Q-Former, matching", pairs)
        model.qformer(
            model.embeddings(ids[texts], query_embeds=queries.repeat(3, 1, 1)),
            query_length=count,
            attention_mask=pairs,
            encoder_hidden_states=image[images],
        )
        if engine == OURS:
            recorder.current = "captioning"
            recorder.rows("Q-Former, captioning", both)
            captioned = model.qformer(
                model.embeddings(started, query_embeds=queries),
                query_length=count,
                attention_mask=causal[None] * both[:, None],
                encoder_hidden_states=image,
            ).last_hidden_state
    ids, mask = _with_placeholders(ids, mask, model.config)
    contrast = model(pixel_values=pixels, input_ids=ids, attention_mask=mask)
    match = model(
        pixel_values=pixels[images],
        input_ids=ids[texts],
        attention_mask=mask[texts],
        use_image_text_matching_head=True,
    )
    recorder("end, image features", contrast.image_embeds)
    recorder("end, text features", contrast.text_embeds)
    recorder("end, ITC logits", contrast.logits_per_image)
    recorder("end, ITM logits", match.logits_per_image)
    if engine == OURS:
        _losses(model, captioned[:, count:], pixels, ids, mask, inputs, recorder)


def _losses(
    model: nn.Module,
    captioned: torch.Tensor,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    inputs: Inputs,
    recorder: Recorder,
) -> None:
    """What only our model has, as far as its checkpoint has the parameters for it."""
    new = recorder.trace.new
    outputs = model(
        pixel_values=pixels,
        input_ids=ids,
        attention_mask=mask,
        return_loss=True,
        negative_image_indices=inputs.negatives,
        negative_text_indices=inputs.negatives,
    )
    has_head = not any(name.startswith("lm_head.") for name in new)
    if has_head:
        recorder.rows("end, ITG logits", inputs.mask)
        recorder("end, ITG logits", model.lm_head(captioned))
    present = {
        "ITC": outputs.loss_itc if "temperature" not in new else None,
        "ITM": outputs.loss_itm,
        "ITG": outputs.loss_itg if has_head else None,
    }
    for name, loss in present.items():
        if loss is not None:  # nor is one that the config gives no weight
            recorder(f"end, {name} loss", loss)


# -- stage 2 -----------------------------------------------------------------------------------------------------------


def _generation(model: nn.Module, opened: OpenedSide, pixels: torch.Tensor, inputs: Inputs, recorder: Recorder) -> None:
    if opened.engine != OURS and model.config.image_token_index is None:
        raise ValueError(
            f"{opened.side.source} has no image placeholder (`image_token_index` is None), without which transformers' "
            "BLIP-2 cannot compute; `library` must be 'ours'"
        )
    count = model.config.num_query_tokens
    ids, mask = _with_placeholders(inputs.ids, inputs.mask, model.config)
    whole = torch.cat([torch.ones_like(inputs.mask[:, :1]).expand(-1, count), inputs.mask], dim=1)
    labels = inputs.labels
    if not opened.is_seq2seq and ids.shape != inputs.ids.shape:
        labels = torch.cat([torch.full_like(whole[:, :count], -100), labels], dim=1)
    questions = {}
    if inputs.question_ids is not None:
        questions = {"qformer_input_ids": inputs.question_ids, "qformer_attention_mask": inputs.question_mask}
        recorder.rows("Q-Former, queries", torch.cat([whole[:, :count], inputs.question_mask], dim=1))

    def projected(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return recorder("Q-Former, language projection", output)

    decoder = labels != -100 if opened.is_seq2seq else whole
    recorder.rows("language model, encoder", whole)
    recorder.rows("language model, decoder", decoder)
    handle = model.language_projection.register_forward_hook(projected)
    with watched(model, recorder):
        outputs = model(pixel_values=pixels, input_ids=ids, attention_mask=mask, labels=labels, **questions)
    handle.remove()
    recorder.rows("end, logits", decoder)
    recorder("end, logits", outputs.logits)
    recorder("end, loss", outputs.loss)


def _with_placeholders(ids: torch.Tensor, mask: torch.Tensor, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that begin with the image's placeholders, where the model has them."""
    if config.image_token_index is None:
        return ids, mask
    places = torch.full_like(ids[:, :1], config.image_token_index).expand(-1, config.num_query_tokens)
    return torch.cat([places, ids], dim=1), torch.cat([torch.ones_like(places), mask], dim=1)
