import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from blip2_hf.data.pairs import ImageTextPairs
from blip2_hf.data.samples import ImageTextSample, stable_id
from blip2_hf.data.skipped import SkipSample
from blip2_hf.image_loading import load_image
from tiny_images import encoded, exif_with, photo
from tiny_sets import as_list, reveal, solid, tiny_samples


def epoch_of(pairs: ImageTextPairs, epoch: int) -> list[dict]:
    pairs.set_epoch(epoch)
    return [pairs[index] for index in range(len(pairs))]


def test_an_example() -> None:
    example = ImageTextPairs(tiny_samples(3), reveal)[2]
    assert (example["number"], example["caption"]) == (2, "caption 2 0")
    assert example["image_id"] == stable_id("tiny/2")
    assert "skipped" not in example


def test_without_image_id() -> None:
    assert "image_id" not in ImageTextPairs([ImageTextSample(solid(1), ("a",))], reveal)[0]


def test_captions_and_draws_change_with_seed_epoch_and_index_only() -> None:
    samples = tiny_samples(40, captions=5)
    first = epoch_of(ImageTextPairs(samples, reveal, seed=1), 3)
    torch.manual_seed(99)
    np.random.seed(99)
    assert epoch_of(ImageTextPairs(samples, reveal, seed=1), 3) == first
    assert epoch_of(ImageTextPairs(samples, reveal, seed=2), 3) != first
    assert epoch_of(ImageTextPairs(samples, reveal, seed=1), 4) != first
    assert len({example["draw"] for example in first}) == 40
    assert {example["caption"].split()[-1] for example in first} == set("01234")


@given(index=st.integers(0, 4), epoch=st.integers(0, 2**40), seed=st.integers(-(2**40), 2**40))
@settings(max_examples=30, deadline=None)
def test_an_example_is_a_function_of_its_key(index: int, epoch: int, seed: int) -> None:
    samples = tiny_samples(5, captions=3)
    one, other = (ImageTextPairs(samples, reveal, seed=seed) for _ in range(2))
    other.set_epoch(1)
    _ = other[0]
    other.set_epoch(epoch)
    assert one.example(index, epoch) == other[index] == other[index - 5]


def test_every_caption_is_drawn_equally_often() -> None:
    pairs = ImageTextPairs(tiny_samples(1, captions=4), reveal)
    counts = np.bincount([int(pairs.example(0, epoch)["caption"][-1]) for epoch in range(400)], minlength=4)
    assert counts.min() > 70  # expected 100, standard deviation 8.7


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing_and_see_the_epoch(persistent: bool) -> None:
    pairs = ImageTextPairs(tiny_samples(9, captions=3), reveal)
    loader = DataLoader(pairs, batch_size=2, num_workers=2, collate_fn=as_list, persistent_workers=persistent)
    expected = ImageTextPairs(tiny_samples(9, captions=3), reveal)
    for epoch in (0, 1):
        pairs.set_epoch(epoch)
        assert [example for batch in loader for example in batch] == epoch_of(expected, epoch)


