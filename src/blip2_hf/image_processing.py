"""`Blip2ImageProcessor`: images of any kind to normalised `pixel_values`, on Pillow and NumPy alone."""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin
from transformers.utils import logging

from .checkpoints import resolve_checkpoint
from .image_loading import (
    ImageSource,
    array_to_image,
    is_array,
    load_image,
    load_image_for_resize,
    to_channels_last,
    to_numpy,
)

logger = logging.get_logger(__name__)

# Mean and standard deviation of CLIP, which all towers of the paper were trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_THREADS = 16
# Names of all settings, which are also the options of a call.
IMAGE_SETTINGS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
    "jpeg_draft",
)
# In files that `transformers` wrote, without a meaning for what is computed here.
_FOREIGN_KEYS = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "default_to_square",
    "data_format",
    "input_data_format",
    "image_seq_length",
    "device",
    "disable_grouping",
    "return_tensors",
    "backend",
    "_valid_processor_keys",
}

Size = int | Sequence[int] | Mapping[str, int]


class Blip2ImageProcessor(ImageProcessingMixin):
    """Resizes (bicubic), rescales to [0, 1] and normalises images; equal to `transformers`' BLIP-2 processor.

    Takes everything that `blip2_hf.image_loading.load_image` takes. `preprocessor_config.json` is the one of
    `transformers`, in both directions.

    Args:
        do_resize: whether to resize to `size`.
        size: int (square), (height, width), {"height", "width"} or {"shortest_edge"} (keeps the aspect ratio).
        resample: Pillow's number of the filter; 3 is bicubic.
        do_center_crop: whether to cut the centre of `crop_size` out, after resizing; black where it is too small.
        crop_size: int (square), (height, width) or {"height", "width"}.
        do_rescale: whether to multiply by `rescale_factor`.
        do_normalize: whether to subtract `image_mean` and divide by `image_std` (numbers for R, G and B, or one).
        do_convert_rgb: whether to convert PIL images and arrays to RGB; if not, others raise. Files always are.
        jpeg_draft: whether large JPEG files are decoded at reduced size (see `load_image`), several times faster
            and within one grey level on average; if not, every pixel is decoded and the result is exact.

    Raises:
        ValueError: for settings out of their range, naming the argument.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        *,
        do_resize: bool = True,
        size: Size = 224,
        resample: int = 3,
        do_center_crop: bool = False,
        crop_size: Size | None = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Sequence[float] = CLIP_MEAN,
        image_std: float | Sequence[float] = CLIP_STD,
        do_convert_rgb: bool = True,
        jpeg_draft: bool = True,
    ) -> None:
        super().__init__()
        self.do_resize = do_resize
        self.size = _size_dict("size", size)
        self.resample = int(resample)
        self.do_center_crop = do_center_crop
        self.crop_size = None if crop_size is None else _size_dict("crop_size", crop_size)
        self.do_rescale = do_rescale
        self.rescale_factor = float(rescale_factor)
        self.do_normalize = do_normalize
        self.image_mean = _per_channel("image_mean", image_mean)
        self.image_std = _per_channel("image_std", image_std)
        self.do_convert_rgb = do_convert_rgb
        self.jpeg_draft = jpeg_draft
        _check(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "Blip2ImageProcessor":
        """From a folder, a Hub id or a short name such as "blip2-opt-2.7b"; `kwargs`: Hub options and settings."""
        return super().from_pretrained(resolve_checkpoint(pretrained_model_name_or_path), **kwargs)

    def __call__(self, images: ImageSource | Iterable[ImageSource], **kwargs: Any) -> BatchFeature:
        """See `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        do_resize: bool | None = None,
        size: Size | None = None,
        resample: int | None = None,
        do_center_crop: bool | None = None,
        crop_size: Size | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_convert_rgb: bool | None = None,
        jpeg_draft: bool | None = None,
    ) -> BatchFeature:
        """Turn one image or a list of images into a batch.

        Floating-point arrays hold values in [0, 1] and so are rescaled already: they need `do_rescale=False`
        (dividing them by 255 again would give almost black images) and raise otherwise.

        Args:
            images: one image (path, URL, bytes, file object, PIL image, array, tensor) or a list of them; a
                4-dimensional array is a list of images.
            return_tensors: "pt", "np", or None for a list of arrays.
            input_data_format: "channels_first" or "channels_last" of arrays whose shape does not tell.
            the others: as in the constructor, for this call only.

        Returns:
            {"pixel_values": float32 [B, 3, H, W]}.

        Raises:
            ValueError: for what is no image (naming it), empty or nested lists, float arrays with
                `do_rescale=True`, settings out of range, images of unequal size that cannot form one tensor.
        """
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}")
        overrides = {
            "do_resize": do_resize,
            "size": size,
            "resample": resample,
            "do_center_crop": do_center_crop,
            "crop_size": crop_size,
            "do_rescale": do_rescale,
            "rescale_factor": rescale_factor,
            "do_normalize": do_normalize,
            "image_mean": image_mean,
            "image_std": image_std,
            "do_convert_rgb": do_convert_rgb,
            "jpeg_draft": jpeg_draft,
        }
        overrides = {name: value for name, value in overrides.items() if value is not None}
        settings = type(self)(**self._settings() | overrides) if overrides else self
        sources = as_image_list(images)
        shape = settings._output_shape()
        batch = None if shape is None or return_tensors is None else np.empty((len(sources), *shape), np.float32)

        def process(numbered: tuple[int, ImageSource]) -> np.ndarray:
            index, source = numbered
            try:
                return settings._process(source, input_data_format, None if batch is None else batch[index])
            except ValueError as error:
                if len(sources) == 1:
                    raise
                raise ValueError(f"image {index} of {len(sources)}: {error}") from error

        threads = _thread_count(len(sources))
        if threads == 1:
            arrays = [process(numbered) for numbered in enumerate(sources)]
        else:  # decoding and resizing release Python's global lock
            with ThreadPoolExecutor(threads) as pool:
                arrays = list(pool.map(process, enumerate(sources)))
        if return_tensors is None:
            return BatchFeature({"pixel_values": arrays})
        batch = _stack(arrays) if batch is None else batch
        return BatchFeature({"pixel_values": torch.from_numpy(batch) if return_tensors == "pt" else batch})

    def to_dict(self) -> dict[str, Any]:
        """The settings as `preprocessor_config.json` holds them, readable by `transformers`' AutoImageProcessor."""
        settings = {name: value for name, value in self._settings().items() if value is not None}
        if settings["jpeg_draft"]:
            del settings["jpeg_draft"]  # unknown to transformers; kept only where it says something
        return {**settings, "image_processor_type": "BlipImageProcessor"}

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> "Blip2ImageProcessor":
        """From the content of a `preprocessor_config.json` of ours or of `transformers`; `kwargs` override it.

        Raises:
            ValueError: for an unknown keyword argument, or padding, which BLIP-2 does not have.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        unused = {name: kwargs.pop(name) for name in list(kwargs) if name not in IMAGE_SETTINGS}
        if unused and not return_unused:
            raise ValueError(f"unknown arguments for {cls.__name__}: {', '.join(sorted(unused))}")
        config = {name: value for name, value in image_processor_dict.items() if value is not None}
        if config.pop("do_pad", False):
            raise ValueError(f"{cls.__name__} has no padding, but the configuration says do_pad=true")
        config.pop("pad_size", None)
        if isinstance(config.get("size"), int) and _int_is_shortest_edge(config):
            config["size"] = {"shortest_edge": config["size"]}
        unknown = sorted(set(config) - set(IMAGE_SETTINGS) - _FOREIGN_KEYS)
        if unknown:
            logger.warning(f"{cls.__name__} does not know and leaves out of the configuration: {', '.join(unknown)}")
        processor = cls(**{name: value for name, value in config.items() if name in IMAGE_SETTINGS} | kwargs)
        return (processor, unused) if return_unused else processor

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in IMAGE_SETTINGS}

    def _output_shape(self) -> tuple[int, int, int] | None:
        """(3, H, W) of every image; None if it depends on the image."""
        size = self.crop_size if self.do_center_crop else self.size if self.do_resize else {}
        return (3, size["height"], size["width"]) if "height" in size else None

    def _process(self, source: ImageSource, input_data_format: str | None, out: np.ndarray | None) -> np.ndarray:
        """[3, H, W] of one image, written to `out` if that is given."""
        if is_array(source):
            source = to_numpy(source)
            if source.dtype.kind == "f":
                return self._process_floats(source, input_data_format, out)
            if not self.do_convert_rgb and to_channels_last(source, input_data_format).shape[2] != 3:
                raise ValueError(f"do_convert_rgb=False needs RGB images, got an array of shape {source.shape}")
            image = array_to_image(source, channels=input_data_format)
            return self._look_up(self._resize_and_crop(image), self._table(), out)
        if not self.do_convert_rgb and isinstance(source, Image.Image) and source.mode != "RGB":
            raise ValueError(f"do_convert_rgb=False needs RGB images, got one of mode {source.mode}")
        box = None
        if self.jpeg_draft and self.do_resize and "height" in self.size:
            image, box = load_image_for_resize(source, (self.size["height"], self.size["width"]))
        else:
            image = load_image(source)
        return self._look_up(self._resize_and_crop(image, box), self._table(), out)

    def _process_floats(self, array: np.ndarray, input_data_format: str | None, out: np.ndarray | None) -> np.ndarray:
        """Values in [0, 1]. Resizing goes through 8 bits, as in `transformers`."""
        if self.do_rescale:
            raise ValueError(
                "floating-point images hold values in [0, 1] and are rescaled already: pass do_rescale=False, or "
                "give the image as uint8"
            )
        image = array_to_image(array, channels=input_data_format)  # checks the range, too
        if self.do_resize or self.do_center_crop:
            return self._look_up(self._resize_and_crop(image), self._table(rescale_factor=1 / 255), out)
        pixels = to_channels_last(array, input_data_format).transpose(2, 0, 1).astype(np.float32)
        if pixels.shape[0] == 4:
            pixels = pixels[:3] * pixels[3:] + (1 - pixels[3:])
        return self._normalize(np.repeat(pixels, 3, axis=0) if pixels.shape[0] == 1 else pixels)

    def _resize_and_crop(self, image: Image.Image, box: tuple | None = None) -> Image.Image:
        if self.do_resize:
            height, width = _resized(image, self.size)
            image = image.resize((width, height), self.resample, box=box)
        if self.do_center_crop:
            height, width = self.crop_size["height"], self.crop_size["width"]
            left, upper = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, upper, left + width, upper + height))
        return image

    def _table(self, rescale_factor: float | None = None) -> np.ndarray:
        """[3, 256] float32: what each grey level becomes. Bit for bit what the arithmetic gives, and faster."""
        levels = np.tile(np.arange(256, dtype=np.float64), (3, 1))
        if rescale_factor is None:
            rescale_factor = self.rescale_factor if self.do_rescale else 1
        return self._normalize((levels * rescale_factor).astype(np.float32)[:, :, None])[:, :, 0]

    def _normalize(self, pixels: np.ndarray) -> np.ndarray:
        if not self.do_normalize:
            return pixels
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.image_mean, self.image_std))
        return (pixels - mean) / std

    @staticmethod
    def _look_up(image: Image.Image, table: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        out = np.empty((3, image.height, image.width), np.float32) if out is None else out
        for channel, band in enumerate(image.split()):
            np.take(table[channel], np.asarray(band), out=out[channel], mode="clip")
        return out


def as_image_list(images: ImageSource | Iterable[ImageSource]) -> list[ImageSource]:
    """One image or a list of images as a list.

    Raises:
        ValueError: for an empty or nested list, or a type that is neither an image nor a list of them.
    """
    if is_array(images) and len(images.shape) == 4:
        images = list(images)
    elif is_array(images) or isinstance(images, (str, bytes, bytearray, memoryview, Image.Image)):
        return [images]
    elif isinstance(images, Sequence):  # list, tuple, a column of a dataset
        images = list(images)
    elif isinstance(images, Iterable) and not hasattr(images, "read"):
        raise ValueError(f"images must be one image or a list of images, got {type(images).__name__}")
    else:
        return [images]
    if not images:
        raise ValueError("images is an empty list; at least one image is needed")
    for index, image in enumerate(images):
        if isinstance(image, (list, tuple)):
            raise ValueError(
                f"images[{index}] is a {type(image).__name__}: nested lists are not supported, BLIP-2 takes one "
                "image for each text"
            )
    return images


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        sizes = ", ".join(sorted(f"{height}x{width}" for _, height, width in shapes))
        raise ValueError(f"images of different sizes (height x width: {sizes}) cannot form one tensor; resize them")
    return np.stack(arrays)


def _thread_count(images: int) -> int:
    """As many threads as torch uses: one in the worker processes of a DataLoader, and what the user set."""
    return min(images, torch.get_num_threads(), _MAX_THREADS)


def _resized(image: Image.Image, size: dict[str, int]) -> tuple[int, int]:
    """(height, width) after resizing."""
    if "height" in size:
        return size["height"], size["width"]
    short, long = sorted(image.size)
    edges = (size["shortest_edge"], int(size["shortest_edge"] * long / short))
    return edges if image.height <= image.width else edges[::-1]


def _int_is_shortest_edge(config: dict[str, Any]) -> bool:
    """Old files of CLIP towers give the shortest edge as a plain number."""
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or ""
    return kind.startswith("CLIP") or config.get("default_to_square") is False


def _size_dict(name: str, size: Size) -> dict[str, int]:
    given = size
    if hasattr(size, "keys"):  # a dict, or transformers' SizeDict
        size = dict(size)
    elif isinstance(size, Sequence) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    elif isinstance(size, int):
        size = {"height": size, "width": size}
    known = isinstance(size, dict) and set(size) in ({"height", "width"}, {"shortest_edge"})
    if not known or not all(type(edge) is int and edge > 0 for edge in size.values()):
        raise ValueError(
            f"{name} must be a positive int, (height, width), {{'height', 'width'}} or {{'shortest_edge'}}, got "
            f"{given!r}"
        )
    return size


def _per_channel(name: str, values: float | Sequence[float]) -> list[float]:
    numbers = [values] * 3 if isinstance(values, (int, float)) else list(values)
    if len(numbers) != 3:
        raise ValueError(f"{name} must be one number or three (R, G, B), got {values!r}")
    return [float(number) for number in numbers]


def _check(settings: Blip2ImageProcessor) -> None:
    if settings.resample not in {int(kind) for kind in Image.Resampling}:
        raise ValueError(f"resample must be a filter of PIL.Image.Resampling (0 to 5), got {settings.resample}")
    if settings.do_center_crop and settings.crop_size is None:
        raise ValueError("do_center_crop=True needs crop_size, got None")
    if settings.crop_size is not None and "height" not in settings.crop_size:
        raise ValueError(f"crop_size must have 'height' and 'width', got {settings.crop_size}")
    if not settings.rescale_factor > 0:
        raise ValueError(f"rescale_factor must be positive, got {settings.rescale_factor}")
    if min(settings.image_std) <= 0:
        raise ValueError(f"image_std must be positive, got {settings.image_std}")
