"""`blip2 match`: how well texts fit an image (Li et al. 2023, sec. 3.2)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .common import add_model_options, loading, new_parser, positive, print_result, quiet_libraries, read_image, working

if TYPE_CHECKING:
    from PIL import Image

_EXAMPLES = """\
columns: ITC, the cosine of the features of image and text (-1 to 1); ITM, the probability that both
belong together (0 to 1).

example:
  blip2 match photo.jpg "a photo of a cat" "a photo of a dog" --model blip2-itm-vit-g
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = new_parser(commands, "match", "compare an image with texts", run, epilog=_EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", help="file or URL")
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="texts at a time (default: 64)")
    add_model_options(parser, default="blip2-tiny-itm", released="blip2-itm-vit-g")


def run(args: argparse.Namespace) -> int:
    """Prints both scores per text."""
    image = read_image(args.image)
    with quiet_libraries(args):
        _match(args, image)
    return 0


def _match(args: argparse.Namespace, image: Image.Image) -> None:
    with loading(args):
        model, processor = load_retrieval(args)
    with working(args):
        scores = _scores(model, processor, image, args.texts, args.batch_size)
    texts = [
        {"text": text, "itc_cosine": cosine, "itm_probability": probability}
        for text, (cosine, probability) in zip(args.texts, scores, strict=True)
    ]
    if args.json:
        print_result(args, {"image": args.image, "texts": texts, "model": args.model}, "")
        return
    print_result(args, {}, "   ITC     ITM  text")
    for entry in texts:
        print_result(args, {}, f"{entry['itc_cosine']:6.3f}  {entry['itm_probability']:6.3f}  {entry['text']}")


def load_retrieval(args: argparse.Namespace) -> tuple[Any, Any]:
    """A retrieval model, in evaluation mode, and its processor."""
    import torch

    from ..modeling.retrieval import Blip2ForImageTextRetrieval
    from ..processing import Blip2Processor

    device = args.device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    processor = Blip2Processor.from_pretrained(args.model)
    with unused_parts_missing(args):
        model = Blip2ForImageTextRetrieval.from_pretrained(args.model, dtype=args.dtype)
    return model.to(device).eval(), processor


@contextmanager
def unused_parts_missing(args: argparse.Namespace) -> Iterator[None]:
    """No warning, unless `--verbose`, that a retrieval checkpoint lacks what scores do not depend on: the captioning
    head and the temperature, which published ones do not have, are all that may be missing."""
    logger = logging.getLogger("blip2_hf.modeling.loading")
    level = logger.level
    if not args.verbose:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _scores(
    model: Any, processor: Any, image: Image.Image, texts: list[str], batch_size: int
) -> list[tuple[float, float]]:
    """ITC cosine and ITM probability of each text; the image is encoded once."""
    import torch

    scores: list[tuple[float, float]] = []
    with torch.no_grad():
        pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
        encoded = model.encode_image(pixel_values.to(model.device))
        for start in range(0, len(texts), batch_size):
            batch = processor(text=texts[start : start + batch_size], return_tensors="pt").to(model.device)
            cosines = model(image_embeds=encoded, **batch).logits_per_image[0]
            logits = model.match_matrix(encoded, **batch)[0]
            probabilities = logits.float().softmax(dim=-1)[:, 1]
            scores += zip(cosines.tolist(), probabilities.tolist(), strict=True)
    return scores
