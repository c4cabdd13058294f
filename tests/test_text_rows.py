"""Rows of ids, by hand."""

import numpy as np
import pytest
import torch

from blip2_hf.text_rows import (
    TextOptions,
    ended,
    ends_texts,
    id_rows,
    pad,
    padded_length,
    to_tensor,
    token_id,
    without_prompts,
)
from tiny_tokenizers import tiny_bert_tokenizer, tiny_llama_tokenizer, tiny_opt_tokenizer, tiny_t5_tokenizer

ROWS = [[5, 6, 7], [8]]


def test_pad() -> None:
    assert pad(ROWS, 0, 4, "left") == [[0, 5, 6, 7], [0, 0, 0, 8]]
    assert pad(ROWS, 0, 4, "right") == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert pad(ROWS, 0, None, "left") is ROWS


@pytest.mark.parametrize(
    ("options", "limit", "to_tensors", "expected"),
    [
        ({}, None, True, 3),
        ({}, None, False, None),
        ({"padding": True}, None, False, 3),
        ({"padding": "max_length"}, 9, True, 9),
        ({"padding": True, "pad_to_multiple_of": 8}, 9, True, 8),
        ({"padding": "max_length", "pad_to_multiple_of": 8}, 9, True, 16),
        ({"padding": "do_not_pad"}, 9, False, None),
    ],
)
def test_padded_length(options: dict, limit: int | None, to_tensors: bool, expected: int | None) -> None:
    assert padded_length(ROWS, TextOptions(**options), limit, to_tensors) == expected


def test_rows_of_one_length_need_no_padding() -> None:
    assert padded_length([[1], [2]], TextOptions(padding=False), None, True) is None
    with pytest.raises(ValueError, match=r"different lengths \[1, 3\]"):
        padded_length(ROWS, TextOptions(padding=False), None, True)


def test_limits() -> None:
    tokenizer = tiny_opt_tokenizer()
    assert TextOptions().limit(tokenizer) == 512
    assert TextOptions(max_length=7).limit(tokenizer) == 7
    tokenizer.model_max_length = int(1e30)
    assert TextOptions().limit(tokenizer) is None


def test_options_of_transformers_enumerations() -> None:
    from transformers.tokenization_utils_base import TruncationStrategy
    from transformers.utils import PaddingStrategy

    options = TextOptions(padding=PaddingStrategy.MAX_LENGTH, truncation=TruncationStrategy.LONGEST_FIRST)
    assert options.pads_to == "max_length" and options.truncates
    assert not TextOptions(truncation=TruncationStrategy.DO_NOT_TRUNCATE).truncates


def test_ended() -> None:
    assert ended([3, 4], 2) == [3, 4, 2] == ended([3, 4, 2], 2)
    assert ended([], 2) == [2]


def test_ids_as_rows() -> None:
    for ids in (torch.tensor(ROWS[0]), np.array(ROWS[0]), ROWS[0]):
        assert id_rows(ids) == [ROWS[0]]
    for ids in (torch.tensor([[1, 2], [3, 4]]), [torch.tensor([1, 2]).tolist(), (3, 4)]):
        assert id_rows(ids) == [[1, 2], [3, 4]]


def test_without_prompts() -> None:
    assert without_prompts([[1, 2, 9], [1, 2, 8], [3, 4, 7], [3, 4, 6]], [[1, 2], [3, 4]]) == [[9], [8], [7], [6]]
    with pytest.raises(ValueError, match="generated sequence 1 does not begin with input_ids"):
        without_prompts([[1, 2, 9], [1, 3, 8]], [[1, 2]])
    with pytest.raises(ValueError, match="3 generated sequences do not fit 2 rows"):
        without_prompts([[1]] * 3, [[1]] * 2)


def test_tensors() -> None:
    assert to_tensor(ROWS, None) is ROWS
    assert to_tensor([[1, 2]], "np").dtype == np.int64
    assert torch.equal(to_tensor([[1, 2]], "pt"), torch.tensor([[1, 2]]))


def test_facts_about_tokenizers() -> None:
    ends = {make: ends_texts(make()) for make in (tiny_opt_tokenizer, tiny_llama_tokenizer, tiny_bert_tokenizer)}
    assert not any(ends.values()) and ends_texts(tiny_t5_tokenizer())
    opt, llama = tiny_opt_tokenizer(), tiny_llama_tokenizer()
    assert token_id(opt, "\n") == 4 and token_id(opt, "</s>") == 2
    assert token_id(llama, "<0x0A>") == 3
    with pytest.raises(ValueError, match="must be one token"):
        token_id(llama, "\n")
