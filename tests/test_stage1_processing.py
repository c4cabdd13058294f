"""Tokenizer and processor that go with `from_backbones`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from blip2_hf.image_processing import CLIP_MEAN, Blip2ImageProcessor
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from blip2_hf.processing import Blip2Processor
from blip2_hf.stage1_processing import stage1_processor, stage1_tokenizer
from tiny_backbones import bert, random_tower, save_bert, tower_model
from tiny_own_models import retrieval
from tiny_tokenizers import tiny_bert_tokenizer, tiny_opt_tokenizer


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"), bert())


def test_start_token_is_added_once(text_folder: str, tmp_path: Path) -> None:
    plain = tiny_bert_tokenizer(decoder_start=False)
    assert "[DEC]" not in plain.get_vocab()
    tokenizer = stage1_tokenizer(text_folder)
    assert tokenizer.bos_token == "[DEC]"
    assert tokenizer.bos_token_id == len(plain)
    assert len(tokenizer) == len(plain) + 1
    assert tokenizer.model_max_length == 64  # BERT's positions; the tokenizer itself has 512
    assert tokenizer("a dog")["input_ids"] == plain("a dog")["input_ids"]  # [CLS] … [SEP]
    tokenizer.save_pretrained(tmp_path)
    again = stage1_tokenizer(tmp_path)
    assert (again.bos_token_id, len(again)) == (tokenizer.bos_token_id, len(tokenizer))


def test_wrong_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`text` must be a folder"):
        stage1_tokenizer(None)
    with pytest.raises(ValueError, match="has no tokenizer"):
        stage1_tokenizer(tmp_path)
    tiny_opt_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cls_token"):
        stage1_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["clip", "siglip", "own", "random", "config"])
def test_model_and_processor_agree(tmp_path: Path, text_folder: str, name: str) -> None:
    vision: object = random_tower()
    if name == "config":
        vision = tower_model("clip").config
    elif name != "random":
        vision = tmp_path
        (retrieval() if name == "own" else tower_model(name)).save_pretrained(tmp_path)
    model, processor = (
        Blip2ForImageTextRetrieval.from_backbones(vision, text_folder),
        stage1_processor(vision, text_folder),
    )
    assert isinstance(processor, Blip2Processor)
    qformer, tokenizer = model.config.qformer_config, processor.tokenizer
    assert qformer.vocab_size == len(tokenizer)
    ids = (qformer.pad_token_id, qformer.bos_token_id, qformer.eos_token_id)
    assert ids == (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id)
    inputs = processor(images=[Image.new("RGB", (50, 31), "red")] * 2, text=["a dog", "two cats"], return_tensors="pt")
    assert inputs["input_ids"][:, 0].tolist() == [tokenizer.cls_token_id] * 2  # no image placeholders
    with torch.no_grad():
        assert model(**inputs).logits_per_image.shape == (2, 2)
    processor.save_pretrained(tmp_path / "saved")
    loaded = Blip2Processor.from_pretrained(tmp_path / "saved")
    assert loaded.tokenizer.bos_token_id == tokenizer.bos_token_id


def test_image_settings_are_the_towers(tmp_path: Path, text_folder: str) -> None:
    source = tower_model("clip")
    source.save_pretrained(tmp_path)
    settings = stage1_processor(tmp_path, text_folder).image_processor
    assert (tuple(settings.image_mean), settings.size) == (CLIP_MEAN, {"height": 28, "width": 28})
    own = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.3, 0.4], "resample": 2}
    crop = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 28}
    Blip2ImageProcessor(**own, **crop).save_pretrained(tmp_path)
    settings = stage1_processor(tmp_path, text_folder).image_processor
    assert [list(settings.image_mean), list(settings.image_std), settings.resample] == list(own.values())
    assert (settings.size, settings.do_center_crop) == ({"height": 28, "width": 28}, False)
