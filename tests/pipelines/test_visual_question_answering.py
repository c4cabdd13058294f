"""Answers: the paper's settings, scores, images encoded once, every form of input."""

import pytest
import torch
from transformers import (
    Blip2ForConditionalGeneration as PeerModel,
    Blip2Processor as PeerProcessor,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)

from blip2_hf import pipeline
from blip2_hf.presets import VQA
from tiny_checkpoints import PHOTOS, TowerCounter, peer_tokens, photo

QUESTIONS = ["is it a dog?", "what color is the cat?", "who?", "how many people are on the beach ?", "what is this?"]
PROMPTS = {"opt": "Question: {} Answer:", "llama": "Question: {} Answer:", "t5": "Question: {} Short answer:"}


@pytest.fixture(scope="module", params=list(PROMPTS))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def answer(family, checkpoint):
    return pipeline("visual-question-answering", model=checkpoint(family), device="cpu")


def best(results: list) -> list[str]:
    return [answers[0]["answer"] for answers in results]


def assert_equal(got: list, expected: list) -> None:
    """Equal answers, and scores up to rounding in batches of another size."""
    assert len(got) == len(expected)
    for answers, others in zip(got, expected, strict=True):
        assert [a["answer"] for a in answers] == [o["answer"] for o in others]
        assert [a["score"] for a in answers] == pytest.approx([o["score"] for o in others], rel=1e-2, abs=0)


# -- the paper's settings --------------------------------------------------------------------------------------------


def test_answers_are_those_of_transformers_with_the_papers_settings(family, answer, checkpoint, photos) -> None:
    folder = checkpoint(family)
    peer, processor = PeerModel.from_pretrained(folder), PeerProcessor.from_pretrained(folder)
    for question in QUESTIONS[:2]:
        tokens = peer_tokens(peer, processor, photo("chelsea"), PROMPTS[family].replace("{}", question), **VQA)
        expected = processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        assert answer(photos["chelsea"], question)[0]["answer"] == expected
        greedy = peer_tokens(peer, processor, photo("chelsea"), question, max_new_tokens=10)
        assert processor.batch_decode(greedy, skip_special_tokens=True)[0].strip() != expected  # the settings matter


@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_question_conditioned_answers_are_those_of_transformers(language_model, checkpoint, photos) -> None:
    folder = checkpoint(f"instruct-{language_model}")
    peer = InstructBlipForConditionalGeneration.from_pretrained(folder)
    processor = InstructBlipProcessor.from_pretrained(folder)
    pipe = pipeline("vqa", model=folder, device="cpu")
    prompts = [PROMPTS[language_model].replace("{}", question) for question in QUESTIONS]
    tokens = [peer_tokens(peer, processor, photo("coffee"), prompt, **VQA) for prompt in prompts]
    expected = [processor.batch_decode(each, skip_special_tokens=True)[0].strip() for each in tokens]
    with TowerCounter(pipe.model) as tower:
        assert best(pipe(photos["coffee"], QUESTIONS, batch_size=3)) == expected
    assert tower.runs == [1]
    two = [{"image": photos[name], "question": QUESTIONS[:2]} for name in ("chelsea", "coffee")]
    assert best(pipe(two, batch_size=2)[1]) == expected[:2]  # several images with several questions each


def test_prompt_and_options_can_be_changed(answer, photos) -> None:
    image, question = photos["chelsea"], QUESTIONS[1]
    default = answer(image, question)
    assert answer(image, question, prompt="{} ?") != default
    assert answer(image, question, generate_kwargs={"num_beams": 1, "max_new_tokens": 3}) != default
    assert answer(image, question, generate_kwargs=VQA) == default
    explicit = {"num_beams": 5, "max_new_tokens": 10, "length_penalty": 2.0}
    assert answer(image, question, generate_kwargs=explicit)[0]["score"] != default[0]["score"]


