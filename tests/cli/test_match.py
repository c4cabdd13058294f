"""`blip2 match`."""

import json

import pytest
import torch
from transformers import Blip2ForImageTextRetrieval, Blip2Processor

from tiny_checkpoints import photo

TEXTS = ["a photo of a cat", "two dogs on the beach in front of a house", "a man"]


@pytest.fixture(scope="module")
def expected(checkpoint) -> list[tuple[float, float]]:
    """ITC cosine and ITM probability of each text, by `transformers`, one pair at a time."""
    model = Blip2ForImageTextRetrieval.from_pretrained(checkpoint("retrieval"))
    processor = Blip2Processor.from_pretrained(checkpoint("retrieval"))
    scores = []
    for text in TEXTS:
        inputs = processor(images=photo("chelsea"), text=text, return_tensors="pt")
        with torch.no_grad():
            cosine = model(**inputs, use_image_text_matching_head=False).logits_per_image.item()
            logits = model(**inputs, use_image_text_matching_head=True).logits_per_image
        scores.append((cosine, logits.softmax(dim=-1)[0, 1].item()))
    return scores


@pytest.mark.parametrize("batch_size", ["1", "2", "64"])
def test_scores_are_those_of_transformers(blip2, checkpoint, photos, expected, batch_size) -> None:
    arguments = ["match", photos["chelsea"], *TEXTS, "--model", checkpoint("retrieval"), "--batch-size", batch_size]
    done = blip2(*arguments, "--json")
    assert (done.code, done.err, len(done.out)) == (0, [], 1)
    row = json.loads(done.out[0])
    assert set(row) == {"image", "texts", "model"}
    assert [entry["text"] for entry in row["texts"]] == TEXTS
    got = [(entry["itc_cosine"], entry["itm_probability"]) for entry in row["texts"]]
    for pair, other in zip(got, expected, strict=True):
        assert pair == pytest.approx(other, abs=1e-5)
    other = json.loads(blip2(*("match", photos["coffee"], *arguments[2:]), "--json").out[0])["texts"][0]
    assert other["itc_cosine"] != pytest.approx(expected[0][0], abs=1e-3)  # another photo


def test_text(blip2, checkpoint, photos, expected) -> None:
    done = blip2("match", photos["chelsea"], *TEXTS, "--model", checkpoint("retrieval"))
    assert done.out[0].split() == ["ITC", "ITM", "text"]
    for line, text, scores in zip(done.out[1:], TEXTS, expected, strict=True):
        cosine, probability, shown = line.split(maxsplit=2)
        assert shown == text
        assert (float(cosine), float(probability)) == pytest.approx(scores, abs=6e-4)


def test_a_text_that_is_too_long(blip2, checkpoint, photos) -> None:
    done = blip2("match", photos["chelsea"], "a cat " * 600, "--model", checkpoint("retrieval"))
    assert (done.code, done.out) == (1, []) and len(done.err) == 1
