"""`blip2 caption`: a sentence about each image."""

from __future__ import annotations

import argparse
import os
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from ..presets import CAPTION_PROMPT, CAPTIONING
from .common import (
    Images,
    add_generation_options,
    add_model_options,
    load_pipeline,
    new_parser,
    not_negative,
    positive,
    print_result,
    quiet_libraries,
    working,
)

_EXAMPLES = """\
examples:
  blip2 caption photo.jpg --model blip2-opt-2.7b
  blip2 caption photos/ --model blip2-opt-2.7b --json > captions.jsonl
  blip2 caption photo.jpg --model blip2-opt-2.7b --prompt "this is a painting of" --num-beams 1
  blip2 caption shapes.png        (the small model of drawn shapes, inside this package)
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = new_parser(commands, "caption", "describe images", run, epilog=_EXAMPLES)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, URL, or folder (with those below)")
    parser.add_argument(
        "--prompt", help=f'text that the model continues, "" for none (default: "{CAPTION_PROMPT}", as in the paper)'
    )
    group = add_generation_options(
        parser, num_beams=CAPTIONING["num_beams"], max_new_tokens=CAPTIONING["max_new_tokens"]
    )
    shortest = CAPTIONING["min_new_tokens"]
    group.add_argument(
        "--min-new-tokens",
        type=not_negative,
        metavar="N",
        help=f"(default: {shortest} as in the paper, 0 with --prompt)",
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images at a time (default: 8)")
    parser.add_argument(
        "--workers",
        type=not_negative,
        metavar="N",
        help="threads that read images while the model works, 0 for none (default: 1 on a CPU, else up to 8)",
    )
    add_model_options(parser, default="blip2-tiny-opt", released="blip2-opt-2.7b")


def run(args: argparse.Namespace) -> int:
    """Prints a caption per image: of a folder or several images after the file's name."""
    images = Images(args.images)
    if images.any():
        with quiet_libraries(args):
            _caption(args, images)
    return 2 if images.failed else 0


def _caption(args: argparse.Namespace, images: Images) -> None:
    options = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    shortest = args.min_new_tokens
    if shortest is None and args.prompt is None:
        shortest = min(CAPTIONING["min_new_tokens"], args.max_new_tokens)
    if shortest:
        options["min_new_tokens"] = shortest
    prompt = CAPTION_PROMPT if args.prompt is None else args.prompt
    pipe = load_pipeline("image-to-text", args, batch_size=args.batch_size)
    image_processor = pipe.processor.image_processor
    read: deque[str] = deque()  # whose captions are still to come

    def pixels(image: Any) -> Any:
        return image_processor(image, return_tensors="pt")["pixel_values"][0]

    def rows(pictures: Iterator[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
        for path, pixel_values in pictures:
            read.append(path)
            yield {"pixel_values": pixel_values}

    alone = len(args.images) == 1 and not os.path.isdir(args.images[0])
    # Pixels are small: those of the next batch wait until the model has done with this one.
    workers = default_workers(pipe.device.type) if args.workers is None else args.workers
    ahead = max(args.batch_size, workers)
    with working(args), closing(images.prepared(pixels, workers=workers, ahead=ahead)) as pictures:
        for result in pipe(rows(pictures), prompt=prompt or None, generate_kwargs=options, progress=False):
            path, caption = read.popleft(), result[0]["generated_text"]
            data = {"image": path, "caption": caption, "prompt": prompt, "model": args.model}
            print_result(args, data, caption if alone else f"{path}: {caption}")


def default_workers(device: str) -> int:
    """One where the model computes on the same processors, which reading would take away from it; else as many threads
    as there are processors for this process, up to 8."""
    if device == "cpu":
        return 1
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, 8)
