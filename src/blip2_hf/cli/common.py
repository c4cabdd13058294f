"""What the commands share: options, reading images, loading models, output."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

DTYPES = ("auto", "float32", "float16", "bfloat16")


class CommandError(Exception):
    """Ends the command with one line on standard error and exit code 1."""


class Unreadable(Exception):
    """The only image, or a file that the command needs, cannot be read: one line on standard error and exit code 2."""


# -- options ---------------------------------------------------------------------------------------------------------


def new_parser(commands: Any, name: str, help: str, run: Callable[[argparse.Namespace], int], **options: Any):
    """A command's parser; `run` is its function."""
    parser = commands.add_parser(
        name, help=help, description=help[0].upper() + help[1:] + ".", formatter_class=_Formatter, **options
    )
    parser.set_defaults(run=run)
    return parser


def add_model_options(parser: argparse.ArgumentParser, default: str, released: str | None = None) -> None:
    """Options about model, device and output that every command has.

    Args:
        default: what is said to be the model if none is given.
        released: if that is a small one inside this package: the checkpoint for photos that is pointed to instead.
    """
    group = parser.add_argument_group("model and output")
    hint = "" if released is None else f", which only knows drawn shapes; for photos: {released}"
    group.add_argument(
        "--model",
        action=_ChosenModel,
        default=default,
        help=f"folder, Hugging Face id or short name (default: {default}{hint})",
    )
    parser.set_defaults(released=released)
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the first accelerator, else cpu)")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, what the checkpoint has)"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object per line")
    group.add_argument("--verbose", action="store_true", help="show warnings, progress and tracebacks of the libraries")


def add_generation_options(
    parser: argparse.ArgumentParser, *, num_beams: int, max_new_tokens: int
) -> argparse._ArgumentGroup:
    """Options of text generation."""
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--num-beams", type=positive, default=num_beams, metavar="N", help=f"1 is greedy (default: {num_beams})"
    )
    group.add_argument(
        "--max-new-tokens", type=positive, default=max_new_tokens, metavar="N", help=f"(default: {max_new_tokens})"
    )
    return group


def positive(text: str) -> int:
    """A positive integer from the command line."""
    return _integer(text, 1, "a positive integer")


def not_negative(text: str) -> int:
    """0 or a positive integer from the command line."""
    return _integer(text, 0, "0 or a positive integer")


