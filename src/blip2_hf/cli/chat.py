"""`blip2 chat`: a conversation about an image."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..presets import CHAT
from .common import (
    add_generation_options,
    add_model_options,
    load_pipeline,
    new_parser,
    print_error,
    print_result,
    quiet_libraries,
    read_image,
    working,
)

if TYPE_CHECKING:
    from PIL import Image

_NOTES = """\
Questions are read from standard input, one per line; an empty line is skipped, "exit" or the end of
the input ends the conversation. Earlier questions and answers are part of each prompt, as in figure 4
of the paper, and the image is encoded once.

examples:
  blip2 chat photo.jpg --model blip2-opt-2.7b
  printf 'what is this?\\nwhy is it famous?\\n' | blip2 chat photo.jpg --model blip2-flan-t5-xxl
"""
_ENDS = ("exit", "quit")


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = new_parser(commands, "chat", "talk about an image", run, epilog=_NOTES)
    parser.add_argument("image", metavar="IMAGE", help="file or URL")
    add_generation_options(parser, num_beams=CHAT["num_beams"], max_new_tokens=CHAT["max_new_tokens"])
    add_model_options(parser, default="blip2-tiny-opt", released="blip2-opt-2.7b")


def run(args: argparse.Namespace) -> int:
    """Prints an answer per question, until the input ends. A question that cannot be answered is one line on standard
    error, and makes the exit code 1."""
    image = read_image(args.image)
    with quiet_libraries(args):
        return _chat(args, image)


def _chat(args: argparse.Namespace, image: Image.Image) -> int:
    pipe = load_pipeline("image-to-text", args)
    from ..pipelines.chat import Conversation

    options = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    code = 0
    with working(args):
        conversation = Conversation(pipe, image, generate_kwargs=options)
        for question in _questions():
            try:
                reply = conversation.ask(question)
            except ValueError as error:
                print_error(error)
                code = 1
                continue
            if reply.dropped_turns:
                turns = "turn does" if reply.dropped_turns == 1 else f"{reply.dropped_turns} turns do"
                print_error(f"the conversation is too long for the model: the oldest {turns} not count any more")
            data = {"image": args.image, "question": question, "answer": reply.answer}
            print_result(args, {**data, "dropped_turns": reply.dropped_turns, "model": args.model}, reply.answer)
    return code


def _questions() -> Iterator[str]:
    """The lines of standard input that are questions; at a terminal they are asked for."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (arrow keys and history in `input`)

        print('Ask about the image; "exit" ends.', file=sys.stderr)
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            print(file=sys.stderr)
            return
        if not interactive and not line:
            return
        question = line.strip()
        if question.lower() in _ENDS:
            return
        if question:
            yield question
