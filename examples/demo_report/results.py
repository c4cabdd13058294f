"""What the models say about the pictures: everything that the report shows, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from blip2_hf import Blip2ForImageTextRetrieval, Blip2Processor, pipeline
from blip2_hf.data.shapes.grammar import check_caption
from blip2_hf.modeling.attention_maps import matching_maps, query_maps
from blip2_hf.presets import CAPTION_PROMPT, CAPTIONING

from .subjects import Subject

SHOWN_QUERIES = 8
_ANSWERS = 3
# exp(score) of a beam is then the answer's probability.
_PROBABILITIES = {"length_penalty": 0.0}


@dataclass(frozen=True)
class Asked:
    """A question, the most probable answers with their probabilities, and the true one (None: not known)."""

    question: str
    answers: tuple[tuple[str, float], ...]
    truth: str | None

    @property
    def right(self) -> bool | None:
        return None if self.truth is None else self.answers[0][0] == self.truth


@dataclass(frozen=True)
class Described:
    """All about one picture.

    Attributes:
        caption: of the captioning model.
        true: whether every statement of the caption is true; None: not known.
        asked: questions and answers.
        queries: numbers of the queries that are shown.
        query_maps: [queries, h, w], where these look.
        phrase_maps: [phrases, h, w], what speaks for the picture's matching each of `subject.phrases`.
    """

    subject: Subject
    caption: str
    true: bool | None
    asked: tuple[Asked, ...]
    queries: tuple[int, ...]
    query_maps: np.ndarray
    phrase_maps: np.ndarray


@dataclass(frozen=True)
class Ranking:
    """Texts against pictures; the true text of picture i is text i.

    Attributes:
        texts: M of them.
        cosines: [M, N] contrastive similarity.
        probabilities: [M, N] of text and picture belonging together.
    """

    texts: tuple[str, ...]
    cosines: np.ndarray
    probabilities: np.ndarray

    @staticmethod
    def found(scores: np.ndarray) -> int:
        """For how many texts the best picture is the right one."""
        return int((scores.argmax(axis=1) == np.arange(len(scores))).sum())


@dataclass(frozen=True)
class Models:
    """Names of the models: that captions, that answers, that compares."""

    caption: str
    answer: str
    match: str

    def __str__(self) -> str:
        return " · ".join(dict.fromkeys((self.caption, self.answer, self.match)))


def describe(subjects: Sequence[Subject], models: Models) -> tuple[list[Described], Ranking]:
    """Runs the three models on all pictures."""
    images = [subject.image for subject in subjects]
    captioner = pipeline("image-to-text", model=models.caption, prompt=CAPTION_PROMPT, progress=False)
    found = captioner(images, batch_size=len(images), generate_kwargs=CAPTIONING)
    captions = [caption[0]["generated_text"] for caption in found]
    chosen, maps = _query_maps(captioner, images)
    asked = _answers(subjects, models.answer)
    # Of the user's own pictures, for want of a true one, the generated caption is ranked.
    texts = [subject.caption or caption for subject, caption in zip(subjects, captions, strict=True)]
    phrase_maps, ranking = _compare(subjects, texts, models.match)
    results = [
        Described(
            subject=subject,
            caption=captions[number],
            true=None if subject.scene is None else check_caption(captions[number], subject.scene).true,
            asked=asked[number],
            queries=chosen,
            query_maps=maps[number][list(chosen)],
            phrase_maps=phrase_maps[number],
        )
        for number, subject in enumerate(subjects)
    ]
    return results, ranking


def _answers(subjects: Sequence[Subject], model: str | Path) -> list[tuple[Asked, ...]]:
    ask = pipeline("visual-question-answering", model=model, progress=False)
    found = []
    for subject in subjects:
        questions = [question for question, _ in subject.questions]
        answers = ask(subject.image, questions, top_k=_ANSWERS, batch_size=8, generate_kwargs=_PROBABILITIES)
        found.append(
            tuple(
                Asked(question, tuple((answer["answer"], answer["score"]) for answer in best), truth)
                for (question, truth), best in zip(subject.questions, answers, strict=True)
            )
        )
    return found


def _query_maps(captioner, images) -> tuple[tuple[int, ...], np.ndarray]:
    """Numbers of some queries that look at different places, and the maps of all: [pictures, Q, h, w]."""
    pixels = captioner.processor(images=images, return_tensors="pt")["pixel_values"]
    model = captioner.model
    maps = query_maps(model, pixels.to(model.device))[:, -1].cpu().numpy()  # of the last layer: it decides
    return _different(maps), maps


def _different(maps: np.ndarray) -> tuple[int, ...]:
    """Queries chosen one by one: the sharpest first, then always the one that is least like those chosen."""
    flat = maps.transpose(1, 0, 2, 3).reshape(maps.shape[1], len(maps), -1)
    flat = flat / np.maximum(flat.sum(axis=-1, keepdims=True), 1e-12)
    chosen = [int(flat.max(axis=-1).mean(axis=-1).argmax())]
    while len(chosen) < min(SHOWN_QUERIES, len(flat)):
        distance = np.abs(flat[:, None] - flat[None, chosen]).sum(axis=(-2, -1)).min(axis=1)
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return tuple(sorted(chosen))


def _compare(subjects: Sequence[Subject], texts: Sequence[str], name: str | Path) -> tuple[list[np.ndarray], Ranking]:
    model = Blip2ForImageTextRetrieval.from_pretrained(name, dtype="auto").eval()
    processor = Blip2Processor.from_pretrained(name)
    pixels = processor(images=[subject.image for subject in subjects], return_tensors="pt")["pixel_values"]
    words = processor(text=list(texts), return_tensors="pt")
    with torch.no_grad():
        encoded = model.encode_image(pixels)
        cosines = model(image_embeds=encoded, **words).logits_per_text
        probabilities = model.match_matrix(encoded, **words).float().softmax(dim=-1)[..., 1].t()
    maps = []
    for subject, picture in zip(subjects, pixels, strict=True):
        phrases = processor(text=list(subject.phrases), return_tensors="pt") if subject.phrases else None
        found = None if phrases is None else matching_maps(model, picture[None], **phrases)[:, -1].cpu().numpy()
        maps.append(np.zeros((0, 1, 1), np.float32) if found is None else found)
    return maps, Ranking(tuple(texts), cosines.float().numpy(), probabilities.numpy())
