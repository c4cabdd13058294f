"""Tiny processors, one for each kind of language model, and a batch for them."""

from PIL import Image

from blip2_hf.image_processing import Blip2ImageProcessor
from blip2_hf.processing import Blip2Processor
from tiny_tokenizers import tiny_llama_tokenizer, tiny_opt_tokenizer, tiny_t5_tokenizer

TOKENIZERS = {"opt": tiny_opt_tokenizer, "t5": tiny_t5_tokenizer, "llama": tiny_llama_tokenizer}
QUERIES = 4
PROMPTS = ["Question: what is the dog doing? Answer:", "a photo of"]
ANSWERS = ["running on the beach", "a cat"]
IMAGES = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]


def tiny_processor(kind: str, **settings) -> Blip2Processor:
    """Of 14 px images and 4 placeholders; `kind` is a key of `TOKENIZERS`."""
    settings = {"num_query_tokens": QUERIES} | settings
    return Blip2Processor(Blip2ImageProcessor(size=14), TOKENIZERS[kind](), **settings)
