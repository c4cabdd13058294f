"""The text-only corpus: the paper's prompts, true descriptions, right answers, the words of captions and questions."""

import re
from itertools import islice

import numpy as np
from hypothesis import given, settings

from blip2_hf.data.shapes.answers import answer_question
from blip2_hf.data.shapes.captions import captions
from blip2_hf.data.shapes.corpus import corpus, description, document
from blip2_hf.data.shapes.grammar import check_caption
from blip2_hf.data.shapes.questions import questions
from blip2_hf.data.shapes.scenes import Scene
from blip2_hf.data.shapes.words import SPOT_PHRASES
from blip2_hf.presets import CAPTION_PROMPT, VQA_PROMPTS
from tiny_scenes import drawn, scenes

FORMS = [prompt.split("{}")[1].strip() for prompt in VQA_PROMPTS.values()]
TURN = re.compile(rf"Question: (.*?\?) ({'|'.join(FORMS)}) ([a-z ]+)(?:\. |$)")


def documents(count: int) -> list[str]:
    return list(islice(corpus(np.random.default_rng(0)), count))


@settings(max_examples=150, deadline=None)
@given(drawn)
def test_documents_are_true(drawn) -> None:
    scene, rng = drawn
    text = document(scene, rng)
    assert "\n" not in text and text == text.strip()
    described, *_ = re.split(f"Question:|{CAPTION_PROMPT}", text)
    if described.strip().endswith("."):
        check_notes(described, scene)
    else:  # a caption alone
        assert not described or check_caption(described, scene).true, (text, scene)
    if CAPTION_PROMPT in text:
        assert check_caption(text.split(f"{CAPTION_PROMPT} ")[1], scene).true, text
    turns = TURN.findall(text)
    assert len(turns) == text.count("Question:")
    assert len({form for _, form, _ in turns}) <= 1
    for question, _, answer in turns:
        assert answer == answer_question(question, scene), text


def check_notes(text: str, scene: Scene) -> None:
    """One for each thing, from left to right, all true."""
    notes = text.strip().removesuffix(".").split(". ")
    things = sorted(scene.things, key=lambda thing: thing.x)
    for note, thing in zip(notes, things, strict=True):
        *words, place = f"{note} ".split(" ", 4)
        assert words == [thing.size, thing.texture, thing.colour, thing.shape]
        spot = SPOT_PHRASES[place.strip()][0] if place else ""
        assert check_caption(f"a {' '.join(words)} {spot}", scene).true, (text, scene)


@settings(max_examples=50, deadline=None)
@given(drawn)
def test_a_description_notes_every_thing(drawn) -> None:
    scene, rng = drawn
    check_notes(description(scene, rng), scene)


def test_all_forms_are_frequent() -> None:
    texts = documents(400)
    shares = {form: sum(f"? {form} " in text for text in texts) / len(texts) for form in FORMS}
    assert all(0.15 < share < 0.4 for share in shares.values()), shares
    assert 0.4 < sum(CAPTION_PROMPT in text for text in texts) / len(texts) < 0.6
    numbers = [len(TURN.findall(text)) for text in texts]
    assert set(numbers) == {0, 1, 2, 3, 4}
    assert numbers.count(1) > 0.6 * sum(number > 0 for number in numbers)  # an answer mostly ends the text


def test_it_has_the_words_of_captions_and_questions() -> None:
    rng = np.random.default_rng(1)
    known = set(re.findall(r"[a-z]+", " ".join(documents(1500))))
    for scene in scenes(150, 1):
        texts = captions(scene, rng) + [f"{one.question} {one.answer}" for one in questions(scene, rng)]
        assert set(re.findall(r"[a-z]+", " ".join(texts))) <= known


def test_same_seed_same_corpus() -> None:
    assert documents(20) == documents(20)
