"""Training augmentation: where the crops lie, what becomes of their pixels, and that nothing but `rng` decides."""

import io
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip2_hf.augmentation import TrainingAugmentation, random_crop
from blip2_hf.image_loading import load_image
from blip2_hf.image_processing import CLIP_MEAN, CLIP_STD, Blip2ImageProcessor
from tiny_images import encoded, exif_with, photo

WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}  # of a square picture: no crop at all


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def grey_levels(pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3] of what the augmentation gives."""
    levels = pixels.transpose(1, 2, 0) * CLIP_STD + CLIP_MEAN
    return levels * 255


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_crops_lie_inside_any_picture(width: int, height: int, seed: int) -> None:
    left, upper, right, lower = random_crop(width, height, rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height


@given(st.integers(60, 3000), st.floats(0.76, 1.31), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_area_and_aspect_are_in_their_ranges(height: int, aspect: float, seed: int) -> None:
    width = round(height * aspect)
    left, upper, right, lower = random_crop(width, height, rng(seed))
    crop_width, crop_height = right - left, lower - upper
    # half a pixel of rounding on either side
    slack = (0.5 / crop_width + 0.5 / crop_height) * 1.1
    share = crop_width * crop_height / (width * height)
    assert 0.5 * (1 - slack) <= share <= 1
    assert math.log(3 / 4) - slack <= math.log(crop_width / crop_height) <= math.log(4 / 3) + slack


def test_distribution_of_crops() -> None:
    """Where every region fits: area uniform, log of the aspect uniform, place uniform."""
    size, count = 1000, 4000
    options = {"scale": (0.1, 0.5), "ratio": (3 / 4, 4 / 3)}
    generator = rng(1)
    boxes = np.array([random_crop(size, size, generator, **options) for _ in range(count)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    uniform = {
        "area": (width * height / size**2 - 0.1) / 0.4,
        "aspect": (np.log(width / height) - math.log(3 / 4)) / (2 * math.log(4 / 3)),
        "left": boxes[:, 0] / (size - width),
        "upper": boxes[:, 1] / (size - height),
    }
    for name, values in uniform.items():
        # Kolmogorov-Smirnov: 1.95 / sqrt(count) is exceeded once in 1000 times
        distance = np.abs(np.sort(values) - (np.arange(count) + 0.5) / count).max()
        assert distance < 1.95 / math.sqrt(count), name
    wrong = np.sort((width / height - 3 / 4) / (4 / 3 - 3 / 4))  # negative control: aspect itself is not uniform
    assert np.abs(wrong - (np.arange(count) + 0.5) / count).max() > 1.95 / math.sqrt(count)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        # no region of half the area and 3:4 to 4:3 fits: the largest such one in the centre
        ((1000, 100), (433, 0, 566, 100)),
        ((90, 1000), (0, 440, 90, 560)),
        ((1, 1000), (0, 499, 1, 500)),
        ((1, 1), (0, 0, 1, 1)),
        ((2, 1), (0, 0, 1, 1)),
    ],
)
def test_fallback_of_extreme_pictures(size: tuple[int, int], expected: tuple) -> None:
    assert random_crop(*size, rng()) == expected


def test_fallback_to_the_whole_picture() -> None:
    """With a share of 1 nothing but the picture's own aspect fits, which is practically never drawn."""
    assert random_crop(501, 499, rng(), scale=(1.0, 1.0)) == (0, 0, 501, 499)


def test_fallback_keeps_at_least_a_pixel() -> None:
    assert random_crop(1, 10, rng(), scale=(1.0, 1.0), ratio=(5.0, 6.0)) == (0, 4, 1, 5)


def test_without_a_crop_it_is_the_image_processor() -> None:
    processor = Blip2ImageProcessor(size=32, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6), jpeg_draft=False)
    augmentation = TrainingAugmentation.from_image_processor(processor, **WHOLE, flip=0.0)
    image = photo(90, 90)
    pixels = augmentation(image, rng())
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    assert pixels.dtype == np.float32 and pixels.shape == (3, 32, 32)
    assert np.array_equal(pixels, expected)
    other = TrainingAugmentation(32, reduced=False, flip=0.0, **WHOLE)(image, rng())
    assert not np.allclose(other, expected), "negative control: mean and std matter"
    mirrored = TrainingAugmentation.from_image_processor(processor, **WHOLE, flip=1.0)(image, rng())
    assert np.array_equal(mirrored, expected[:, :, ::-1])


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_as_cropping_and_then_resizing(reduced: bool, seed: int) -> None:
    image, size = photo(400, 301), (40, 30)
    pixels = grey_levels(TrainingAugmentation(size, flip=0.0, reduced=reduced)(image, rng(seed)))
    generator = rng(seed)
    generator.random()  # whether to flip
    box = random_crop(*image.size, generator)
    expected = np.asarray(image.crop(box).resize(size[::-1], Image.Resampling.BICUBIC)).astype(float)
    difference = np.abs(pixels - expected)
    assert difference.mean() < 1
    if not reduced:
        assert difference[2:-2, 2:-2].max() < 1e-3, "the filter reaches two output pixels beyond the crop"
    shifted = image.crop((box[0] + 4, *box[1:])).resize(size[::-1], Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(shifted) - expected).mean() > 1, "negative control"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(800, 600), (803, 605)])
def test_reduced_decoding_of_files(size: tuple[int, int], orientation: int) -> None:
    content = encoded(photo(*size), "JPEG", quality=92, exif=exif_with(orientation))
    for seed in range(3):
        fast, exact = (TrainingAugmentation((40, 30), reduced=reduced)(content, rng(seed)) for reduced in (True, False))
        assert 0 < np.abs(grey_levels(fast) - grey_levels(exact)).mean() < 1


