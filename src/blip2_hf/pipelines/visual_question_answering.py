"""Answers to questions about images (Li et al. 2023, sec. 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..answer_rows import answer_rows, check_answers
from ..modeling.encoded import EncodedImages
from ..presets import VQA, fill, vqa_prompt
from .base import Blip2Pipeline, Results
from .requests import Request, as_list, is_image, lazily, one_embedding, one_image
from .scores import best_candidates, sequence_log_scores

Answers = list[dict[str, Any]]


class Blip2VisualQuestionAnsweringPipeline(Blip2Pipeline):
    """Image and question to answers: `pipeline("visual-question-answering", ...)(image="a.jpg", question="how many?")`.

    Prompt and generation are the paper's (`blip2_hf.presets`): "Question: {} Answer:", or "Question: {} Short answer:"
    for an encoder-decoder language model; 5 beams, length penalty -1, at most 10 tokens. `prompt` and
    `generate_kwargs` change them.

    An image is encoded once for all its questions, and only its questions are repeated.

    With `answers`, nothing is generated: these candidates are ranked by their probability, as BLIP and ALBEF do it.

    Arguments of the constructor: see `Blip2Pipeline`; what a call takes may be given there too.
    """

    def __call__(
        self,
        image: Any = None,
        question: str | Sequence[str] | None = None,
        *,
        image_embeds: EncodedImages | torch.Tensor | None = None,
        answers: Sequence[str] | None = None,
        top_k: int | None = None,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        timeout: float | None = None,
        progress: bool | None = None,
    ) -> Answers | list[Answers] | Results:
        """
        Args:
            image: an image (as in `Blip2ImageToTextPipeline`), a list, a dataset or a generator of them, with
                `question`; or dictionaries {"image": ..., "question": ...} in the same forms, whose question may be
                a list.
            question: one question or a list. As in `transformers` 4, all questions are asked about every image, image
                by image.
            image_embeds: instead of `image`: one encoded image, or its features [1, P, E] after `ln_vision`.
            answers: the candidates that answers are chosen from, the same for every question. The options of generation
                then cannot be given.
            top_k: the number of answers for each question, at most the number of beams, or of `answers`. Default 1.
            prompt: text with `{}` where the question goes.
            max_new_tokens, generate_kwargs, batch_size, num_workers, timeout, progress: as in
                `Blip2ImageToTextPipeline`. A batch has `batch_size` images, whose questions are answered `batch_size`
                at a time.

        Returns:
            For one question `[{"answer": str, "score": float}, ...]`, best first; equal answers of several beams are
            one, with the best score. For several questions or images a list of such lists, for a dataset or generator
            an iterator.

            The score is exp(log p(answer) / n ** length_penalty), n the number of its tokens with the end token: what
            beam search ranks by (`sequences_scores`), as a number between 0 and 1. With the paper's length penalty of
            -1 it is p ** n, with 1 the geometric mean of the tokens' probabilities, with 0 the answer's probability.
            Without beams, length_penalty is 1 unless given. For long answers p ** n can be too small for a number and
            then is 0.0; answers are in the order of its logarithm all the same, and in that of beam search if equal.

            With `answers`, the score is the candidate's probability among the candidates: p(answer) over the sum of all
            of theirs, p the product of its tokens' probabilities, end token included. Lengths are not made up for.

        Raises:
            ValueError: for an image that cannot be read, naming it; for an empty question; for candidates that are
                empty or the same; for wrong arguments.
        """
        if (image is None) == (image_embeds is None):
            raise ValueError("give either `image` or `image_embeds`, got " + ("none" if image is None else "both"))
        if image_embeds is not None:
            image = {"image_embeds": one_embedding(image_embeds, "image_embeds")}
        options = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "progress": progress,
            "answers": answers,
            "top_k": top_k,
            "prompt": prompt,
            "max_new_tokens": max_new_tokens,
            "generate_kwargs": generate_kwargs,
            "timeout": timeout,
        }
        if question is None:
            return self._answer(image, _requests, **options)
        return self._ask(image, question, options)

    def _ask(self, image: Any, question: str | Sequence[str], options: dict[str, Any]) -> Any:
        """The questions about an image, about each of a list, or about each of a dataset."""
        texts, size = _questions(question)
        to_requests = _Ask(texts)
        items = [image] if isinstance(image, dict) or is_image(image) else as_list(image)
        if items is None:
            requests = lazily(image, to_requests)
            total = len(requests) * len(texts) if hasattr(requests, "__len__") else None
            return Results(self._run(requests, total, show=True, **options), total)
        if not items:
            return []
        total = len(items) * len(texts)
        results = list(self._run(to_requests(items), total, show=total > 1, **options))
        return results[0] if size is None and as_list(image) is None else results

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        prompt: str | None = None,
        answers: Sequence[str] | None = None,
        **given: Any,
    ):
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise ValueError(f"`top_k` must be a positive integer, got {top_k!r}")
        if isinstance(prompt, str) and "{}" not in prompt:
            raise ValueError(f"`prompt` must have {{}} where the question goes, got {prompt!r}")
        if "num_return_sequences" in (given.get("generate_kwargs") or {}):
            raise ValueError("`generate_kwargs` must not have num_return_sequences: `top_k` is the number of answers")
        prepare, forward, finish = super()._sanitize_parameters(prompt=prompt, **given)
        if answers is not None:
            _check_nothing_is_generated(forward)
            forward["answers"] = tuple(check_answers(answers))
        return prepare, forward if top_k is None else {**forward, "top_k": top_k}, finish

    def _options(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        prepare, forward = super()._options(**given)
        answers = forward.pop("answers", None)
        if answers is not None:
            _check_nothing_is_generated(self._sanitize_parameters(**given)[1])  # of the constructor it may be
            if forward.get("top_k", 1) > len(answers):
                raise ValueError(
                    f"`top_k` must be at most the number of `answers`, got {forward['top_k']} for {len(answers)}"
                )
            # What the question is makes no difference for the tokens of what follows the prompt.
            prompt = fill(self._preparer(**prepare).prompt, "?")
            forward["candidates"] = _Candidates(answers, answer_rows(self.processor, answers, prompt=prompt))
        return prepare, forward

    def _default_prompt(self) -> str:
        return vqa_prompt(self.model.config.is_encoder_decoder)

    def _default_options(self) -> dict[str, Any]:
        return VQA

    def _generate(
        self,
        inputs: dict[str, Any],
        options: dict[str, Any],
        top_k: int = 1,
        candidates: _Candidates | None = None,
    ) -> list[Answers]:
        if candidates is not None:
            scores = self.model.score_answers(**inputs, **candidates.rows)
            return best_candidates(candidates.answers, scores.log_probs, top_k)
        settings, _ = self.model._generation_options(
            options.get("generation_config"), {k: v for k, v in options.items() if k != "generation_config"}
        )
        beams = settings.num_beams or 1
        if top_k > beams and not settings.do_sample:
            raise ValueError(
                f"`top_k` must be at most the number of beams, got {top_k} for {beams} (set `num_beams` in "
                "`generate_kwargs`)"
            )
        outputs = self.model.generate(
            **inputs,
            **options,
            num_return_sequences=top_k,
            return_dict_in_generate=True,
            output_scores=beams > 1,
            output_logits=beams == 1,
        )
        tokens = self.new_tokens(outputs.sequences, inputs["input_ids"])
        answers = self.decode(tokens)
        ranked = list(zip(answers, sequence_log_scores(outputs, tokens, settings).tolist(), strict=True))
        return [_best(ranked[start : start + top_k]) for start in range(0, len(ranked), top_k)]


@dataclass(frozen=True)
class _Candidates:
    """Answers to choose from, and their tokens (as `answer_rows` gives them)."""

    answers: tuple[str, ...]
    rows: dict[str, torch.Tensor]


def _check_nothing_is_generated(forward: dict[str, Any]) -> None:
    """Raises ValueError for options of generation, which the ranking of `answers` would ignore."""
    options = sorted(forward.get("generate_kwargs", {}).keys() - {"interpolate_pos_encoding"})
    if options:
        raise ValueError(f"`answers` are ranked, not generated: leave {', '.join(options)} out")


def _best(answers: list[tuple[str, float]]) -> Answers:
    """Answers with the logarithms of their scores: best first, each answer once. Equal ones stay in their order."""
    found: dict[str, float] = {}
    for answer, log_score in sorted(answers, key=lambda entry: -entry[1]):
        found.setdefault(answer, log_score)
    return [{"answer": answer, "score": math.exp(log_score)} for answer, log_score in found.items()]


def _questions(question: Any) -> tuple[tuple[str, ...], int | None]:
    """Texts, and how many results they are: None for one, a number for a list."""
    one = isinstance(question, str)
    texts = (question,) if one else tuple(question) if isinstance(question, Sequence) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`question` must be a string or a list of strings, got {question!r}")
    if not all(text.strip() for text in texts):
        raise ValueError(f"`question` must be a text that is not empty, got {question!r}")
    return texts, None if one else len(texts)


@dataclass(frozen=True)
class _Ask:
    """Requests that ask the same questions about every image."""

    texts: tuple[str, ...]

    def __call__(self, items: list[Any]) -> list[Request]:
        if any(isinstance(item, dict) and "question" in item for item in items):
            raise ValueError("`question` is given twice: as an argument and in the dictionary")
        sizes = (None,) * len(self.texts)
        return [Request(**one_image(item, "image"), texts=self.texts, sizes=sizes) for item in items]


def _requests(items: list[Any]) -> list[Request]:
    """Items with a question each; those that follow each other on the same image become one request."""
    requests: list[Request] = []
    for item in items:
        if not isinstance(item, dict) or item.get("question") is None:
            raise ValueError("`question` must be given, either as an argument or in every dictionary beside the image")
        texts, size = _questions(item["question"])
        image = one_image({key: value for key, value in item.items() if key != "question"}, "image")
        last = requests[-1] if requests else None
        if last is not None and _same(last, image):
            requests[-1] = replace(last, texts=last.texts + texts, sizes=last.sizes + (size,))
        else:
            requests.append(Request(**image, texts=texts, sizes=(size,)))
    return requests


def _same(request: Request, image: dict[str, Any]) -> bool:
    for name in ("embeds", "pixels"):
        if name in image:
            return getattr(request, name) is image[name]
    if isinstance(image["image"], str):
        return isinstance(request.image, str) and request.image == image["image"]
    return request.image is image["image"]