def _integer(text: str, lowest: int, expected: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = lowest - 1
    if number < lowest:
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
    return number


def template(text: str) -> str:
    """A prompt from the command line with a place for the question."""
    if "{}" not in text:
        raise argparse.ArgumentTypeError(f"must have {{}} where the question goes, got {text!r}")
    return text


def question(text: str) -> str:
    """A question from the command line."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must not be empty, got {text!r}")
    return text


class _ChosenModel(argparse.Action):
    """Stores the model; there is then no other to point to."""

    def __call__(self, parser, namespace, value, option_string=None) -> None:
        namespace.model, namespace.released = value, None


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wider than argparse's default of 24 columns for the names, so that more options fit on one line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


# -- images ----------------------------------------------------------------------------------------------------------


class Images:
    """The images of some paths, URLs and folders (as `blip2 index` goes through them), read in their order; each that
    cannot be read is one line on standard error.

    Every pixel is decoded, so that the result is that of the whole photo (the pipelines, given a path, decode large
    JPEGs at reduced size).

    Attributes:
        failed: whether there was something that could not be read.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._files = self._found(paths)
        self._first: tuple[str, Image.Image] | None = None
        self.failed = False

    def any(self) -> bool:
        """Whether there is an image that can be read; reads up to the first one."""
        if self._first is None:
            self._first = next(self.prepared(lambda image: image, workers=0, ahead=1), None)
        return self._first is not None

    def prepared(self, prepare: Callable[[Image.Image], Any], *, workers: int, ahead: int) -> Iterator[tuple[str, Any]]:
        """Path and `prepare(image)` of each image that can be read, made in threads as `read_ahead` does it."""
        from ..image_loading import load_image
        from ..reading_ahead import read_ahead

        def read(file: tuple[str, Image.Image | None]) -> tuple[str, Any, ValueError | None]:
            path, image = file
            try:
                image = load_image(path) if image is None else image
            except ValueError as error:
                return path, None, error
            return path, prepare(image), None

        with closing(read_ahead(read, self._rest(), workers=workers, ahead=ahead)) as results:
            for path, result, error in results:
                if error is None:
                    yield path, result
                else:
                    self._complain(error)

    def _rest(self) -> Iterator[tuple[str, Image.Image | None]]:
        """Paths, the first one perhaps with its image, which is let go then: it may be large."""
        if self._first is not None:
            first, self._first = [self._first], None
            yield first.pop()
        for path in self._files:
            yield path, None

    def _found(self, paths: Iterable[str]) -> Iterator[str]:
        for path in paths:
            if not os.path.isdir(path):
                yield path
                continue
            from ..evaluation.index_build import files_below

            empty = True
            for file in files_below(path):
                empty = False
                yield file
            if empty:
                self._complain(f"there are no images in the folder {path!r}")

    def _complain(self, error: object) -> None:
        self.failed = True
        print_error(error)


def read_image(path: str) -> Image.Image:
    """One image.

    Raises:
        Unreadable: if it cannot be read, naming it.
    """
    from ..image_loading import load_image

    try:
        return load_image(path)
    except ValueError as error:
        raise Unreadable(str(error)) from error


def read_answers(path: str) -> list[str]:
    """Answers to choose from: one per line, or a list of texts in JSON.

    Raises:
        Unreadable: if the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if not path.endswith(".json"):
            return [line.strip() for line in text.splitlines() if line.strip()]
        answers = json.loads(text)
    except (OSError, ValueError) as error:
        raise Unreadable(f"cannot read answers from {path!r}: {error}") from error
    if not isinstance(answers, list):
        raise Unreadable(f"cannot read answers from {path!r}: it must be a list, got {type(answers).__name__}")
    return answers


# -- models ----------------------------------------------------------------------------------------------------------


def load_pipeline(task: str, args: argparse.Namespace, **options: Any) -> Any:
    """A pipeline on `args.model`.

    Raises:
        CommandError: if it cannot be loaded.
    """
    with loading(args):
        from ..pipelines import pipeline

        return pipeline(task, args.model, device=args.device, dtype=args.dtype, **options)


@contextmanager
def loading(args: argparse.Namespace) -> Iterator[None]:
    """Turns whatever goes wrong in loading a model into a `CommandError`. A small model that was not asked for is one
    line on standard error.

    Not only our own errors: an unknown name, no network, a folder of something else, no such device, too little
    memory.
    """
    if args.released is not None:
        print_error(
            f"no --model given: using {args.model}, which only knows drawn shapes; for photos: --model "
            f"{args.released} (downloaded once)"
        )
    try:
        yield
    except Exception as error:
        raise CommandError(f"cannot load model {args.model!r}: {one_line(error)}") from error


@contextmanager
def working(args: argparse.Namespace) -> Iterator[None]:
    """Turns an error of the model at work (an option it does not take, too little memory, a library that is not
    installed, a file that cannot be written) into a `CommandError`; not one image that can be read: `Unreadable`."""
    try:
        yield
    except BrokenPipeError:  # of the reader of the output
        raise
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        from ..evaluation.image_reading import NoReadableImage

        if isinstance(error, NoReadableImage):
            raise Unreadable(one_line(error)) from error
        raise CommandError(one_line(error)) from error


@contextmanager
def reading() -> Iterator[None]:
    """Turns an error in files that a command is given into an `Unreadable`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise Unreadable(one_line(error)) from error


@contextmanager
def quiet_libraries(args: argparse.Namespace) -> Iterator[None]:
    """No warnings and progress bars of the libraries between our lines, unless `--verbose`."""
    if args.verbose:
        yield
        return
    import warnings

    import huggingface_hub.utils as hub
    from transformers.utils import logging

    verbosity, bars, hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not hub.are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not sys.stderr.isatty():  # somebody who waits for a download of some gigabytes sees it
        hub.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()


# -- output ----------------------------------------------------------------------------------------------------------


def print_result(args: argparse.Namespace, data: dict[str, Any], text: str) -> None:
    """`data` as a line of JSON, or `text`; at once, so that a reader of the output need not wait for the rest."""
    print(json.dumps(data, ensure_ascii=False) if args.json else text, flush=True)


def print_error(error: object) -> None:
    """One line on standard error."""
    print(f"blip2: {one_line(error)}", file=sys.stderr, flush=True)


def one_line(error: object) -> str:
    """The message of an error on one line."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