# -- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0])
def test_score_is_what_beams_are_ranked_by(answer, photos, penalty) -> None:
    options = {**VQA, "length_penalty": penalty}
    result = answer(photos["chelsea"], QUESTIONS[0], top_k=5, generate_kwargs=options)
    scores = [entry["score"] for entry in result]
    assert scores == sorted(scores, reverse=True) and all(0 < score <= 1 for score in scores)
    assert len({entry["answer"] for entry in result}) == len(result) <= 5
    model, processor = answer.model, answer.processor
    prompt = answer._default_prompt().replace("{}", QUESTIONS[0])
    inputs = processor(images=photos["chelsea"], text=prompt, return_tensors="pt")
    outputs = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    steps = model.compute_transition_scores(outputs.sequences, outputs.scores, outputs.beam_indices)
    length = (outputs.beam_indices >= 0).sum()
    log_probability = steps.double()[outputs.beam_indices >= 0].sum()
    expected = (log_probability / length**penalty).exp().item()
    assert scores[0] == pytest.approx(expected, rel=1e-3, abs=0)
    assert_equal([answer(photos["chelsea"], QUESTIONS[0], generate_kwargs=options)], [result[:1]])


def test_score_without_beams(answer, photos) -> None:
    options = {"num_beams": 1, "max_new_tokens": 6}
    (result,) = answer(photos["chelsea"], QUESTIONS[0], generate_kwargs=options)
    model, processor = answer.model, answer.processor
    prompt = answer._default_prompt().replace("{}", QUESTIONS[0])
    inputs = processor(images=photos["chelsea"], text=prompt, return_tensors="pt")
    outputs = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    tokens = answer.new_tokens(outputs.sequences, inputs["input_ids"])[0]
    steps = [logits[0].log_softmax(-1)[token] for logits, token in zip(outputs.logits, tokens, strict=True)]
    assert result["score"] == pytest.approx(torch.stack(steps).mean().exp().item(), rel=1e-4)


def test_score_ends_at_the_end_token(answer) -> None:
    from types import SimpleNamespace

    from blip2_hf.pipelines.scores import sequence_log_scores

    half = torch.tensor([[0.0, 0.0]]).repeat(2, 1)  # two tokens of probability 1/2, for two sequences
    outputs = SimpleNamespace(logits=(half, half, half))
    tokens = torch.tensor([[0, 1, 0], [0, 0, 0]])  # 1 ends
    config = SimpleNamespace(eos_token_id=[1], length_penalty=0.0)
    assert sequence_log_scores(outputs, tokens, config).exp().tolist() == pytest.approx([1 / 4, 1 / 8])
    config.length_penalty = 1.0
    assert sequence_log_scores(outputs, tokens, config).exp().tolist() == pytest.approx([1 / 2, 1 / 2])


def test_answers_are_ranked_where_scores_underflow() -> None:
    from blip2_hf.pipelines.visual_question_answering import _best

    ranked = [("third", -3000.0), ("first", -1000.0), ("second", -2000.0), ("also second", -2000.0), ("first", -4000.0)]
    assert _best(ranked) == [{"answer": name, "score": 0.0} for name in ("first", "second", "also second", "third")]


def test_long_answers_keep_the_order_of_beam_search(answer, photos) -> None:
    options = {**VQA, "max_new_tokens": 40, "min_new_tokens": 40}
    result = answer(photos["chelsea"], QUESTIONS[0], top_k=5, generate_kwargs=options)
    assert {entry["score"] for entry in result} == {0.0}, "too short to show anything"
    prompt = answer._default_prompt().replace("{}", QUESTIONS[0])
    inputs = answer.processor(images=photos["chelsea"], text=prompt, return_tensors="pt")
    tokens = answer.new_tokens(answer.model.generate(**inputs, **options, num_return_sequences=5), inputs["input_ids"])
    assert [entry["answer"] for entry in result] == list(dict.fromkeys(answer.decode(tokens)))


def test_top_k(answer, photos) -> None:
    assert len(answer(photos["chelsea"], QUESTIONS[0])) == 1
    assert 1 <= len(answer(photos["chelsea"], QUESTIONS[0], top_k=3)) <= 3
    with pytest.raises(ValueError, match="`top_k` must be at most the number of beams, got 6 for 5"):
        answer(photos["chelsea"], QUESTIONS[0], top_k=6)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="`top_k` must be a positive integer"):
            answer(photos["chelsea"], QUESTIONS[0], top_k=wrong)
    sampled = {"num_beams": 1, "do_sample": True}
    assert 1 <= len(answer(photos["chelsea"], QUESTIONS[0], top_k=4, generate_kwargs=sampled)) <= 4


