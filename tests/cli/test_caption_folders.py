"""`blip2 caption` of folders: which files, in what order, read ahead while the model works, stopped by Ctrl-C."""

import json
import threading
from pathlib import Path

import pytest

from blip2_hf import Blip2ForConditionalGeneration, image_loading
from blip2_hf.cli.caption import default_workers
from tiny_checkpoints import PHOTOS

FAST = ("--num-beams", "1", "--max-new-tokens", "4", "--min-new-tokens", "0")
PATIENCE = 60  # seconds after which a test fails instead of waiting for ever


@pytest.fixture
def folder(photos, tmp_path) -> Path:
    """Three photos in a folder and one below it, beside what is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for where, name in (("c.jpg", 0), ("a.JPG", 1), ("more/b.jpeg", 2), (".hidden/d.jpg", 0), (".e.jpg", 0)):
        (folder / where).write_bytes(Path(photos[PHOTOS[name]]).read_bytes())
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("workers", ["0", "2"])
def test_files_are_those_of_an_index_in_its_order(blip2, checkpoint, folder, broken, workers) -> None:
    expected = [str(folder / name) for name in ("a.JPG", "c.jpg", "more/b.jpeg")]
    options = ["--model", checkpoint("opt"), *FAST, "--batch-size", "2"]
    named = blip2("caption", *expected, *options)
    done = blip2("caption", folder, *options, "--workers", workers)
    assert (done.code, done.err, done.out) == (0, [], named.out)
    (folder / "b.png").write_bytes(Path(broken).read_bytes())
    done = blip2("caption", folder, broken, *options, "--workers", workers, "--json")
    assert done.code == 2 and [json.loads(line)["image"] for line in done.out] == expected
    assert ["b.png" in line or "broken.jpg" in line for line in done.err] == [True, True]


def test_a_folder_of_one_file_names_it(blip2, checkpoint, folder) -> None:
    (line,) = blip2("caption", folder / "more", "--model", checkpoint("opt"), *FAST).out
    assert line.startswith(f"{folder / 'more' / 'b.jpeg'}: ")


def test_a_folder_without_images(blip2, checkpoint, photos, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    done = blip2("caption", tmp_path / "empty", "--model", "nobody/nothing")
    assert (done.code, done.out) == (2, []) and len(done.err) == 1 and "no images in the folder" in done.err[0]
    done = blip2("caption", tmp_path / "empty", photos["coffee"], "--model", checkpoint("opt"), *FAST)
    assert (done.code, len(done.out), len(done.err)) == (2, 1, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_read_while_the_model_works(blip2, checkpoint, folder, monkeypatch, workers) -> None:
    """Of three images the model waits, in its second batch, until the third is read; without workers it never is."""
    last, calls, seen = threading.Event(), [], []
    load, generate = image_loading.load_image, Blip2ForConditionalGeneration.generate

    def loading(path, **options):
        image = load(path, **options)
        if str(path).endswith("b.jpeg"):
            last.set()
        return image

    def generating(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            seen.append(last.wait(PATIENCE if workers else 0))
        return generate(*args, **options)

    monkeypatch.setattr(image_loading, "load_image", loading)
    monkeypatch.setattr(Blip2ForConditionalGeneration, "generate", generating)
    options = ["--model", checkpoint("opt"), *FAST, "--batch-size", "1", "--workers", workers]
    assert len(blip2("caption", folder, *options).out) == 3
    assert seen == [workers > 0]


def test_ctrl_c_stops_the_threads(blip2, checkpoint, folder, monkeypatch) -> None:
    calls, generate = [], Blip2ForConditionalGeneration.generate

    def generating(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr(Blip2ForConditionalGeneration, "generate", generating)
    options = ["--model", checkpoint("opt"), *FAST, "--batch-size", "1", "--workers", "2"]
    done = blip2("caption", folder, *options)
    assert done.code == 130 and len(done.out) == 1 and done.err == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


def test_workers(blip2) -> None:
    assert default_workers("cpu") == 1 <= default_workers("cuda") <= 8
    for value in ("-1", "x"):
        done = blip2("caption", "a.png", "--workers", value)
        assert done.code == 2 and "--workers" in done.err[-1]
