"""Our own models, tiny and random."""

from __future__ import annotations

from blip2_hf.configuration import Blip2Config
from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from tiny_models import IMAGE_TOKEN, QFORMER, QUERIES, VISION, randomised, text_config

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def generation_config(family: str = "opt", tower: dict = VISION) -> Blip2Config:
    return Blip2Config(
        vision_config=tower,
        qformer_config=QFORMER,
        text_config=text_config(family),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )


def retrieval_config(tower: dict = VISION) -> Blip2Config:
    return Blip2Config(
        vision_config=tower,
        qformer_config={**QFORMER, "use_qformer_text_input": True},
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
    )


def generation(family: str = "opt", tower: dict = VISION) -> Blip2ForConditionalGeneration:
    return randomised(Blip2ForConditionalGeneration(generation_config(family, tower)))


def retrieval(tower: dict = VISION) -> Blip2ForImageTextRetrieval:
    return randomised(Blip2ForImageTextRetrieval(retrieval_config(tower)))
