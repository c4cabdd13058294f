from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from blip2_hf.data.samples import ImageTextSample, as_captions, one_sample_per_caption, stable_id


def test_stable_id_never_changes() -> None:
    assert stable_id("coco/139") == 8898966022315629383
    assert stable_id("flickr/139") != stable_id("coco/139")


@given(st.sets(st.text(max_size=20), min_size=2, max_size=50))
def test_ids_fit_int64_and_differ(names: set[str]) -> None:
    ids = {stable_id(name) for name in names}
    assert len(ids) == len(names)
    assert all(0 <= number < 2**63 for number in ids)


def test_stable_id_of_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="`name` must be a str, got int"):
        stable_id(139)


def test_names_that_are_not_utf8_have_ids() -> None:
    names = [b"caf\xe9".decode("utf-8", "surrogateescape"), b"caf\xe8".decode("utf-8", "surrogateescape"), "\ud800"]
    assert len({stable_id(name) for name in names}) == 3


def test_where_names_the_path_first() -> None:
    assert ImageTextSample(Path("a/b.jpg"), ("x",), "s/1", "line 3").where == "a/b.jpg"
    assert ImageTextSample(b"", ("x",), "s/1", "line 3").where == "line 3"
    assert ImageTextSample(b"", ("x",), "s/1").where == "s/1"
    assert ImageTextSample(b"", ("x",)).where


def test_one_sample_per_caption() -> None:
    split = one_sample_per_caption([ImageTextSample("a", ("x", "y"), "s/a"), ImageTextSample("b", (), "s/b")])
    assert [(s.image, s.captions, s.image_id) for s in split] == [("a", ("x",), "s/a"), ("a", ("y",), "s/a")]


def test_one_sample_per_caption_keeps_malformed_records() -> None:
    record = {"reason": "malformed record", "where": "row 1"}
    split = one_sample_per_caption([record, ImageTextSample("a", ("x",), "s/a")])
    assert split == [record, ImageTextSample("a", ("x",), "s/a")]


@pytest.mark.parametrize(
    ("value", "captions"),
    [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b")), ([], ()), (["a", None], ("a",)), ([None], ())],
)
def test_captions_of_a_field(value: object, captions: tuple) -> None:
    assert as_captions(value, "here") == captions


@pytest.mark.parametrize("value", [1, {"raw": "a"}, ["a", 1], [["a"]]])
def test_other_captions_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="line 3 must be a string or a list of strings"):
        as_captions(value, "line 3")
