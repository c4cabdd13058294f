"""What is done to the image of a sample: the processor's own preprocessing, augmented for training or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..augmentation import TrainingAugmentation
from ..image_loading import ImageSource

ImageTransform = Callable[[ImageSource, np.random.Generator], np.ndarray]


class Unaugmented:
    """An image processor in the place of an augmentation."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def __call__(self, image: ImageSource, rng: np.random.Generator) -> np.ndarray:
        """float32 [3, H, W]; nothing is drawn from `rng`."""
        return self.image_processor(image, return_tensors="np")["pixel_values"][0]


def augmented(
    processor: Any, scale: tuple[float, float], ratio: tuple[float, float], flip: float
) -> TrainingAugmentation:
    """`TrainingAugmentation` for the image processor of a `Blip2Processor`."""
    images = image_processor_of(processor)
    return TrainingAugmentation.from_image_processor(images, scale=scale, ratio=ratio, flip=flip)


def image_processor_of(processor: Any) -> Any:
    """
    Raises:
        ValueError: if it has none.
    """
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(f"`processor` must be a Blip2Processor, got {type(processor).__name__}")
    return processor.image_processor


def checked_transform(image_transform: Any) -> ImageTransform:
    """
    Raises:
        ValueError: if it cannot be called.
    """
    if not callable(image_transform):
        raise ValueError(f"`image_transform` must be callable, got {type(image_transform).__name__}")
    return image_transform
