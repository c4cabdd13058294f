"""Training augmentation of the paper on Pillow and NumPy: a random crop, resized, and a horizontal flip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from .image_loading import DRAFT_MARGIN, ImageSource, load_image_for_crop
from .image_processing import CLIP_MEAN, CLIP_STD, Blip2ImageProcessor

_TRIES = 10


class TrainingAugmentation:
    """A random region of the picture, resized (bicubic), flipped or not, and normalised (paper, section 3.4).

    The paper names random resized crops and horizontal flips; the ranges are those of the original code's
    `blip2_image_train`. Keeps no state: the result depends on the image and on the generator given. Can be pickled
    for the workers of a DataLoader.

    Args:
        size: of the output in pixels: int (square), (height, width) or {"height", "width"}.
        mean, std: for R, G and B (or one number for all), of values in [0, 1].
        scale: least and greatest share of the picture's area that the crop takes.
        ratio: least and greatest width / height of the crop.
        flip: probability of mirroring left and right.
        resample: Pillow's number of the filter; 3 is bicubic.
        rescale_factor: what grey levels are multiplied by before `mean` is subtracted.
        reduced: whether pictures far larger than needed are first reduced by a whole factor, JPEG files while they
            are decoded (see `load_image_for_crop`): several times faster and, on average, within one grey level. If
            not, every pixel is decoded and filtered.

    Raises:
        ValueError: for settings out of their range, naming the argument.
    """

    def __init__(
        self,
        size: int | Sequence[int] | dict[str, int] = 224,
        mean: float | Sequence[float] = CLIP_MEAN,
        std: float | Sequence[float] = CLIP_STD,
        *,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        resample: int = 3,
        rescale_factor: float = 1 / 255,
        reduced: bool = True,
    ) -> None:
        # Rescales and normalises, so that a trained model sees the same numbers as in evaluation.
        self._normaliser = Blip2ImageProcessor(
            do_resize=False,
            size=size,
            resample=resample,
            rescale_factor=rescale_factor,
            image_mean=mean,
            image_std=std,
        )
        if "height" not in self._normaliser.size:
            raise ValueError(f"`size` must have a height and a width, got {size!r}")
        self.size = (self._normaliser.size["height"], self._normaliser.size["width"])
        self.scale = _range("scale", scale, highest=1.0)
        self.ratio = _range("ratio", ratio, highest=math.inf)
        if not 0 <= flip <= 1:
            raise ValueError(f"`flip` must be a probability from 0 to 1, got {flip!r}")
        self.flip = flip
        self.resample = self._normaliser.resample
        self.reduced = reduced

    @classmethod
    def from_image_processor(
        cls,
        image_processor: Any,
        *,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ) -> TrainingAugmentation:
        """With the output size, filter, mean and standard deviation of `Blip2ImageProcessor` or one of `transformers`.

        Raises:
            ValueError: if the size of the processor's output depends on the image.
        """
        normalises = image_processor.do_normalize
        return cls(
            _output_size(image_processor),
            image_processor.image_mean if normalises else 0.0,
            image_processor.image_std if normalises else 1.0,
            scale=scale,
            ratio=ratio,
            flip=flip,
            resample=image_processor.resample,
            rescale_factor=image_processor.rescale_factor if image_processor.do_rescale else 1.0,
            reduced=getattr(image_processor, "jpeg_draft", True),
        )

    def __call__(self, image: ImageSource, rng: np.random.Generator) -> np.ndarray:
        """Augment one image.

        Args:
            image: whatever `load_image` takes. A path or the bytes of a file are faster than a decoded picture,
                because large JPEGs need not be decoded in full. Floats are in [0, 1].
            rng: the only source of randomness.

        Returns:
            float32 [3, H, W], normalised.

        Raises:
            ValueError: anything that is not a readable image.
        """
        mirrored = rng.random() < self.flip
        picture, box = load_image_for_crop(
            image,
            lambda width, height: random_crop(width, height, rng, scale=self.scale, ratio=self.ratio),
            self.size if self.reduced else None,
        )
        gap = float(DRAFT_MARGIN) if self.reduced else None
        height, width = self.size
        # With `box` no copy of the crop is made. Unlike after `crop`, the filter sees the pixels around the box, which
        # changes the outermost pixels of the output a little.
        crop = picture.resize((width, height), self.resample, box=box, reducing_gap=gap)
        if mirrored:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._normaliser(crop)["pixel_values"][0]


def random_crop(
    width: int,
    height: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """A region (left, upper, right, lower) of a picture of width x height pixels.

    The distribution is that of torchvision's `RandomResizedCrop`, which the original code uses: the area is uniform
    in `scale` times that of the picture, the logarithm of width / height uniform in that of `ratio`, the place uniform.
    A region that does not fit is drawn again; after ten tries the largest region in the centre is taken whose
    width / height is in `ratio`.
    """
    area = width * height
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(_TRIES):
        crop_area = area * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        crop_width, crop_height = round(math.sqrt(crop_area * aspect)), round(math.sqrt(crop_area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            upper = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return left, upper, left + crop_width, upper + crop_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    # `max`: of a picture one pixel wide or high at least that pixel
    crop_width = width if width / height <= aspect else max(1, round(height * aspect))
    crop_height = height if width / height >= aspect else max(1, round(width / aspect))
    left, upper = (width - crop_width) // 2, (height - crop_height) // 2
    return left, upper, left + crop_width, upper + crop_height


def _output_size(image_processor: Any) -> tuple[int, int]:
    """(height, width) of all images that the processor gives."""
    size = None
    if getattr(image_processor, "do_center_crop", False):
        size = image_processor.crop_size
    elif image_processor.do_resize:
        size = image_processor.size
    edges = (getattr(size, name, None) for name in ("height", "width"))  # a class of transformers
    edges = tuple(size.get(name) for name in ("height", "width")) if isinstance(size, dict) else tuple(edges)
    if None in edges:
        raise ValueError(
            "`image_processor` must give images of one height and width, but it "
            + ("does not resize" if size is None else f"resizes to {size}")
        )
    return edges


def _range(name: str, values: tuple[float, float], highest: float) -> tuple[float, float]:
    if len(values) != 2 or not 0 < values[0] <= values[1] <= highest or math.isinf(values[1]):
        limit = "" if math.isinf(highest) else f", at most {highest:g}"
        raise ValueError(f"`{name}` must be two positive numbers{limit}, the lesser first, got {values!r}")
    return (float(values[0]), float(values[1]))
