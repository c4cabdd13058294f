"""Conversations: the prompt, the image encoded once, turns that no longer fit."""

import pytest

from blip2_hf import pipeline
from blip2_hf.pipelines import Conversation
from blip2_hf.pipelines.chat import first_answer
from tiny_checkpoints import TowerCounter


@pytest.fixture(params=["opt", "t5", "instruct-opt"])
def pipe(request, checkpoint):
    return pipeline("image-to-text", model=checkpoint(request.param), device="cpu")


@pytest.fixture
def prompts(pipe, monkeypatch) -> list[str]:
    """Prompts that were given to the processor."""
    seen = []
    call = type(pipe.processor).__call__

    def spy(self, *args, **kwargs):
        if kwargs.get("text"):
            seen.extend(kwargs["text"])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.processor), "__call__", spy)
    return seen


def test_earlier_turns_are_part_of_the_prompt(pipe, prompts, photos) -> None:
    conversation = Conversation(pipe, photos["chelsea"], generate_kwargs={"max_new_tokens": 2})
    conversation.ask("is it a dog?")
    conversation.turns[-1] = ("is it a dog?", "no.")
    conversation.ask("  what is\nit? ")
    assert prompts == [
        "Question: is it a dog? Answer:",
        "Question: is it a dog? Answer: no. Question: what is it? Answer:",
    ]


def test_answers_are_those_of_the_prompt(pipe, photos) -> None:
    options = {"max_new_tokens": 3, "num_beams": 2}
    with TowerCounter(pipe.model) as tower:
        conversation = Conversation(pipe, photos["chelsea"], generate_kwargs=options)
        first = conversation.ask("is it a dog?")
        second = conversation.ask("what is it?")
    assert tower.runs == [1]
    assert (first.dropped_turns, second.dropped_turns) == (0, 0)
    prompt = f"Question: is it a dog? Answer: {first.answer.rstrip('.')}. Question: what is it? Answer:"
    (expected,) = pipe(photos["chelsea"], prompt=prompt, generate_kwargs=options)
    assert second.answer == first_answer(expected["generated_text"])


def test_an_encoded_image_is_taken(pipe, photos) -> None:
    encoded = pipe.encode_image(photos["chelsea"])
    with TowerCounter(pipe.model) as tower:
        Conversation(pipe, encoded, generate_kwargs={"max_new_tokens": 2}).ask("what is it?")
    assert tower.runs == []


def test_oldest_turns_are_dropped_when_it_gets_too_long(pipe, prompts, photos, monkeypatch) -> None:
    conversation = Conversation(pipe, photos["chelsea"], generate_kwargs={"max_new_tokens": 2})
    conversation.turns = [("what is this thing on the table?", "a cat")] * 40
    reply = conversation.ask("is it red?")
    assert 0 < reply.dropped_turns < 40
    assert prompts[-1].count("Question:") == 41 - reply.dropped_turns
    assert len(conversation.turns) == 41 - reply.dropped_turns
    one_more = conversation._prompt(
        [("what is this thing on the table?", "a cat"), *conversation.turns[:-1]], "is it red?"
    )
    assert conversation._excess(one_more) is not None  # as few as possible


def test_a_question_that_cannot_fit_is_an_error(pipe, photos) -> None:
    conversation = Conversation(pipe, photos["chelsea"])
    with pytest.raises(ValueError, match="`question` is too long even without earlier turns"):
        conversation.ask("what is this? " * 500)
    with pytest.raises(ValueError, match="`question` must be a text that is not empty"):
        conversation.ask("  ")
    assert conversation.turns == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" yes ", "yes"),
        ("yes\nQuestion: why?", "yes"),
        ("a cat. Question: what color? Answer: red", "a cat."),
        ("", ""),
    ],
)
def test_first_answer(text, answer) -> None:
    assert first_answer(text) == answer