def test_a_given_picture_is_not_changed() -> None:
    """Also one whose file Pillow has not decoded yet."""
    content = encoded(photo(800, 600), "JPEG")
    lazy = Image.open(io.BytesIO(content))
    from_picture = TrainingAugmentation(30)(lazy, rng())
    assert lazy.size == (800, 600)
    assert np.array_equal(from_picture, TrainingAugmentation(30)(load_image(content), rng()))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.booleans())
@settings(max_examples=60, deadline=None)
def test_pictures_of_any_size(width: int, height: int, seed: int, reduced: bool) -> None:
    image = Image.new("RGB", (width, height), (10, 100, 200))
    levels = grey_levels(TrainingAugmentation((9, 14), reduced=reduced)(image, rng(seed)))
    assert levels.shape == (9, 14, 3)
    assert np.allclose(levels, (10, 100, 200), atol=1e-3)


@pytest.mark.parametrize("width", range(1, 60, 7))
def test_odd_jpegs_of_any_size(width: int) -> None:
    content = encoded(Image.new("RGB", (width * 17 + 1, 333), (90, 90, 90)), "JPEG", quality=95)
    for seed in range(4):
        assert np.abs(grey_levels(TrainingAugmentation(5)(content, rng(seed))) - 90).max() < 2


def test_kinds_of_images() -> None:
    levels = np.asarray(photo(40, 40).convert("L"))
    grey = Image.fromarray(levels)
    expected = TrainingAugmentation(20)(grey.convert("RGB"), rng())
    same = {
        "grey": grey,
        "16 bit": Image.fromarray(levels.astype(np.uint16) * 257),
        "array": levels,
        "float array": levels / 255,
        "channels first": np.stack([levels] * 3),
        "opaque": grey.convert("RGBA"),
        "palette": grey.convert("P"),
        "bytes": encoded(grey),
    }
    for name, image in same.items():
        assert np.array_equal(TrainingAugmentation(20)(image, rng()), expected), name
    clear = TrainingAugmentation(20)(Image.new("RGBA", (40, 40), (0, 0, 0, 0)), rng())
    assert np.allclose(grey_levels(clear), 255, atol=1e-3), "transparency on white"


def test_only_the_generator_decides() -> None:
    augmentation = TrainingAugmentation(16)
    image = photo(60, 50)
    np.random.seed(0)
    first = augmentation(image, rng(3))
    np.random.seed(1)
    augmentation(image, rng(9))
    copy = pickle.loads(pickle.dumps(augmentation))
    assert np.array_equal(first, copy(image, rng(3)))
    assert not np.array_equal(first, augmentation(image, rng(4)))
    generator = rng(3)
    assert not np.array_equal(augmentation(image, generator), augmentation(image, generator))


def test_half_of_the_images_are_flipped() -> None:
    image = Image.new("RGB", (40, 40))
    image.paste("white", (20, 0, 40, 40))
    augmentation = TrainingAugmentation(8)
    generator = rng(5)
    mirrored = sum(
        bool(pixels[0, 0, 0] > pixels[0, 0, -1]) for pixels in (augmentation(image, generator) for _ in range(400))
    )
    assert 160 < mirrored < 240


def test_settings_of_an_image_processor() -> None:
    centre = Blip2ImageProcessor(size={"shortest_edge": 30}, do_center_crop=True, crop_size=(20, 24), resample=2)
    augmentation = TrainingAugmentation.from_image_processor(centre)
    assert augmentation.size == (20, 24) and augmentation.resample == 2 and augmentation.reduced
    assert not TrainingAugmentation.from_image_processor(Blip2ImageProcessor(jpeg_draft=False)).reduced
    raw = TrainingAugmentation.from_image_processor(Blip2ImageProcessor(size=4, do_normalize=False, do_rescale=False))
    assert np.array_equal(raw(Image.new("RGB", (9, 9), (1, 2, 3)), rng()), np.full((3, 4, 4), [[[1]], [[2]], [[3]]]))
    theirs = TrainingAugmentation.from_image_processor(BlipImageProcessorPil(size={"height": 12, "width": 10}))
    ours = TrainingAugmentation((12, 10))
    assert np.array_equal(theirs(photo(60, 50), rng()), ours(photo(60, 50), rng()))
    for bad in (Blip2ImageProcessor(size={"shortest_edge": 30}), Blip2ImageProcessor(do_resize=False)):
        with pytest.raises(ValueError, match="`image_processor` must give images of one height and width"):
            TrainingAugmentation.from_image_processor(bad)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale": (0.0, 1.0)}, "`scale`"),
        ({"scale": (0.5, 1.1)}, "`scale`"),
        ({"scale": (0.9, 0.5)}, "`scale`"),
        ({"scale": (float("nan"), 1.0)}, "`scale`"),
        ({"ratio": (0.0, 1.0)}, "`ratio`"),
        ({"ratio": (1.0, float("inf"))}, "`ratio`"),
        ({"ratio": (1.0,)}, "`ratio`"),
        ({"flip": 1.5}, "`flip`"),
        ({"size": {"shortest_edge": 3}}, "`size`"),
        ({"size": 0}, "size"),
        ({"std": 0.0}, "std"),
    ],
)
def test_bad_settings(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TrainingAugmentation(**options)


def test_bad_images() -> None:
    with pytest.raises(ValueError, match="cannot load image from 4 bytes"):
        TrainingAugmentation(8)(b"junk", rng())
    broken = encoded(photo(90, 90), "JPEG")[:900]
    with pytest.raises(ValueError, match="cannot load image"):
        TrainingAugmentation(8)(broken, rng())
