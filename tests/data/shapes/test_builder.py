"""The world as a `datasets.Dataset`."""

from pathlib import Path

import numpy as np
import pytest

from blip2_hf.data import DatasetSamples
from blip2_hf.data.shapes.builder import shapes_dataset
from blip2_hf.data.shapes.drawing import picture
from blip2_hf.data.shapes.scenes import Scene, Thing
from blip2_hf.data.shapes.splits import example


def test_rows_are_the_examples_of_the_files(tmp_path: Path) -> None:
    dataset = shapes_dataset("val", 3, 5, cache_dir=tmp_path)
    assert len(dataset) == 3
    for number, row in enumerate(dataset):
        one = example("val", number, 5)
        assert np.array_equal(np.asarray(row["image"]), picture(one.scene))
        assert Scene(tuple(Thing(**thing) for thing in row["things"]), row["background"]) == one.scene
        assert (row["image_id"], tuple(row["captions"])) == (one.image_id, one.captions)
        asked = list(zip(row["questions"], row["answers"], row["kinds"], strict=True))
        assert asked == [(q.question, q.answer, q.kind) for q in one.questions]
    samples = DatasetSamples(dataset, caption_column="captions", id_column="image_id", name="shapes")
    assert samples[2].captions == example("val", 2, 5).captions
    assert samples[2].image_id == f"shapes/{example('val', 2, 5).image_id}"


def test_seed_and_code_are_part_of_what_is_cached(tmp_path: Path, monkeypatch) -> None:
    first = shapes_dataset("val", 1, 5, cache_dir=tmp_path)
    assert shapes_dataset("val", 1, 5, cache_dir=tmp_path)._fingerprint == first._fingerprint
    assert shapes_dataset("val", 1, 6, cache_dir=tmp_path)["image_id"][:] == first["image_id"][:]
    assert shapes_dataset("val", 1, 6, cache_dir=tmp_path)["background"][:] != first["background"][:]
    monkeypatch.setattr("blip2_hf.data.shapes.files.world_digest", lambda seed: "other code")
    assert shapes_dataset("val", 1, 5, cache_dir=tmp_path).cache_files != first.cache_files


@pytest.mark.parametrize(("split", "count", "name"), [("dev", 1, "split"), ("val", 0, "count")])
def test_bad_arguments_are_refused(split: str, count: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        shapes_dataset(split, count)
