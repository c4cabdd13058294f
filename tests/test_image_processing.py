"""`Blip2ImageProcessor`: equal to `transformers`' BLIP-2 image processor, and what it refuses."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from blip2_hf.image_loading import load_image
from blip2_hf.image_processing import Blip2ImageProcessor, as_image_list

RNG = np.random.default_rng(0)
SIZES = ((40, 60), (500, 300), (1, 1), (7, 900), (224, 224))  # height, width
PUBLISHED = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "BlipImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "Blip2Processor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [picture(*size) for size in SIZES]


@pytest.fixture(scope="module")
def theirs() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(**PUBLISHED)


def values(processor, images, **options) -> np.ndarray:
    output = processor(images, return_tensors="np", **options)["pixel_values"]
    assert isinstance(output, np.ndarray)
    return output


# -- equality with transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("do_resize", "do_rescale", "do_normalize"), list(itertools.product((True, False), repeat=3)))
def test_equals_transformers(images, theirs, do_resize: bool, do_rescale: bool, do_normalize: bool) -> None:
    options = {"do_resize": do_resize, "do_rescale": do_rescale, "do_normalize": do_normalize}
    for image in images:
        expected = values(theirs, image, **options)
        ours = values(Blip2ImageProcessor(), image, **options)
        assert ours.dtype == np.float32
        assert np.array_equal(ours, expected), (image.size, options)


@pytest.mark.parametrize("size", [364, (20, 300), {"height": 31, "width": 7}, {"shortest_edge": 64}])
@pytest.mark.parametrize("crop", [None, 33, (50, 31), {"height": 400, "width": 401}])
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_equals_transformers_for_other_sizes(images, theirs, size, crop, resample) -> None:
    options = {"size": size, "resample": resample}
    if crop is not None:
        options |= {"do_center_crop": True, "crop_size": crop}
    for image in images[:4]:
        square = {"height": size, "width": size} if isinstance(size, int) else size
        expected = values(theirs, image, **options | {"size": square})
        assert np.array_equal(values(Blip2ImageProcessor(), image, **options), expected)


@pytest.mark.parametrize("change", [{"resample": 2}, {"image_mean": [0.48, 0.4578275, 0.40821073]}, {"size": 225}])
def test_equality_notices_small_changes(images, theirs, change: dict) -> None:
    """Negative control of the tests above."""
    ours, expected = values(Blip2ImageProcessor(**change), images[1]), values(theirs, images[1])
    assert ours.shape != expected.shape or np.abs(ours - expected).max() > 1e-3


def test_other_statistics_and_factor(images, theirs) -> None:
    options = {"image_mean": 0.5, "image_std": (0.5, 0.25, 0.125), "rescale_factor": 1 / 127.5}
    expected = values(theirs, images[0], **options | {"image_mean": [0.5] * 3})
    assert np.array_equal(values(Blip2ImageProcessor(), images[0], **options), expected)
    assert np.array_equal(values(Blip2ImageProcessor(**options), images[0]), expected)


def test_batch_equals_single_and_threads_change_nothing(images) -> None:
    processor = Blip2ImageProcessor()
    threads = torch.get_num_threads()
    batches = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            batches.append(processor(images, return_tensors="pt")["pixel_values"])
    finally:
        torch.set_num_threads(threads)
    assert batches[0].shape == (len(SIZES), 3, 224, 224) and batches[0].dtype == torch.float32
    assert torch.equal(*batches)
    for row, image in zip(batches[0], images, strict=True):
        assert torch.equal(row, processor(image, return_tensors="pt")["pixel_values"][0])


# -- inputs ------------------------------------------------------------------------------------------------------


def test_paths_bytes_and_arrays_equal_pil_images(tmp_path: Path) -> None:
    image = picture(50, 70)
    path = tmp_path / "image.png"
    image.save(path)
    processor = Blip2ImageProcessor()
    expected = values(processor, image)
    pixels = np.asarray(image)
    for source in (
        str(path),
        path,
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
        pixels,
        pixels.transpose(2, 0, 1),
    ):
        assert np.array_equal(values(processor, source), expected)
    assert np.array_equal(values(processor, np.stack([pixels, pixels])), np.repeat(expected, 2, axis=0))
    assert np.array_equal(values(processor, torch.tensor(pixels)), expected)


def test_large_jpeg_is_decoded_faster_or_exactly(tmp_path: Path, theirs) -> None:
    y, x = np.mgrid[0:1501, 0:2003]
    pixels = np.stack([128 + 90 * np.sin(x / a + y / b) for a, b in ((31, 57), (90, 41), (200, 13))], axis=-1)
    path = tmp_path / "photo.jpg"
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=92)
    options = {"size": {"height": 96, "width": 96}, "do_normalize": False, "do_rescale": False}
    expected = values(theirs, load_image(path), **options)
    exact = values(Blip2ImageProcessor(jpeg_draft=False), path, **options)
    assert np.array_equal(exact, expected)
    assert np.array_equal(values(Blip2ImageProcessor(), path, jpeg_draft=False, **options), expected)
    assert np.array_equal(values(Blip2ImageProcessor(), load_image(path), **options), expected)
    drafted = values(Blip2ImageProcessor(), path, **options)
    assert 0 < np.abs(drafted - expected).mean() < 1


def test_floats_hold_zero_to_one() -> None:
    processor = Blip2ImageProcessor()
    pixels = np.asarray(picture(30, 40))
    floats = pixels / 255
    expected = values(processor, pixels)
    assert np.array_equal(values(processor, floats, do_rescale=False), expected)
    assert np.array_equal(values(processor, torch.tensor(floats).permute(2, 0, 1), do_rescale=False), expected)
    unresized = values(processor, floats, do_rescale=False, do_resize=False)
    assert np.abs(unresized - values(processor, pixels, do_resize=False)).max() < 1e-5
    with pytest.raises(ValueError, match="do_rescale=False"):
        processor(floats)
    for wrong in (pixels.astype(np.float32), floats - 0.1, floats * np.nan):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            processor(wrong, do_rescale=False)


@pytest.mark.parametrize("channels", [1, 4])
def test_floats_of_other_channel_counts(channels: int) -> None:
    processor = Blip2ImageProcessor(do_resize=False)
    pixels = RNG.integers(0, 256, (9, 8, channels), dtype=np.uint8)
    difference = values(processor, pixels / 255, do_rescale=False) - values(processor, pixels)
    assert np.abs(difference).max() < 0.02  # integers are rounded after compositing


def test_input_data_format() -> None:
    pixels = RNG.integers(0, 256, (3, 9, 3), dtype=np.uint8)
    processor = Blip2ImageProcessor(size=12)
    last, first = values(processor, pixels), values(processor, pixels, input_data_format="channels_first")
    assert np.array_equal(last, values(processor, Image.fromarray(pixels)))
    assert np.array_equal(first, values(processor, np.ascontiguousarray(pixels.transpose(1, 2, 0))))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_other_modes_are_converted_or_refused(mode: str) -> None:
    image = picture(20, 30, mode) if mode != "I;16" else Image.fromarray(np.full((20, 30), 40_000, np.uint16))
    processor = Blip2ImageProcessor()
    assert np.array_equal(values(processor, image), values(processor, load_image(image)))
    with pytest.raises(ValueError, match="do_convert_rgb=False needs RGB"):
        processor(image, do_convert_rgb=False)
    with pytest.raises(ValueError, match="do_convert_rgb=False needs RGB"):
        processor(np.zeros((4, 5), np.uint8), do_convert_rgb=False)
    rgb = image.convert("RGB")
    assert np.array_equal(values(processor, rgb, do_convert_rgb=False), values(processor, rgb))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "empty list"),
        ([[np.zeros((4, 4), np.uint8)]], r"images\[0\] is a list: nested"),
        ((image for image in ()), "got generator"),
        ({"image": 1}, "got dict"),
        (None, "got NoneType"),
        (["nowhere.png", np.zeros((4, 4), np.uint8)], "image 0 of 2: cannot load image 'nowhere.png'"),
        ([np.zeros((4, 4), np.uint8), b"bytes"], "image 1 of 2: cannot load image from 5 bytes"),
        ("nowhere.png", "^cannot load image 'nowhere.png'"),
    ],
)
def test_bad_images_are_named(images, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blip2ImageProcessor()(images)


def test_as_image_list() -> None:
    image = picture(2, 2)
    for single in (image, "a.png", Path("a.png"), b"x", np.zeros((4, 4)), torch.zeros(3, 4, 4), io.BytesIO()):
        assert as_image_list(single) == [single]
    assert as_image_list((image, "a.png")) == [image, "a.png"]
    assert len(as_image_list(torch.zeros(5, 3, 4, 4))) == 5


# -- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"size": 0}, "size must be"),
        ({"size": (1, 2, 3)}, "size must be"),
        ({"size": "224"}, "size must be"),
        ({"size": True}, "size must be"),
        ({"size": 22.4}, "size must be"),
        ({"size": {"longest_edge": 3}}, "size must be"),
        ({"size": {"height": 3, "width": -3}}, "size must be"),
        ({"crop_size": {"shortest_edge": 3}}, "crop_size must have"),
        ({"resample": 9}, "resample must be"),
        ({"do_center_crop": True}, "crop_size"),
        ({"image_mean": (1, 2)}, "image_mean must be"),
        ({"image_std": 0}, "image_std must be positive"),
        ({"rescale_factor": 0}, "rescale_factor must be positive"),
    ],
)
def test_bad_settings(option: dict, message: str) -> None:
    for use in (lambda: Blip2ImageProcessor(**option), lambda: Blip2ImageProcessor()(picture(4, 4), **option)):
        with pytest.raises(ValueError, match=message):
            use()


def test_unknown_options_are_named(images) -> None:
    with pytest.raises(TypeError, match="do_flip"):
        Blip2ImageProcessor(do_flip=True)
    with pytest.raises(TypeError, match="do_flip"):
        Blip2ImageProcessor()(images, do_flip=True)
    with pytest.raises(ValueError, match="return_tensors must be 'pt', 'np' or None, got 'tf'"):
        Blip2ImageProcessor()(images, return_tensors="tf")


def test_sizes_that_do_not_stack(images) -> None:
    processor = Blip2ImageProcessor(do_resize=False)
    with pytest.raises(ValueError, match="different sizes .*1x1.*40x60"):
        processor(images, return_tensors="pt")
    ragged = processor(images)["pixel_values"]
    assert [array.shape for array in ragged] == [(3, *size) for size in SIZES]


def test_options_of_a_call_do_not_stay(images) -> None:
    processor = Blip2ImageProcessor()
    before = processor.to_dict()
    processor(images, size=8, do_normalize=False)
    assert processor.to_dict() == before
    assert isinstance(processor(images), BatchFeature)


# -- files -------------------------------------------------------------------------------------------------------


def test_default_is_the_published_configuration() -> None:
    published = {**PUBLISHED, "do_center_crop": False}
    del published["processor_class"]
    assert Blip2ImageProcessor().to_dict() == published


def test_reads_the_published_file(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    assert Blip2ImageProcessor.from_pretrained(tmp_path).to_dict() == Blip2ImageProcessor().to_dict()
    changed = Blip2ImageProcessor.from_pretrained(tmp_path, size=364, do_normalize=False)
    assert changed.size == {"height": 364, "width": 364} and not changed.do_normalize
    with pytest.raises(ValueError, match="unknown arguments.*do_flip"):
        Blip2ImageProcessor.from_pretrained(tmp_path, do_flip=True)


def test_reads_what_transformers_writes_and_the_other_way_round(tmp_path: Path, images) -> None:
    theirs = BlipImageProcessorPil(**PUBLISHED | {"size": {"height": 30, "width": 20}, "image_std": [0.5, 0.6, 0.7]})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Blip2ImageProcessor.from_pretrained(tmp_path / "theirs")
    assert np.array_equal(values(ours, images), values(theirs, images))
    ours.save_pretrained(tmp_path / "ours")
    back = BlipImageProcessorPil.from_pretrained(tmp_path / "ours")
    assert np.array_equal(values(back, images), values(theirs, images))
    again = Blip2ImageProcessor.from_pretrained(tmp_path / "ours")
    assert again.to_dict() == ours.to_dict()


def test_transformers_auto_class_reads_ours(tmp_path: Path, images) -> None:
    from transformers import AutoImageProcessor

    ours = Blip2ImageProcessor(size=32)
    ours.save_pretrained(tmp_path)
    try:
        theirs = AutoImageProcessor.from_pretrained(tmp_path)
    except ImportError as error:  # older transformers has no auto class without torchvision
        pytest.skip(str(error).strip().splitlines()[0])
    assert type(theirs).__name__.startswith("BlipImageProcessor")
    if "Pil" in type(theirs).__name__:  # torchvision's resizing is not Pillow's
        assert np.array_equal(values(theirs, images), values(ours, images))


def test_exact_decoding_is_saved(tmp_path: Path) -> None:
    Blip2ImageProcessor(jpeg_draft=False).save_pretrained(tmp_path)
    assert not Blip2ImageProcessor.from_pretrained(tmp_path).jpeg_draft
    assert "jpeg_draft" not in Blip2ImageProcessor().to_dict()


def test_reads_the_files_of_a_clip_tower(tmp_path: Path, images) -> None:
    theirs = CLIPImageProcessorPil()
    theirs.save_pretrained(tmp_path)
    ours = Blip2ImageProcessor.from_pretrained(tmp_path)
    assert np.array_equal(values(ours, images), values(theirs, images))
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "do_center_crop": True}
    assert Blip2ImageProcessor.from_dict(old).size == {"shortest_edge": 224}
    assert np.array_equal(values(Blip2ImageProcessor.from_dict(old), images), values(theirs, images))


def test_settings_without_a_counterpart_are_not_passed_over() -> None:
    with pytest.raises(ValueError, match="do_pad"):
        Blip2ImageProcessor.from_dict({"do_pad": True})
    processor, unused = Blip2ImageProcessor.from_dict({}, do_flip=True, return_unused_kwargs=True)
    assert unused == {"do_flip": True} and processor.do_resize
