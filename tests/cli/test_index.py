"""`blip2 index`."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from blip2_hf.evaluation.index_file import read_index
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval


@pytest.fixture
def folder(tmp_path, photos) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("chelsea", "coffee"):
        shutil.copy(photos[name], folder)
    return folder


def names(path: Path) -> list[str]:
    return [entry.path for entry in read_index(path).entries]


def test_make_add_and_remove(blip2, checkpoint, photos, folder, tmp_path) -> None:
    path = tmp_path / "photos.index"
    model = ("--model", checkpoint("retrieval"))
    done = blip2("index", folder, "-o", path, *model)
    assert (done.code, done.out, done.err) == (0, [f"{path}: 2 images (2 added)"], [])
    assert names(path) == ["photos/chelsea.png", "photos/coffee.png"]
    assert read_index(path).model.name == checkpoint("retrieval")
    again = blip2("index", folder, "-o", path)  # with the model that it was made with
    assert (again.code, again.err) == (done.code, done.err)

    done = blip2("index", photos["astronaut"], "-o", path, "--add", "--json", *model)
    assert done.code == 0
    expected = {"index": str(path), "images": 3, "added": 1, "updated": 0, "removed": 0, "unchanged": 0, "skipped": []}
    assert json.loads(done.out[0]) == expected
    assert names(path)[2] == photos["astronaut"]  # not below the index's folder

    assert blip2("index", folder, "-o", path, *model).out == [f"{path}: 2 images (1 removed, 2 unchanged)"]
    done = blip2("index", folder / "coffee.png", "-o", path, "--remove")  # needs no model
    assert (done.code, done.out) == (0, [f"{path}: 1 images (1 removed, 1 unchanged)"])
    assert names(path) == ["photos/chelsea.png"]
    done = blip2("index", folder / "coffee.png", "-o", path, "--remove")
    assert (done.code, done.out, len(done.err)) == (2, [], 1) and "has no image" in done.err[0]


def test_broken_image(blip2, checkpoint, folder, tmp_path) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture")
    path = tmp_path / "photos.index"
    done = blip2("index", folder, "-o", path, "--model", checkpoint("retrieval"))
    assert (done.code, done.out) == (2, [f"{path}: 2 images (2 added)"])
    assert len(done.err) == 1 and f"cannot load image {str(folder / 'broken.jpg')!r}: not an image" in done.err[0]
    done = blip2("index", folder / "broken.jpg", "-o", tmp_path / "other", "--model", checkpoint("retrieval"))
    assert (done.code, len(done.err)) == (2, 1) and "none of the 1 images can be read, the first" in done.err[0]
    assert not (tmp_path / "other").exists()


def test_refused(blip2, checkpoint, folder, tmp_path) -> None:
    """Before anything is written, and mostly before a model is loaded."""
    path = tmp_path / "photos.index"
    path.write_text("my only copy")
    for arguments, message in (
        ((folder, "-o", path), "is damaged, or no index of photos"),
        ((folder, "-o", path, "--remove"), "is damaged, or no index of photos"),
        ((folder, "-o", tmp_path / "none.index", "--remove"), "there is no index"),
        ((folder, "-o", tmp_path / "none" / "x"), "of the index does not exist"),
        ((tmp_path / "none", "-o", tmp_path / "x"), "there is no file or folder"),
        ((Path(checkpoint("retrieval")), "-o", tmp_path / "x"), "there are no images in"),
    ):
        done = blip2("index", *arguments, "--model", tmp_path / "no model")
        assert (done.code, done.out, len(done.err)) == (2, [], 1) and message in done.err[0], done.err
    assert path.read_text() == "my only copy"
    assert blip2("index", folder, "-o", path, "--add", "--remove").code == 2


def test_another_model(blip2, checkpoint, folder, tmp_path) -> None:
    path, other = tmp_path / "photos.index", tmp_path / "other"
    assert blip2("index", folder, "-o", path, "--model", checkpoint("retrieval")).code == 0
    shutil.copytree(checkpoint("retrieval"), other)
    model = Blip2ForImageTextRetrieval.from_pretrained(other)
    with torch.no_grad():
        model.vision_projection.weight.mul_(1.1)
    model.save_pretrained(other)
    before = path.read_bytes()
    done = blip2("index", folder, "-o", path, "--add", "--model", other)
    assert (done.code, len(done.err)) == (2, 1) and "is from another model than the one loaded" in done.err[0]
    assert path.read_bytes() == before


def test_a_stopped_run_continues(blip2, checkpoint, folder, tmp_path, monkeypatch) -> None:
    """What was encoded when Ctrl-C was pressed is in the index."""
    path, arguments = tmp_path / "photos.index", ("--model", checkpoint("retrieval"), "--batch-size", "1")
    original, calls = Blip2ForImageTextRetrieval.get_image_features, []

    def stopped(self, *args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Blip2ForImageTextRetrieval, "get_image_features", stopped)
        assert blip2("index", folder, "-o", path, *arguments).code == 130
    assert names(path) == ["photos/chelsea.png"]
    assert blip2("index", folder, "-o", path, *arguments).out == [f"{path}: 2 images (1 added, 1 unchanged)"]
