"""`blip2 chat`."""

import json

import pytest

from blip2_hf import pipeline
from blip2_hf.pipelines import Conversation


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_answers_are_those_of_a_conversation(kind, blip2, checkpoint, photos) -> None:
    pipe = pipeline("image-to-text", model=checkpoint(kind), device="cpu")
    conversation = Conversation(pipe, photos["chelsea"], generate_kwargs={"num_beams": 2, "max_new_tokens": 4})
    questions = ["is it a dog?", "what is it?"]
    expected = [conversation.ask(question).answer for question in questions]
    arguments = ["chat", photos["chelsea"], "--model", checkpoint(kind), "--num-beams", "2", "--max-new-tokens", "4"]
    done = blip2(*arguments, stdin="\n".join(questions))
    assert (done.code, done.out, done.err) == (0, expected, [])
    rows = [json.loads(line) for line in blip2(*arguments, "--json", stdin="\n".join(questions)).out]
    assert [set(row) for row in rows] == [{"image", "question", "answer", "dropped_turns", "model"}] * 2
    assert [(row["question"], row["answer"]) for row in rows] == list(zip(questions, expected, strict=True))


@pytest.mark.parametrize("end", ["exit", "EXIT", "quit", ""])
def test_ends(blip2, checkpoint, photos, end) -> None:
    stdin = f"is it a dog?\n\n  \n{end}\n"
    done = blip2("chat", photos["chelsea"], "--model", checkpoint("opt"), stdin=stdin + "what is it?\n" * bool(end))
    assert done.code == 0 and len(done.out) == 1


def test_no_questions(blip2, checkpoint, photos) -> None:
    done = blip2("chat", photos["chelsea"], "--model", checkpoint("opt"))
    assert (done.code, done.out, done.err) == (0, [], [])


def test_dropped_turns_are_announced(blip2, checkpoint, photos) -> None:
    questions = ["what is this red thing on the table?"] * 8
    arguments = ["chat", photos["chelsea"], "--model", checkpoint("opt"), "--max-new-tokens", "3", "--json"]
    done = blip2(*arguments, stdin="\n".join(questions))
    dropped = [json.loads(line)["dropped_turns"] for line in done.out]
    assert done.code == 0 and len(dropped) == 8 and any(dropped)
    assert len(done.err) == sum(1 for count in dropped if count)
    assert all("the conversation is too long" in line for line in done.err)


def test_a_question_that_is_too_long_does_not_end_it(blip2, checkpoint, photos) -> None:
    stdin = "what is it? " * 200 + "\nis it a dog?\n"
    done = blip2("chat", photos["chelsea"], "--model", checkpoint("opt"), stdin=stdin)
    assert done.code == 1 and len(done.out) == 1
    assert len(done.err) == 1 and "`question` is too long" in done.err[0]
