"""The parser, and what all commands do with errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import ask, caption, chat, eval, index, match, search
from .common import CommandError, Unreadable, print_error

_EPILOG = """\
exit codes:
  0  everything was done
  1  the model could not be loaded or could not work, or a file could not be written; one line on standard error
     says why
  2  a file could not be read (the others were still processed), or wrong arguments

MODEL is a folder, a Hugging Face id, or the short name of a released checkpoint, such as
blip2-opt-2.7b, blip2-flan-t5-xl or blip2-itm-vit-g, which are downloaded once. Without --model a
small one inside this package works, which only knows drawn shapes (blip2-tiny-opt for captions,
blip2-tiny-opt-vqa for answers, blip2-tiny-t5, blip2-tiny-itm). `blip2 COMMAND --help` shows the options.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each stores its function as `run`."""
    parser = argparse.ArgumentParser(
        prog="blip2",
        description="BLIP-2: describe images, answer questions about them, compare them with texts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"blip2_hf {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (caption, ask, chat, match, index, search, eval):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
        argv: the arguments without the program's name; default: those of the process.

    Raises:
        SystemExit: for `--help`, `--version` (0) and wrong arguments (2), as argparse does it.
    """
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except Unreadable as error:
        print_error(error)
        return 2
    except CommandError as error:
        if args.verbose and error.__cause__ is not None:
            raise
        print_error(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
