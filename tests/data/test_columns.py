from pathlib import Path

import datasets
import pytest

from blip2_hf.data.columns import DatasetSamples, parquet_samples
from blip2_hf.data.pairs import ImageTextPairs
from blip2_hf.data.samples import one_sample_per_caption
from blip2_hf.data.skipped import SkippedSamples
from tiny_images import encoded
from tiny_sets import reveal, solid


def numbers(samples: DatasetSamples) -> list[int]:
    return [ImageTextPairs(samples, reveal, max_attempts=1)[n]["number"] for n in range(len(samples))]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [str(tmp_path / f"{n}.png") for n in range(3)]
    for number, path in enumerate(paths):
        solid(number).save(path)
    return paths


def table(images: list, captions: list | None = None, **more: list) -> datasets.Dataset:
    captions = captions or [f"caption {n}" for n in range(len(images))]
    return datasets.Dataset.from_dict({"image": images, "caption": captions, **more})


def test_paths(files: list[str]) -> None:
    samples = DatasetSamples(table(files, unused=[1, 2, 3]), name="set")
    assert numbers(samples) == [0, 1, 2]
    assert samples[-1].image_id == "set/2"
    assert samples[1].captions == ("caption 1",)


def test_relative_paths(files: list[str], tmp_path: Path) -> None:
    assert numbers(DatasetSamples(table(["0.png", "1.png"]), image_folder=tmp_path, name="set")) == [0, 1]


def test_bytes_structs_and_image_features(files: list[str]) -> None:
    data = [encoded(solid(n)) for n in range(3)]
    assert numbers(DatasetSamples(table(data), name="set")) == [0, 1, 2]
    structs = [{"bytes": data[0], "path": None}, {"bytes": None, "path": files[1]}]
    assert numbers(DatasetSamples(table(structs), name="set")) == [0, 1]
    assert numbers(DatasetSamples(table(files).cast_column("image", datasets.Image()), name="set")) == [0, 1, 2]


def test_a_broken_image_of_an_image_feature_is_skipped(files: list[str]) -> None:
    structs = [{"bytes": b"broken", "path": None}, {"bytes": None, "path": files[1]}, {"bytes": None, "path": None}]
    dataset = table(structs).cast_column("image", datasets.Image())
    pairs = ImageTextPairs(DatasetSamples(dataset, name="set"), reveal)
    assert pairs[0]["skipped"][0] == {"reason": "unreadable image", "where": "set, row 0"}
    assert pairs[2]["skipped"][0] == {"reason": "record without image", "where": "set, row 2"}


def test_lists_and_missing_captions_and_ids(files: list[str]) -> None:
    samples = DatasetSamples(
        table(files[:2], [["a", "b"], None], key=["x", "y"]), id_column="key", caption_column="caption", name="set"
    )
    assert [sample.captions for sample in samples] == [("a", "b"), ()]
    assert [sample.image_id for sample in samples] == ["set/x", "set/y"]


ROWS = {
    "id_column": "set, row 1: column 'key' must be an integer or a string, got None",
    "caption_column": "set, row 1: column 'caption' must be a string or a list of strings, got 5",
    "image_column": "set, row 1: column 'image' must be an image, a struct of 'bytes' and 'path', bytes or a "
    "path, got int",
}


@pytest.mark.parametrize("column", ROWS)
@pytest.mark.parametrize("per_caption", [False, True])
def test_a_malformed_row_is_skipped_and_named(files: list[str], column: str, per_caption: bool) -> None:
    rows = [{"image": path, "caption": f"caption {n}", "key": n} for n, path in enumerate(files)]
    rows[1][{"id_column": "key", "caption_column": "caption", "image_column": "image"}[column]] = (
        None if column == "id_column" else 5
    )
    samples = DatasetSamples(table(files, key=["0", "1", "2"]), id_column="key", name="set")
    samples.dataset = rows  # an Arrow column has one type, so that only a null can be in one row of a real table
    pairs = ImageTextPairs(one_sample_per_caption(samples) if per_caption else samples, reveal)
    examples = [pairs[n] for n in range(3)]
    assert [examples[n]["number"] for n in (0, 2)] == [0, 2]
    assert examples[1]["skipped"][0] == {"reason": "malformed record", "where": ROWS[column]}
    assert "skipped" not in examples[0]


def test_nulls_in_parquet_end_no_run(files: list[str], tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    table(files, [["a", None], [None], ["c"]], key=["x", "y", None]).to_parquet(path)
    samples = parquet_samples(path, id_column="key", name="set")
    pairs = ImageTextPairs(samples, reveal)
    seen = SkippedSamples()
    for epoch in range(5):
        for index in range(3):
            example = pairs.example(index, epoch)
            assert (example["number"], example["caption"]) == (0, "a")
            seen.add(record for record in example.get("skipped", ()) if index == 1)
    assert pairs[1]["skipped"][0]["reason"] == "blank caption"
    assert pairs[2]["skipped"][0] == {
        "reason": "malformed record",
        "where": "set, row 2: column 'key' must be an integer or a string, got None",
    }
    assert seen.counts["blank caption"] >= 5


def test_only_malformed_rows_are_an_error_that_names_the_column(files: list[str]) -> None:
    pairs = ImageTextPairs(DatasetSamples(table(files, [5, 6, 7]), name="set"), reveal, max_attempts=3)
    with pytest.raises(
        ValueError, match="(?s)none of 3 samples.*malformed record: 3.*column 'caption' must be a string"
    ):
        pairs[0]


def test_parquet(files: list[str], tmp_path: Path) -> None:
    paths = []
    for number in range(2):
        struct = {"bytes": encoded(solid(number)), "path": None}
        paths.append(tmp_path / f"part-{number}.parquet")
        table([struct], [[f"a {number}", "b"]]).to_parquet(paths[-1])
    samples = parquet_samples(paths, name="laion")
    assert numbers(samples) == [0, 1]
    assert samples[1].captions == ("a 1", "b")
    with pytest.raises(ValueError, match="`caption_column` 'text' is not a column.*'caption'"):
        parquet_samples(paths[0], caption_column="text", name="laion")


def test_refused(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`dataset` must be a datasets.Dataset.*DatasetDict"):
        DatasetSamples(datasets.DatasetDict(train=table(files)), name="set")
    with pytest.raises(ValueError, match="`image_column` 'photo' is not a column"):
        DatasetSamples(table(files), image_column="photo", name="set")
    with pytest.raises(ValueError, match="`name`"):
        DatasetSamples(table(files), name="")
    with pytest.raises(ValueError, match="`files` must be an existing file"):
        parquet_samples(tmp_path / "none.parquet", name="set")
    with pytest.raises(ValueError, match="`files` is empty"):
        parquet_samples([], name="set")
    with pytest.raises(IndexError):
        DatasetSamples(table(files), name="set")[3]
