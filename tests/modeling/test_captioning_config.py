"""The defaults of captions by the Q-Former, through saving and loading; `config.text_config` is a language model that
has no part in it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import GenerationConfig

from blip2_hf.configuration import Blip2QFormerConfig
from captioners import DEC, PAD, PICTURES, SEP, STEPS, Blip2ForImageTextRetrieval, captioner, greedy
from parity import EXACT
from tiny_models import VOCAB, peer_retrieval

OPT = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}


@pytest.fixture(scope="module")
def model() -> Blip2ForImageTextRetrieval:
    return captioner()


def tokens(config: GenerationConfig) -> tuple:
    return config.bos_token_id, config.eos_token_id, config.pad_token_id


def test_tokens_are_the_qformers(model) -> None:
    text = model.config.text_config
    assert {name: getattr(text, name) for name in OPT} == OPT  # negative control: these would be taken
    assert tokens(GenerationConfig.from_model_config(model.config)) != (DEC, SEP, PAD)
    assert tokens(model.generation_config) == (DEC, SEP, PAD)
    other = captioner(bos_token_id=7, eos_token_id=9, pad_token_id=3)
    assert tokens(other.generation_config) == (7, 9, 3)
    assert (other.generate(PICTURES, max_new_tokens=2)[:, 0] == 7).all()


def test_the_model_is_a_generating_one(model) -> None:
    assert model.can_generate() and Blip2ForImageTextRetrieval.can_generate()
    assert model.main_input_name == "pixel_values"
    assert torch.equal(copy.deepcopy(model).generate(PICTURES, max_new_tokens=STEPS, eos_token_id=VOCAB), greedy(model))


def test_saved_and_loaded(model, tmp_path: Path) -> None:
    saved = copy.deepcopy(model)
    saved.generation_config.num_beams, saved.generation_config.max_new_tokens = 3, STEPS
    expected = saved.generate(PICTURES)
    assert torch.equal(expected, model.generate(PICTURES, num_beams=3, max_new_tokens=STEPS))
    saved.save_pretrained(tmp_path)
    assert tokens(GenerationConfig.from_pretrained(tmp_path)) == (DEC, SEP, PAD)
    loaded = Blip2ForImageTextRetrieval.from_pretrained(tmp_path)
    assert loaded.generation_config.num_beams == 3 and tokens(loaded.generation_config) == (DEC, SEP, PAD)
    assert torch.equal(loaded.generate(PICTURES), expected)


@pytest.mark.parametrize("stored", [None, {"_from_model_config": True, **OPT}, {"num_beams": 2}])
def test_without_a_generation_config_of_ours(model, tmp_path: Path, stored: dict | None) -> None:
    """A published checkpoint has none, or one derived from its language model, or one without tokens."""
    model.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.unlink()
    if stored is not None:
        file.write_text(json.dumps(stored))
    loaded = Blip2ForImageTextRetrieval.from_pretrained(tmp_path)
    beams = (stored or {}).get("num_beams", 1)
    if beams == 1:
        assert tokens(loaded.generation_config) == (DEC, SEP, PAD)
    expected = model.generate(PICTURES, max_new_tokens=STEPS, num_beams=beams)
    assert torch.equal(loaded.generate(PICTURES, max_new_tokens=STEPS), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(PICTURES, max_new_tokens=STEPS), expected)


def test_a_given_generation_config(model, tmp_path: Path) -> None:
    """Its settings go first, what it leaves open comes from the model."""
    model.save_pretrained(tmp_path)
    given = GenerationConfig(max_new_tokens=STEPS, num_beams=2)
    expected = model.generate(PICTURES, num_beams=2, max_new_tokens=STEPS)
    assert torch.equal(model.generate(PICTURES, generation_config=given), expected)
    assert given.eos_token_id is None  # the caller's object stays as it is
    loaded = Blip2ForImageTextRetrieval.from_pretrained(tmp_path, generation_config=given)
    assert torch.equal(loaded.generate(PICTURES), expected)


def test_connector_only(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "whole")
    trained = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "whole")
    trained.freeze_vision()
    with torch.no_grad():
        trained.lm_head.dense.weight.add_(0.1)
    trained.generation_config.num_beams = 3
    expected = trained.generate(PICTURES, max_new_tokens=STEPS)
    trained.save_pretrained(tmp_path / "connector", connector_only=True)
    loaded = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "connector")
    assert loaded.generation_config.num_beams == 3
    assert torch.equal(loaded.generate(PICTURES, max_new_tokens=STEPS), expected)
    (tmp_path / "connector" / "generation_config.json").unlink()  # as of an older save
    assert tokens(Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "connector").generation_config) == (
        DEC,
        SEP,
        PAD,
    )


@torch.no_grad()
def test_folders_of_transformers_and_ours(model, tmp_path: Path) -> None:
    ids = torch.full((3, 4), 110)
    peer = peer_retrieval()
    peer.save_pretrained(tmp_path / "theirs")
    ours = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "theirs")  # the head of the captions is new
    assert tokens(ours.generation_config) == (DEC, SEP, PAD)
    assert ours.generate(PICTURES, max_new_tokens=2).shape[0] == 3
    torch.testing.assert_close(ours(PICTURES, ids).logits_per_image, peer(PICTURES, ids).logits_per_image, **EXACT)
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(theirs(PICTURES, ids).logits_per_image, model(PICTURES, ids).logits_per_image, **EXACT)


def test_end_of_text_of_published_files() -> None:
    """They have `null`, which is not a choice against [SEP]."""
    assert Blip2QFormerConfig(eos_token_id=None).eos_token_id == 102
    assert Blip2QFormerConfig(eos_token_id=7).eos_token_id == 7
    assert Blip2QFormerConfig(vocab_size=50).eos_token_id is None