# -- the tower runs once for an image --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_tower_runs_once_for_five_questions(answer, photos, batch_size) -> None:
    image = photo("chelsea")
    expected = [answer(image, question) for question in QUESTIONS]
    forms = [
        ((image, QUESTIONS), {}),
        ((), {"image": photos["chelsea"], "question": QUESTIONS}),
        (({"image": image, "question": QUESTIONS},), {}),
        (([{"image": photos["chelsea"], "question": question} for question in QUESTIONS],), {}),
        (([{"image": image, "question": question} for question in QUESTIONS],), {}),
    ]
    for args, kwargs in forms:
        with TowerCounter(answer.model) as tower:
            assert_equal(answer(*args, **kwargs, batch_size=batch_size), expected)
        assert tower.runs == [1]


def test_other_images_are_encoded_too(answer, photos) -> None:
    items = [{"image": photos[name], "question": question} for name in PHOTOS for question in QUESTIONS[:2]]
    with TowerCounter(answer.model) as tower:
        together = answer(items, batch_size=3)
    assert tower.runs == [3]
    with TowerCounter(answer.model) as tower:
        assert_equal([answer(item) for item in items], together)
    assert tower.runs == [1] * 6
    assert together[0] != together[2]  # the same question about another photo


def test_encoded_images_are_not_encoded_again(answer, photos) -> None:
    expected = answer(photos["chelsea"], QUESTIONS)
    encoded = answer.encode_image(photos["chelsea"])
    with TowerCounter(answer.model) as tower:
        assert_equal(answer(encoded, QUESTIONS, batch_size=2), expected)
        assert_equal(answer(image_embeds=encoded, question=QUESTIONS), expected)
        assert_equal(answer(image_embeds=encoded.image_embeds, question=QUESTIONS), expected)
        assert_equal([answer({"image_embeds": encoded, "question": QUESTIONS[0]})], expected[:1])
    assert tower.runs == []


# -- forms of input --------------------------------------------------------------------------------------------------


def test_questions_about_every_image(answer, photos) -> None:
    paths, questions = [photos[name] for name in PHOTOS[:2]], QUESTIONS[:2]
    expected = [answer(path, question) for path in paths for question in questions]
    assert_equal(answer(paths, questions, batch_size=2), expected)
    assert_equal(answer(paths, questions[0]), expected[::2])
    assert_equal(answer(paths[:1], questions[0]), expected[:1])
    assert_equal(list(answer(iter(paths), questions)), expected)
    assert answer([], questions) == answer([]) == []


def test_datasets_and_generators(answer, photos) -> None:
    items = [{"image": photos[name], "question": QUESTIONS[0]} for name in PHOTOS]
    expected = answer(items)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(items)

        def __getitem__(self, index):
            return items[index]

    results = answer(Rows(), batch_size=2)
    assert len(results) == 3
    assert_equal(list(results), expected)
    assert_equal(list(answer(iter(items), batch_size=2)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`image` or `image_embeds`, got none"),
        ({"image": "a.png"}, "`question` must be given"),
        ({"image": ["a.png", "b.png"]}, "`question` must be given"),
        ({"image": {"image": "a.png"}}, "`question` must be given"),
        ({"image": "a.png", "question": []}, "`question` must be a string or a list of strings"),
        ({"image": "a.png", "question": ""}, "`question` must be a text that is not empty, got ''"),
        ({"image": "a.png", "question": ["x", " \n"]}, "`question` must be a text that is not empty"),
        ({"image": {"image": "a.png", "question": " "}}, "`question` must be a text that is not empty"),
        ({"image": [{"image": "a.png", "question": ["x", ""]}]}, "`question` must be a text that is not empty"),
        ({"image": "a.png", "question": [1]}, "`question` must be a string or a list of strings"),
        ({"image": {"image": "a.png", "question": "x"}, "question": "y"}, "`question` is given twice"),
        ({"image": "a.png", "question": "x", "prompt": "Question: Answer:"}, "`prompt` must have {} where"),
        ({"image": "a.png", "question": "x", "generate_kwargs": {"num_return_sequences": 2}}, "`top_k`"),
        ({"image": "missing.png", "question": "x"}, "missing.png"),
    ],
)
def test_wrong_arguments(answer, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        answer(**arguments)
