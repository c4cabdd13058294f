"""When pipelines read images: the next batch of a list meanwhile, of a generator nothing before it is asked for."""

import threading

import pytest
import torch

from blip2_hf import pipeline
from blip2_hf.pipelines.requests import Preparer
from tiny_checkpoints import PHOTOS, TowerCounter

PATIENCE = 60  # seconds after which a test fails instead of waiting for ever


@pytest.fixture(scope="module")
def describe(checkpoint):
    return pipeline("image-to-text", model=checkpoint("opt"), device="cpu", prompt="a photo of", max_new_tokens=4)


@pytest.fixture(scope="module")
def ask(checkpoint):
    return pipeline("visual-question-answering", model=checkpoint("opt"), device="cpu", max_new_tokens=3)


@pytest.mark.parametrize("task", ["describe", "ask"])
def test_the_next_batch_of_a_list_is_read_while_the_model_works(task, photos, request, monkeypatch) -> None:
    pipe = request.getfixturevalue(task)
    names = [photos[name] for name in PHOTOS]
    inputs = names if task == "describe" else [{"image": name, "question": "what is it?"} for name in names]
    expected = [pipe(each) for each in inputs]
    read, generate, second, seen = Preparer.read, type(pipe.model).generate, threading.Event(), []

    def reading(self, requests):
        result = read(self, requests)
        if requests[0].image == names[1]:
            second.set()
        return result

    def generating(self, *args, **options):
        seen.append(second.wait(PATIENCE))  # for ever in the first batch, if nobody reads meanwhile
        return generate(self, *args, **options)

    monkeypatch.setattr(Preparer, "read", reading)
    monkeypatch.setattr(type(pipe.model), "generate", generating)
    assert pipe(inputs, batch_size=1) == expected
    assert seen == [True] * 3


def test_no_more_than_a_batch_of_a_generator_is_read(describe, photos) -> None:
    drawn = []
    results = describe((drawn.append(name) or photos[name] for name in PHOTOS), batch_size=2)
    assert drawn == []
    next(results)
    assert drawn == list(PHOTOS[:2])


def test_an_image_of_a_later_batch_that_cannot_be_read(describe, photos) -> None:
    with pytest.raises(ValueError, match="missing.png"):
        describe([photos["coffee"], photos["chelsea"], "missing.png"], batch_size=1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


def test_pixels_in_the_place_of_images(describe, ask, photos) -> None:
    names = [photos[name] for name in PHOTOS]
    pixels = list(describe.processor.image_processor(names, return_tensors="pt")["pixel_values"])
    rows = [{"pixel_values": pixels[0]}, names[1], {"pixel_values": pixels[2][None]}]
    assert describe(rows, batch_size=3) == describe(names)
    assert list(describe(iter(rows[::2]), batch_size=2)) == describe(names[::2])
    answers = []
    for image in ({"pixel_values": pixels[0]}, {"image": names[0]}):
        with TowerCounter(ask.model) as tower:
            answers.append(ask([{**image, "question": question} for question in ("what?", "who?")], batch_size=2))
        assert tower.runs == [1]  # the questions share the image
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (torch.zeros(2, 3, 28, 28), r"\(2, 3, 28, 28\)"),
        (torch.zeros(3, 28, 28, dtype=torch.uint8), r"\(3, 28, 28\)"),
        (torch.zeros(28, 28), r"\(28, 28\)"),
        ("a.png", "str"),
    ],
)
def test_wrong_pixels(describe, wrong, got) -> None:
    with pytest.raises(ValueError, match=f"`pixel_values` must be one image as a float tensor.*got {got}"):
        describe({"pixel_values": wrong})
