"""`blip2 index`: photos encoded once, to be searched with `blip2 search`."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .common import (
    CommandError,
    Unreadable,
    add_model_options,
    loading,
    new_parser,
    one_line,
    positive,
    print_error,
    print_result,
    quiet_libraries,
    reading,
    working,
)
from .match import load_retrieval

if TYPE_CHECKING:
    from ..evaluation.index_build import IndexChanges
    from ..evaluation.index_file import PhotoIndex

_EXAMPLES = """\
Without --add, the index is that of the given images: new and changed files are encoded, those that are
not given (any more) go. A run that is stopped continues when it is started again: what was encoded is
saved every minute (in a large index less often, saving takes at most a twentieth of the time) and on Ctrl-C.
Without --model, an index that exists is changed with the model that it was made with.

examples:
  blip2 index photos/ -o photos.index --model blip2-itm-vit-g
  blip2 index holidays/ new.jpg -o photos.index --add
  blip2 index photos/old/ -o photos.index --remove
  blip2 search photos.index "a dog on a beach"
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = new_parser(commands, "index", "encode photos, for searching them with texts", run, epilog=_EXAMPLES)
    parser.add_argument("images", nargs="+", metavar="PATH", help="folders (with those below) and image files")
    parser.add_argument("-o", "--output", required=True, metavar="INDEX", help="file to make or change")
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--add", action="store_true", help="keep what is in the index beside these images")
    change.add_argument("--remove", action="store_true", help="take these images out (no model is loaded)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="images at a time (default: 16)")
    add_model_options(parser, default="blip2-tiny-itm", released="blip2-itm-vit-g")


def run(args: argparse.Namespace) -> int:
    """Makes or changes the index; prints how many images it has, and what was done."""
    with quiet_libraries(args):
        index, changes = _removed(args) if args.remove else _updated(args)
    for entry in changes.skipped:
        print_error(entry["reason"])
    counts = {name: value for name, value in asdict(changes).items() if name != "skipped"}
    listed = ", ".join(f"{value} {name}" for name, value in counts.items() if value)
    result = {"index": args.output, "images": len(index), **counts, "skipped": changes.skipped}
    print_result(args, result, f"{args.output}: {len(index)} images ({listed or 'nothing to do'})")
    return 2 if changes.skipped else 0


def _removed(args: argparse.Namespace) -> tuple[PhotoIndex, IndexChanges]:
    from ..evaluation.index_build import IndexChanges, remove_images
    from ..evaluation.index_file import read_index

    with reading():
        index, removed = remove_images(read_index(args.output), args.images)
    _save(index, args)
    return index, IndexChanges(removed=removed, unchanged=len(index))


def _updated(args: argparse.Namespace) -> tuple[PhotoIndex, IndexChanges]:
    from ..evaluation.index_build import image_paths, index_model, update_index
    from ..evaluation.index_file import PhotoIndex, check_model, read_index

    folder = os.path.dirname(os.path.abspath(args.output))
    with reading():  # what can be said before the model is loaded
        paths = image_paths(args.images)
        if not os.path.isdir(folder):
            raise ValueError(f"the folder {folder!r} of the index does not exist")
        existing = read_index(args.output) if os.path.exists(args.output) else None
        if not paths and not (existing and args.add):
            raise ValueError(f"there are no images in {', '.join(args.images)}")
    if existing is not None and args.released is not None:  # none was chosen: no other fits
        args.model, args.released = existing.model.name, None
    with loading(args):
        model, processor = load_retrieval(args)
    name = os.path.abspath(args.model) if os.path.isdir(args.model) else args.model
    with reading():
        identity = index_model(model, processor, name)
        if existing is not None:
            check_model(existing, identity, args.output)
    with working(args):
        with _bar(len(paths)) as bar:
            index, changes = update_index(
                existing or PhotoIndex.empty(identity, folder),
                paths,
                model,
                processor,
                keep_others=args.add,
                batch_size=args.batch_size,
                save=lambda part: _save(part, args),
                advance=None if bar is None else bar.update,
            )
        if not len(index) and changes.skipped:
            raise Unreadable(f"none of the {len(paths)} images can be read, the first: {changes.skipped[0]['reason']}")
    _save(index, args)
    return index, changes


def _save(index: PhotoIndex, args: argparse.Namespace) -> None:
    from ..evaluation.index_file import write_index

    try:
        write_index(index, args.output)
    except OSError as error:
        raise CommandError(f"cannot write {args.output!r}: {one_line(error)}") from error


def _bar(total: int) -> Any:
    """A progress bar for somebody who waits, with rate and time left."""
    if not sys.stderr.isatty():
        return nullcontext()
    from tqdm import tqdm

    return tqdm(total=total, unit=" images")