def truncated_jpeg() -> bytes:
    data = encoded(photo(64, 48), "JPEG")
    return data[: len(data) // 2]


BROKEN = {
    "blank caption": ImageTextSample(encoded(solid(1)), ("", " \n\t "), "s/blank"),
    "no caption": ImageTextSample(encoded(solid(1)), (), "s/none"),
    "missing": ImageTextSample("not/there.jpg", ("a",)),
    "no image": ImageTextSample(None, ("a",), "s/noimage"),
    "noise": ImageTextSample(b"not an image", ("a",), "s/noise"),
    "empty": ImageTextSample(b"", ("a",), "s/empty"),
    "truncated": ImageTextSample(truncated_jpeg(), ("a",), "s/truncated"),
}
REASONS = {
    "blank caption": "blank caption",
    "no caption": "blank caption",
    "missing": "missing image file",
    "no image": "record without image",
    "noise": "unreadable image",
    "empty": "unreadable image",
    "truncated": "unreadable image",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_sample_is_replaced_and_reported(kind: str) -> None:
    samples = [BROKEN[kind], *tiny_samples(20)]
    pairs = ImageTextPairs(samples, reveal, seed=4)
    example = pairs[0]
    assert set(example["skipped"][0]) == {"reason", "where"}
    assert example["skipped"][0]["reason"] == REASONS[kind]
    assert example["skipped"][0]["where"] == BROKEN[kind].where
    assert example == ImageTextPairs(samples, reveal, seed=4)[0]
    replacements = {pairs.example(0, epoch)["number"] for epoch in range(8)}
    assert len(replacements) > 2, "the replacement is drawn anew in each epoch"
    assert example["image_id"] == stable_id(f"tiny/{example['number']}")


def test_decompression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # the tiny images have 48 pixels
    with pytest.raises(ValueError, match="none of 3 samples.*\n.*image too large: 3"):
        ImageTextPairs(tiny_samples(2), reveal, max_attempts=3)[0]


def test_only_blank_captions_are_dropped() -> None:
    pairs = ImageTextPairs([ImageTextSample(solid(1), ("", "good", "  "))], reveal)
    drawn = [pairs.example(0, epoch) for epoch in range(20)]
    assert {example["caption"] for example in drawn} == {"good"}
    assert all("skipped" not in example for example in drawn)


def test_a_transform_may_skip() -> None:
    def choosy(image: Image.Image, caption: str, rng: np.random.Generator) -> dict:
        if caption.startswith("caption 0"):
            raise SkipSample("no word in the vocabulary")
        return reveal(image, caption, rng)

    assert ImageTextPairs(tiny_samples(4), choosy)[0]["skipped"][0] == {
        "reason": "no word in the vocabulary",
        "where": "tiny/0",
    }


def test_a_malformed_record_in_place_of_a_sample_is_skipped() -> None:
    record = {"reason": "malformed record", "where": "row 0"}
    pairs = ImageTextPairs([record, *tiny_samples(9)], reveal)
    assert pairs[0]["skipped"][0] == record
    assert [pairs[n]["number"] for n in range(1, 10)] == list(range(9))


def test_half_an_emoji_is_a_malformed_record() -> None:
    pairs = ImageTextPairs([ImageTextSample(solid(1), ("cat \ud83d",), "tiny/half"), *tiny_samples(5)], reveal)
    assert pairs[0]["skipped"][0] == {"reason": "malformed record", "where": "tiny/half"}


def test_other_errors_of_a_transform_are_not_hidden() -> None:
    def wrong(image: Image.Image, caption: str, rng: np.random.Generator) -> dict:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        ImageTextPairs(tiny_samples(4), wrong)[0]


def test_all_broken_is_an_error_that_counts() -> None:
    with pytest.raises(ValueError, match="none of 5 samples drawn for index 1.*`max_attempts`.*5 samples"):
        ImageTextPairs([BROKEN["noise"]] * 3, reveal, max_attempts=5)[1]


def test_exif_orientation_is_applied() -> None:
    data = encoded(Image.new("RGB", (8, 6)), "JPEG", exif=exif_with(6))
    pairs = ImageTextPairs([ImageTextSample(data, ("a",))], lambda image, caption, rng: {"size": image.size})
    assert pairs[0]["size"] == (6, 8)


def loads_itself(image: object, caption: str, rng: np.random.Generator) -> dict:
    if caption == "a bug":
        raise ValueError("a bug")
    return {"given": type(image), **reveal(load_image(image), caption, rng)}


def test_a_transform_may_load_images_itself() -> None:
    example = ImageTextPairs(tiny_samples(3), loads_itself, images="source")[2]
    assert (example["given"], example["number"]) == (bytes, 2)
    assert issubclass(ImageTextPairs(tiny_samples(3), loads_itself)[2]["given"], Image.Image)


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_are_skipped_where_the_transform_loads_them(kind: str) -> None:
    record = ImageTextPairs([BROKEN[kind], *tiny_samples(9)], loads_itself, images="source")[0]["skipped"][0]
    assert record == {"reason": REASONS[kind], "where": BROKEN[kind].where}


def test_other_errors_are_not_taken_for_broken_images() -> None:
    with pytest.raises(ValueError, match="a bug"):
        ImageTextPairs([ImageTextSample(solid(1), ("a bug",))], loads_itself, images="source")[0]


def test_refused() -> None:
    pairs = ImageTextPairs(tiny_samples(2), reveal)
    with pytest.raises(IndexError, match="`index`"):
        pairs[2]
    with pytest.raises(ValueError, match="`epoch`"):
        pairs.set_epoch(-1)
    with pytest.raises(ValueError, match="`samples` is empty"):
        ImageTextPairs([], reveal)
    with pytest.raises(ValueError, match="`images` must be one of"):
        ImageTextPairs(tiny_samples(1), reveal, images="path")
    with pytest.raises(ValueError, match="`max_attempts`"):
        ImageTextPairs(tiny_samples(1), reveal, max_attempts=0)
    with pytest.raises(ValueError, match="`image`.*must be a path.*int"):
        ImageTextPairs([ImageTextSample(3, ("a",))], reveal)[0]
