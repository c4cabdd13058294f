"""The paper's settings and how a caller's options win over them."""

import pytest

from blip2_hf import presets
from blip2_hf.presets import CAPTIONING, VQA, fill, vqa_prompt, with_defaults


def test_prompts_of_the_paper() -> None:
    assert presets.CAPTION_PROMPT == "a photo of"
    assert fill(vqa_prompt(False), "is it red?") == "Question: is it red? Answer:"
    assert fill(vqa_prompt(True), "is it red?") == "Question: is it red? Short answer:"


def test_braces_in_a_question_stay() -> None:
    assert fill("Question: {} Answer:", "what does {name} in {} mean?") == (
        "Question: what does {name} in {} mean? Answer:"
    )


def test_settings_of_the_paper() -> None:
    assert VQA == {"num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 10}
    assert CAPTIONING == {"num_beams": 5, "min_new_tokens": 8, "max_new_tokens": 30}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, VQA),
        ({"num_beams": 3}, {**VQA, "num_beams": 3}),
        ({"num_beams": 1}, {"num_beams": 1, "max_new_tokens": 10}),  # a length penalty is for beams
        ({"num_beams": 1, "length_penalty": 0.5}, {"num_beams": 1, "length_penalty": 0.5, "max_new_tokens": 10}),
        ({"max_length": 40}, {"num_beams": 5, "length_penalty": -1.0, "max_length": 40}),
        ({"generation_config": "given"}, {"generation_config": "given"}),
    ],
)
def test_what_is_given_wins(options: dict, expected: dict) -> None:
    before = dict(VQA), dict(options)
    assert with_defaults(options, VQA) == expected
    assert before == (VQA, options)


def test_a_new_limit_replaces_the_other_kind_of_limit() -> None:
    assert with_defaults({"max_new_tokens": 4}, {"max_length": 40}) == {"max_new_tokens": 4}


def test_shortest_is_never_above_longest() -> None:
    assert with_defaults({"max_new_tokens": 5}, CAPTIONING)["min_new_tokens"] == 5
    assert with_defaults({"max_new_tokens": 5, "min_new_tokens": 7}, CAPTIONING)["min_new_tokens"] == 7
