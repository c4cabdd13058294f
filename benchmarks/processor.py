"""Images per second from JPEG files to `pixel_values`: `Blip2ImageProcessor` against that of `transformers`.

    python benchmarks/processor.py [--repeats 9] [--threads 2] [--size 224]

The peer is `transformers`' BLIP-2 image processor on Pillow (what it uses without torchvision), given the same paths.
Both run in turns in one process, on pictures of scikit-image scaled up to the size of photos, with grain. One JSON
line per case: `ratio` is the median of their time over ours, round by round. `exact` decodes every pixel and must
equal the peer within 1e-5; the default decodes large JPEGs at reduced size and must stay within one grey level on
average.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import skimage.data
import torch
import transformers
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


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(paths: list[str], size: int, repeats: int, *, exact: bool) -> dict[str, float]:
    """Times of both in turns, after checking that they agree."""
    ours = Blip2ImageProcessor(size=size, jpeg_draft=not exact)
    theirs = BlipImageProcessorPil(size={"height": size, "width": size})
    got, expected = (each(paths, return_tensors="pt")["pixel_values"] for each in (ours, theirs))
    grey_levels = (got - expected).abs() * torch.tensor(CLIP_STD)[:, None, None] * 255
    if exact:
        assert (got - expected).abs().max() <= 1e-5, "outputs differ"
    else:
        assert grey_levels.mean() < 1, "outputs differ by more than one grey level on average"
    times = [
        tuple(seconds(lambda each=each: each(paths, return_tensors="pt")) for each in (ours, theirs))
        for _ in range(repeats)
    ]
    ours_s, theirs_s = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "ratio": round(statistics.median(theirs / ours for ours, theirs in times), 2),
        "ours_images_per_s": round(len(paths) / ours_s, 1),
        "theirs_images_per_s": round(len(paths) / theirs_s, 1),
        "mean_grey_levels": round(grey_levels.mean().item(), 3),
        "max_grey_levels": round(grey_levels.max().item(), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="rounds per case")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch, which ours uses for a batch")
    parser.add_argument("--size", type=int, default=224, help="side of the output in pixels")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    setting = {
        "size": args.size,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "pillow": PIL.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({"setting": setting}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            paths = write_photos(Path(folder), size)
            for count in (1, len(paths)):
                for exact in (False, True):
                    result = compare(paths[:count], args.size, args.repeats, exact=exact)
                    case = {"photos": name, "width": size[0], "height": size[1], "images": count, "exact": exact}
                    print(json.dumps(case | result), flush=True)


if __name__ == "__main__":
    main()
