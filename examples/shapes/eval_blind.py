"""What can be answered without seeing the picture: by the language model alone, and by the most frequent answers.

    python examples/shapes/eval_blind.py --world world --split test --language language/opt-base --output blind.json

"most_frequent_of_question" knows, for each question word for word, the most frequent answer of the training questions:
about the best that a blind model could learn. Also for each kind of question ("by_kind").
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from language_rows import Document
from train_language import answered_each
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.auto.configuration_auto import AutoConfig

from blip2_hf.evaluation import vqa_accuracy
from blip2_hf.presets import fill, vqa_prompt


def read_questions(world: str, split: str) -> list[dict[str, Any]]:
    """Question, answers and type of each question of a split."""
    questions, annotations = (
        json.loads(Path(world, f"{name}_{split}.json").read_text(encoding="utf-8"))[name]
        for name in ("questions", "annotations")
    )
    asked = {one["question_id"]: one["question"] for one in questions}
    return [
        {
            "question": asked[one["question_id"]],
            "answer": one["multiple_choice_answer"],
            "answers": [person["answer"] for person in one["answers"]],
            "type": one["question_type"],
        }
        for one in annotations
    ]


def accuracy(guesses: list[str], questions: list[dict[str, Any]]) -> float:
    scores = [vqa_accuracy(guess, one["answers"]) for guess, one in zip(guesses, questions, strict=True)]
    return round(sum(scores) / len(scores), 4)


def frequent(train: list[dict[str, Any]], questions: list[dict[str, Any]], *keys: str) -> list[str]:
    """The most frequent answer of the training questions that are equal in `keys`; of all where there is none."""
    counts: dict[tuple, Counter] = defaultdict(Counter)
    for one in train:
        counts[()][one["answer"]] += 1
        counts[tuple(one[key] for key in keys)][one["answer"]] += 1
    found = [counts.get(tuple(one[key] for key in keys), counts[()]) for one in questions]
    return [counter.most_common(1)[0][0] for counter in found]


def compared(guesses: dict[str, list[str]], questions: list[dict[str, Any]]) -> dict[str, Any]:
    """The accuracy of each way of guessing, over all questions and over those of each kind ("by_kind")."""
    report: dict[str, Any] = {"questions": len(questions)}
    report |= {name: accuracy(said, questions) for name, said in guesses.items()}
    report["by_kind"] = {}
    for kind in sorted({one["type"] for one in questions}):
        rows = [number for number, one in enumerate(questions) if one["type"] == kind]
        of_kind = [questions[row] for row in rows]
        of_each = {name: accuracy([said[row] for row in rows], of_kind) for name, said in guesses.items()}
        report["by_kind"][kind] = {"questions": len(rows), **of_each}
    return report


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--language", required=True, help="folder of a language model")
    parser.add_argument("--output", required=True, help="JSON file for the result")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit", type=int, help="only the first questions")
    arguments = parser.parse_args(argv)
    questions = read_questions(arguments.world, arguments.split)[: arguments.limit]
    train = read_questions(arguments.world, "train")
    encoder_decoder = bool(AutoConfig.from_pretrained(arguments.language).is_encoder_decoder)
    kind = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model = kind.from_pretrained(arguments.language, dtype=torch.float32).to(arguments.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.language)
    prompts = [fill(vqa_prompt(encoder_decoder), one["question"]) for one in questions]
    documents = [Document("", ((prompt, ""),)) for prompt in prompts]
    said = answered_each(model, tokenizer, documents, arguments.batch_size, blind=True)
    report = compared(
        {
            "language_model": said,
            "most_frequent": frequent(train, questions),
            "most_frequent_of_type": frequent(train, questions, "type"),
            "most_frequent_of_question": frequent(train, questions, "question"),
        },
        questions,
    )
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
