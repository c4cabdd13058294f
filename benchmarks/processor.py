"""Images per second from JPEG files to `pixel_values`: `Blip2ImageProcessor` against that of `transformers`.

    python benchmarks/processor.py [--repeats 9] [--threads 2] [--size 224]

The peer is `transformers`' BLIP-2 image processor on Pillow (what it uses without torchvision), given the same paths.
Both run in turns in one process, on pictures of scikit-image scaled up to the size of photos, with grain. One JSON
line per case: `time_ratio` is the median of their time over ours, round by round. `exact` decodes every pixel and must
equal the peer within 1e-5; the default decodes large JPEGs at reduced size and must stay within one grey level on
average.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import skimage.data
import torch
from common import add_measuring_arguments, compared, emit, in_turns, on_cpu, setting
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip2_hf.image_processing import CLIP_STD, Blip2ImageProcessor

SIZES = {"12 MP": (4000, 3000), "3 MP": (2048, 1536), "2 MP": (1920, 1080), "0.3 MP": (640, 480)}
PICTURES = ("astronaut", "coffee", "chelsea", "rocket")


def write_photos(folder: Path, size: tuple[int, int]) -> list[str]:
    """JPEG files of quality 92 with 4:2:0 subsampling, as cameras write them."""
    grain = np.random.default_rng(0).normal(0, 4, (size[1], size[0], 1))
    paths = []
    for name in PICTURES:
        image = Image.fromarray(getattr(skimage.data, name)()).resize(size, Image.Resampling.BICUBIC)
        pixels = (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)
        paths.append(str(folder / f"{name}_{size[0]}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=92, subsampling="4:2:0")
    return paths


def compare(paths: list[str], size: int, repeats: int, *, exact: bool) -> dict[str, object]:
    """Times of both in turns, after checking that they agree."""
    ours = Blip2ImageProcessor(size=size, jpeg_draft=not exact)
    theirs = BlipImageProcessorPil(size={"height": size, "width": size})
    got, expected = (each(paths, return_tensors="pt")["pixel_values"] for each in (ours, theirs))
    grey_levels = (got - expected).abs() * torch.tensor(CLIP_STD)[:, None, None] * 255
    if exact:
        assert (got - expected).abs().max() <= 1e-5, "outputs differ"
    else:
        assert grey_levels.mean() < 1, "outputs differ by more than one grey level on average"
    runs = {
        "ours": lambda: ours(paths, return_tensors="pt"),
        "theirs": lambda: theirs(paths, return_tensors="pt"),
    }
    times = in_turns(runs, repeats, "cpu")
    return {
        **compared(times, digits=4),
        "images_per_second": {name: round(len(paths) / statistics.median(each), 1) for name, each in times.items()},
        "mean_grey_levels": round(grey_levels.mean().item(), 3),
        "max_grey_levels": round(grey_levels.max().item(), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measuring_arguments(parser, repeats=9)
    parser.add_argument("--size", type=int, default=224, help="side of the output in pixels")
    args = parser.parse_args()
    emit({"benchmark": "processor", "size": args.size, **setting(on_cpu(args))})
    with tempfile.TemporaryDirectory() as folder:
        for name, size in list(SIZES.items())[-1 if args.small else 0 :]:
            paths = write_photos(Path(folder), size)
            for count in (1, len(paths)):
                for exact in (False, True):
                    result = compare(paths[:count], args.size, args.repeats, exact=exact)
                    case = {"photos": name, "width": size[0], "height": size[1], "images": count, "exact": exact}
                    emit(case | result)


if __name__ == "__main__":
    main()
