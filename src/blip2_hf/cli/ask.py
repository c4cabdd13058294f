"""`blip2 ask`: answers to questions about an image."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..presets import VQA, VQA_PROMPTS
from .common import (
    add_generation_options,
    add_model_options,
    load_pipeline,
    new_parser,
    positive,
    print_result,
    question,
    quiet_libraries,
    read_answers,
    read_image,
    template,
    working,
)

if TYPE_CHECKING:
    from PIL import Image

_EXAMPLES = """\
examples:
  blip2 ask photo.jpg "how many dogs are there?" --model blip2-opt-2.7b
  blip2 ask photo.jpg "where is this?" "what season is it?" --model blip2-flan-t5-xl --json
  blip2 ask photo.jpg "is it raining?" --answers yes no --top-k 2 --model blip2-opt-2.7b
"""
# Options of generation, which have no meaning where answers are given.
_GENERATION = ("num_beams", "max_new_tokens", "length_penalty")


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = new_parser(commands, "ask", "answer questions about an image", run, epilog=_EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", help="file or URL")
    parser.add_argument(
        "questions", nargs="+", type=question, metavar="QUESTION", help="the image is encoded once for all of them"
    )
    prompts = ", ".join(f'"{prompt}" ({kind})' for kind, prompt in VQA_PROMPTS.items())
    parser.add_argument("--prompt", type=template, help=f"with {{}} for the question (default: {prompts})")
    parser.add_argument("--top-k", type=positive, default=1, metavar="N", help="answers per question (default: 1)")
    candidates = parser.add_mutually_exclusive_group()
    candidates.add_argument(
        "--answers", nargs="+", metavar="ANSWER", help="rank these by their probability instead of generating"
    )
    candidates.add_argument(
        "--answers-file", metavar="FILE", help="the same from a file: one answer per line, or a list of texts in JSON"
    )
    group = add_generation_options(parser, num_beams=VQA["num_beams"], max_new_tokens=VQA["max_new_tokens"])
    group.add_argument(
        "--length-penalty",
        type=float,
        default=VQA["length_penalty"],
        metavar="X",
        help=f"below 0 for short answers (default: {VQA['length_penalty']:g}, as in the paper)",
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="questions at a time (default: 8)")
    add_model_options(parser, default="blip2-tiny-opt-vqa", released="blip2-opt-2.7b")
    parser.set_defaults(wrong=parser.error)


def run(args: argparse.Namespace) -> int:
    """Prints an answer per question: with several questions after the question."""
    image = read_image(args.image)
    options = _options(args)
    with quiet_libraries(args):
        _ask(args, image, options)
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's `answers`, or its `generate_kwargs`."""
    answers = args.answers if args.answers_file is None else read_answers(args.answers_file)
    if answers is None:
        options: dict[str, Any] = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
        if args.num_beams > 1:
            options["length_penalty"] = args.length_penalty
        return {"generate_kwargs": options}
    from ..answer_rows import check_answers

    for name in _GENERATION:
        if getattr(args, name) != VQA[name]:
            args.wrong(f"argument --{name.replace('_', '-')}: answers that are given are not generated")
    try:
        return {"answers": check_answers(answers)}
    except ValueError as error:
        args.wrong(str(error))


def _ask(args: argparse.Namespace, image: Image.Image, options: dict[str, Any]) -> None:
    pipe = load_pipeline("visual-question-answering", args, batch_size=args.batch_size)
    with working(args):
        results = pipe(image, args.questions, top_k=args.top_k, prompt=args.prompt, progress=False, **options)
    for asked, answers in zip(args.questions, results, strict=True):
        data = {"image": args.image, "question": asked, **answers[0], "answers": answers, "model": args.model}
        lines = [
            f"{answer['answer']}\t{answer['score']:.3g}" if args.top_k > 1 else answer["answer"] for answer in answers
        ]
        for line in lines[: 1 if args.json else None]:
            print_result(args, data, line if len(args.questions) == 1 else f"{asked} {line}")
