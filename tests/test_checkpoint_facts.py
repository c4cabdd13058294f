"""What is read from `config.json` and `generation_config.json`; `test_processing_files.py` has whole folders."""

import pytest

from blip2_hf.checkpoint_facts import generation_end, has_no_image_token, is_encoder_decoder
from tiny_tokenizers import tiny_llama_tokenizer, tiny_opt_tokenizer


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"text_config": None}, None),
        ({"text_config": {"model_type": "t5"}}, True),
        ({"text_config": {"model_type": "llama"}}, False),
        ({"text_config": {"model_type": "t5"}, "use_decoder_only_language_model": False}, True),
        ({"text_config": {"is_encoder_decoder": False, "model_type": "t5"}}, False),
    ],
)
def test_is_encoder_decoder(config: dict, expected: bool | None) -> None:
    assert is_encoder_decoder(config) is expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, False),
        ({"model_type": "opt"}, False),
        ({"qformer_config": {}}, True),
        ({"qformer_config": {}, "image_token_index": None}, True),
        ({"qformer_config": {}, "image_token_index": 0}, False),
        ({"qformer_config": {}, "image_token_id": 7}, False),
    ],
)
def test_has_no_image_token(config: dict, expected: bool) -> None:
    assert has_no_image_token(config) is expected


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, {}, None),
        ({"text_config": {"eos_token_id": 4}}, {}, "\n"),
        ({"text_config": {"eos_token_id": 4}}, {"eos_token_id": 2}, None),
        ({"text_config": {"eos_token_id": 2}}, {"eos_token_id": [4, 2]}, "\n"),
        ({}, {"eos_token_id": 50118}, None),
        ({}, {"eos_token_id": []}, None),
        ({}, {"eos_token_id": None}, None),
    ],
)
def test_generation_end(config: dict, generation: dict, expected: str | None) -> None:
    assert generation_end(config, generation, tiny_opt_tokenizer()) == expected


def test_generation_end_that_is_no_text_of_its_own() -> None:
    assert generation_end({}, {"eos_token_id": 3}, tiny_llama_tokenizer()) == "<0x0A>"
