"""Folders of tiny random checkpoints, model and processor, as `transformers` writes them, and two real photos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import tiny_models
import tiny_tokenizers

FAMILIES = ("opt", "llama", "t5")
PHOTOS = ("astronaut", "chelsea", "coffee")


def photo(name: str) -> Image.Image:
    """A photo that comes with scikit-image: "astronaut", "chelsea" (a cat) or "coffee"."""
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)())


def save_photos(folder: Path) -> dict[str, str]:
    """Paths of the photos, written to `folder` without loss."""
    paths = {}
    for name in PHOTOS:
        path = folder / f"{name}.png"
        photo(name).save(path)
        paths[name] = str(path)
    return paths


def image_processor() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(size={"height": tiny_models.IMAGE_SIZE, "width": tiny_models.IMAGE_SIZE})


def language_tokenizer(family: str):
    tokenizer = getattr(tiny_tokenizers, f"tiny_{family}_tokenizer")()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def _fit(config, tokenizer, family: str) -> None:
    """Token ids of the config as the tokenizer has them; OPT ends a text with a line break, as in the paper."""
    text = config.text_config
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    text.pad_token_id, text.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if tokenizer.bos_token_id is not None:
        text.bos_token_id = tokenizer.bos_token_id
    if family == "opt":
        text.eos_token_id = tokenizer.convert_tokens_to_ids("Ċ")


def save_generation(folder: Path, family: str, seed: int = 0) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """Writes `transformers`' generation model and processor to `folder` and returns them."""
    processor = Blip2Processor(image_processor(), language_tokenizer(family), num_query_tokens=tiny_models.QUERIES)
    config = tiny_models.peer_config(family)
    _fit(config, processor.tokenizer, family)
    model = tiny_models.randomised(Blip2ForConditionalGeneration(config), seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def save_instructblip(folder: Path, family: str) -> tuple[InstructBlipForConditionalGeneration, InstructBlipProcessor]:
    """The same for a model whose Q-Former reads the prompt."""
    processor = InstructBlipProcessor(
        image_processor(),
        language_tokenizer(family),
        tiny_tokenizers.tiny_bert_tokenizer(),
        num_query_tokens=tiny_models.QUERIES,
    )
    config = tiny_models.peer_instructblip(family).config
    _fit(config, processor.tokenizer, family)
    model = tiny_models.randomised(InstructBlipForConditionalGeneration(config))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def save_retrieval(folder: Path) -> tuple[Blip2ForImageTextRetrieval, Blip2Processor]:
    """Writes `transformers`' retrieval model and its processor, which has no placeholders."""
    model = tiny_models.peer_retrieval()
    processor = Blip2Processor(image_processor(), tiny_tokenizers.tiny_bert_tokenizer())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def peer_tokens(model, processor, image: Image.Image, prompt: str | None, **options) -> torch.Tensor:
    """The new tokens [sequences, T] of `transformers`' model."""
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    with torch.no_grad():
        sequences = model.generate(**inputs, **options)
    if model.config.text_config.is_encoder_decoder:
        return sequences[:, 1:]
    without_text = model.config.num_query_tokens + 1  # placeholders and the start token
    return sequences[:, inputs["input_ids"].shape[1] if prompt is not None else without_text :]


# -- fixtures, for the conftest.py of the folders that need them -----------------------------------------------------


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], str]:
    """Folder of a checkpoint by its kind: a family, "instruct-" and a family, or "retrieval"; written when needed."""
    folders: dict[str, str] = {}

    def folder_of(kind: str) -> str:
        if kind not in folders:
            folder = tmp_path_factory.mktemp(kind)
            if kind == "retrieval":
                save_retrieval(folder)
            elif kind.startswith("instruct-"):
                save_instructblip(folder, kind.removeprefix("instruct-"))
            else:
                save_generation(folder, kind)
            folders[kind] = str(folder)
        return folders[kind]

    return folder_of


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> dict[str, str]:
    """Paths of the photos by name."""
    return save_photos(tmp_path_factory.mktemp("photos"))


class TowerCounter:
    """Counts the images that go through a model's tower, run by run."""

    def __init__(self, model) -> None:
        self.runs: list[int] = []
        self._handle = model.vision_model.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs, output) -> None:
        self.runs.append(len(args[0] if args else kwargs["pixel_values"]))

    def __enter__(self) -> TowerCounter:
        return self

    def __exit__(self, *error) -> None:
        self._handle.remove()
