"""Pictures per second of the training augmentation: ours against cropping and resizing the fully decoded picture.

    python benchmarks/augmentation.py [--repeats 9] [--size 224]

The peer is what torchvision's transforms do on Pillow, which the original code uses: decode every pixel, copy the crop
out, resize it (bicubic), mirror it, subtract the mean and divide by the standard deviation. Both run in turns in one
process on one thread, as a worker of a DataLoader does, on the same files and the same crops; sides and noise are
those of photos. One JSON line per case: `time_ratio` is the median of their time over ours, round by round, the outputs
must be equal within one grey level on average. `exact` reads and filters every pixel.
"""

from __future__ import annotations

import argparse
import io
import statistics
from collections.abc import Callable

import numpy as np
from common import add_measuring_arguments, compared, emit, in_turns, on_cpu, setting
from PIL import Image

from blip2_hf.augmentation import TrainingAugmentation, random_crop
from blip2_hf.image_processing import CLIP_MEAN, CLIP_STD

SIZES = {"12 MP": (4000, 3000), "0.3 MP": (640, 480)}
CROPS = 4  # per round, each another one


def photo(size: tuple[int, int]) -> bytes:
    """A JPEG of quality 92 with 4:2:0 subsampling, as cameras write it: waves, edges and grain."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]].astype(np.float32) / size[0]
    pixels = np.stack([np.sin(90 * x + 40 * y), np.cos(70 * y - 30 * x), np.sin(250 * x * y)], axis=-1) * 80 + 128
    pixels += 40 * ((np.floor(x * 31) + np.floor(y * 23)) % 2)[..., None] - 20
    pixels += np.random.default_rng(0).normal(0, 4, (size[1], size[0], 1))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92, subsampling="4:2:0")
    return file.getvalue()


def theirs(content: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """Step by step, with the random numbers in the order of ours."""
    mirrored = rng.random() < 0.5
    image = Image.open(io.BytesIO(content)).convert("RGB")
    image = image.crop(random_crop(*image.size, rng)).resize((size, size), Image.Resampling.BICUBIC)
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def compare(content: bytes, size: int, repeats: int, *, exact: bool) -> dict[str, object]:
    """Times of both in turns, after checking that they agree."""
    augmentation = TrainingAugmentation(size, reduced=not exact)

    def all_crops(run: Callable[[np.random.Generator], np.ndarray]) -> list[np.ndarray]:
        return [run(np.random.default_rng(seed)) for seed in range(CROPS)]

    runs = {
        "ours": lambda: all_crops(lambda rng: augmentation(content, rng)),
        "theirs": lambda: all_crops(lambda rng: theirs(content, size, rng)),
    }
    outputs = {name: np.stack(run()) for name, run in runs.items()}
    levels = np.abs(outputs["ours"] - outputs["theirs"]) * np.array(CLIP_STD)[:, None, None] * 255
    assert levels.mean() < 1, "outputs differ by more than one grey level on average"
    times = in_turns(runs, repeats, "cpu")
    return {
        **compared(times, digits=4),
        "images_per_second": {name: round(CROPS / statistics.median(values), 1) for name, values in times.items()},
        "mean_grey_levels": round(float(levels.mean()), 3),
        "max_grey_levels": round(float(levels.max()), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measuring_arguments(parser, repeats=9)
    parser.add_argument("--size", type=int, default=224, help="side of the output in pixels")
    args = parser.parse_args()
    emit({"benchmark": "augmentation", "size": args.size, "crops": CROPS, **setting(on_cpu(args))})
    for name, size in list(SIZES.items())[-1 if args.small else 0 :]:
        content = photo(size)
        for exact in (False, True):
            case = {"photo": name, "width": size[0], "height": size[1], "exact": exact}
            emit(case | compare(content, args.size, args.repeats, exact=exact))


if __name__ == "__main__":
    main()
