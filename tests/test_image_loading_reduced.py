"""Large JPEGs are decoded at reduced size, and look the same after resizing."""

import numpy as np
import pytest
from PIL import Image

from blip2_hf.image_loading import DRAFT_MARGIN, load_image, load_image_for_crop, load_image_for_resize
from tiny_images import encoded, exif_with, photo


def resized(source, size: tuple[int, int]) -> np.ndarray:
    image, box = load_image_for_resize(source, size)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box=box)).astype(int)


def test_large_jpegs_are_decoded_at_reduced_size() -> None:
    side = 30 * 8 * DRAFT_MARGIN
    content = encoded(photo(side, side), "JPEG", quality=90)
    assert load_image(content).size == (side, side)
    assert load_image(content, target_size=(30, 30)).size == (side // 8, side // 8)
    assert load_image(content, target_size=(31, 30)).size == (side // 4, side // 4)
    assert load_image(content, target_size=(30, 61)).size == (side // 2, side // 2)
    assert load_image(content, target_size=(121, 121)).size == (side, side)
    assert load_image(encoded(photo(720, 720)), target_size=(9, 9)).size == (720, 720), "PNG has no such decoder"


@pytest.mark.parametrize("size", [(800, 600), (801, 603), (607, 999)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_decoding_is_within_one_grey_level(size: tuple[int, int], orientation: int) -> None:
    content = encoded(photo(*size), "JPEG", quality=92, exif=exif_with(orientation))
    target = (32, 45)
    full = load_image(content)
    reduced, _ = load_image_for_resize(content, target)
    assert reduced.width < full.width
    assert reduced.width >= DRAFT_MARGIN * target[1] and reduced.height >= DRAFT_MARGIN * target[0]
    expected = np.asarray(full.resize(target[::-1], Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(resized(content, target) - expected).mean() < 1
    image = load_image(content, target_size=target)  # in whole pixels: there is no region to know about
    assert np.abs(np.asarray(image.resize(target[::-1], Image.Resampling.BICUBIC)) - expected).mean() < 1


@pytest.mark.parametrize(("orientation", "size"), [(1, (720, 360)), (6, (360, 720))])
def test_reduction_suits_the_upright_image(orientation: int, size: tuple[int, int]) -> None:
    """Which of its sides is to become the long one decides how far it may be reduced."""
    content = encoded(photo(720, 360), "JPEG", exif=exif_with(orientation))
    width, height = size
    target = (15, 60) if orientation == 1 else (60, 15)
    assert load_image(content, target_size=target).size == (width // 4, height // 4)
    assert load_image(content, target_size=target[::-1]).size == (width // 2, height // 2)


def test_without_its_region_a_reduced_image_is_shifted() -> None:
    """Negative control of the test above."""
    content = encoded(photo(801, 603), "JPEG", quality=92)
    image, box = load_image_for_resize(content, (32, 45))
    assert box is not None
    shifted = np.asarray(image.resize((45, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(shifted - resized(content, (32, 45))).mean() > 0.5


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "retina"])
def test_reduced_decoding_of_real_photos(name: str) -> None:
    data = pytest.importorskip("skimage.data")
    pixels = data.retina() if name == "retina" else getattr(data, name)()
    content = encoded(Image.fromarray(pixels).resize((2400, 1801), Image.Resampling.BICUBIC), "JPEG", quality=92)
    expected = np.asarray(load_image(content).resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(resized(content, (224, 224)) - expected)
    assert 0 < difference.mean() < 0.5


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_reduced_decoding_of_other_modes(mode: str) -> None:
    content = encoded(photo(720, 720).convert(mode), "JPEG", quality=92)
    image = load_image(content, target_size=(30, 30))
    assert image.mode == "RGB" and image.size == (90, 90)
    expected = np.asarray(load_image(content).resize((30, 30), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(image.resize((30, 30), Image.Resampling.BICUBIC)) - expected).mean() < 1


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_crop_is_reduced_as_far_as_the_crop_allows(orientation: int) -> None:
    upright = (960, 480) if orientation == 1 else (480, 960)
    content = encoded(photo(960, 480), "JPEG", exif=exif_with(orientation))
    sizes = []

    def crop(width: int, height: int) -> tuple[int, int, int, int]:
        sizes.append((width, height))
        return (120, 60, 120 + 240, 60 + 240)

    for side, reduction in ((10, 8), (11, 4), (20, 4), (21, 2), (40, 2), (41, 1)):
        image, box = load_image_for_crop(content, crop, (side, side))
        assert image.size == (upright[0] // reduction, upright[1] // reduction)
        assert box == tuple(edge / reduction for edge in (120, 60, 360, 300))
        assert box[2] - box[0] >= DRAFT_MARGIN * side or reduction == 1
    assert sizes == [upright] * 6, "asked once for each image, with its upright size"
    image, box = load_image_for_crop(content, crop, None)
    assert image.size == upright and box == (120, 60, 360, 300)


@pytest.mark.parametrize("target", [(0, 5), (5,), (5, 5, 5)])
def test_bad_target_size(target: tuple) -> None:
    with pytest.raises(ValueError, match="target_size must be"):
        load_image(np.zeros((4, 4), np.uint8), target_size=target)
    for load in (
        load_image_for_resize,
        lambda source, size: load_image_for_crop(source, lambda *_: (0, 0, 1, 1), size),
    ):
        with pytest.raises(ValueError, match="target_size must be"):
            load(np.zeros((4, 4), np.uint8), target)
