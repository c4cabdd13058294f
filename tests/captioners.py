"""A tiny model that writes captions, and two plain ways to the same captions, for tests."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from blip2_hf.configuration import Blip2Config
from blip2_hf.modeling.masks import generation_mask
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from tiny_models import QUERIES, VOCAB, pixels, randomised
from tiny_own_models import retrieval_config

IMAGES, PAD, CLS, SEP, DEC = 3, 0, 101, 102, VOCAB - 1
STEPS = 8
PICTURES = pixels(IMAGES)


def captioner(**qformer: Any) -> Blip2ForImageTextRetrieval:
    config = retrieval_config().to_dict()
    config["qformer_config"] |= qformer
    return randomised(Blip2ForImageTextRetrieval(Blip2Config(**config)))


class PlainDecoder(PreTrainedModel, GenerationMixin):
    """The same captions without any cache: at every step queries and text together, over the images' features."""

    main_input_name = "input_ids"

    def __init__(self, model: Blip2ForImageTextRetrieval, pictures: torch.Tensor):
        config = copy.deepcopy(model.config.qformer_config)
        config._attn_implementation = "eager"
        super().__init__(config)
        self.model = model
        self.features = model.vision_model(pictures).last_hidden_state

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, attention_mask=None, **_: Any) -> dict:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids: torch.Tensor, attention_mask=None, return_dict=None) -> CausalLMOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        times = input_ids.shape[0] // self.features.shape[0]
        queries = self.model.query_tokens.expand(input_ids.shape[0], -1, -1)
        hidden = self.model.qformer(
            self.model.embeddings(input_ids, position_ids=positions, query_embeds=queries),
            query_length=QUERIES,
            attention_mask=generation_mask(QUERIES, mask),
            encoder_hidden_states=self.features.repeat_interleave(times, dim=0),
        ).last_hidden_state
        return CausalLMOutput(logits=self.model.lm_head(hidden[:, QUERIES:]))


@torch.no_grad()
def plain(model: Blip2ForImageTextRetrieval, pictures: torch.Tensor = PICTURES, **options: Any) -> Any:
    start = torch.full((pictures.shape[0], 1), DEC)
    options = {"eos_token_id": SEP, "pad_token_id": PAD, "input_ids": start, "use_cache": False} | options
    options["attention_mask"] = options.get("attention_mask", torch.ones_like(options["input_ids"]))
    return PlainDecoder(model, pictures).generate(**options)


@torch.no_grad()
def greedy(model: Blip2ForImageTextRetrieval, steps: int = STEPS) -> torch.Tensor:
    """Written out: the most probable token, again and again."""
    encoded = model.encode_image(PICTURES)
    ids = torch.full((IMAGES, 1), DEC)
    for _ in range(steps):
        logits = model._lm_logits(model._decode(ids, torch.ones_like(ids), encoded))[:, -1]
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return ids


def common_end(model: Blip2ForImageTextRetrieval) -> int:
    """An end token with which the greedy captions have different lengths."""
    ids = greedy(model)
    for token in ids[:, 1:].unique().tolist():
        lengths = {(row[1:] == token).nonzero()[0].item() if token in row[1:] else STEPS for row in ids}
        if len(lengths) > 1:
            return token
    raise AssertionError("no such token")
