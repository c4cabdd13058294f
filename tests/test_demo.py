"""`make demo`: what it draws, asks and says, and that its report holds all of it. What the shipped models say is tested
in test_shipped.py; here the weights are random."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.utils import logging

from blip2_hf.data.shapes.grammar import check_caption
from blip2_hf.data.shapes.scenes import HELD_OUT
from example_scripts import EXAMPLES, example

SCENES = 2


@pytest.fixture(scope="module")
def monkeypatch_module():
    shown = logging.is_progress_bar_enabled()
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    if shown:  # the demo hides them
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def demo(monkeypatch_module):
    return example("demo", monkeypatch_module)


@pytest.fixture(scope="module")
def models(demo, tmp_path_factory) -> list[str]:
    """Options that name random models of little size."""
    import random_checkpoint as random

    folder = tmp_path_factory.mktemp("models")
    random.save_generation_checkpoint(folder / "caption")
    random.save_generation_checkpoint(folder / "answer", family="t5")
    random.save_retrieval_checkpoint(folder / "match")
    return [part for name in ("caption", "answer", "match") for part in (f"--{name}-model", str(folder / name))]


def run(demo, output: Path, *arguments: object) -> int:
    return demo.main([str(argument) for argument in (*arguments, "--output", output)])


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects texts and the addresses of pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.words, self.pictures = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes) -> None:
        self.pictures += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)


def test_scenes(demo, models, tmp_path, capsys) -> None:
    from demo_report.subjects import fresh_subjects

    assert run(demo, tmp_path, "--scenes", SCENES, "--seed", 3, *models) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    words = re.sub(r"\s+", " ", " ".join(page.words))
    subjects = fresh_subjects(SCENES, 3)
    for subject in subjects:
        for shown in (subject.title, subject.caption, *(question for question, _ in subject.questions)):
            assert shown in words
        for question, _ in subject.questions:
            assert question in printed
    maps = sum(8 + len(subject.phrases) for subject in subjects)
    assert len(page.pictures) == SCENES + maps + 2 * SCENES  # scenes, maps, and twice above the grid
    assert all(address.startswith("data:image/") for address in page.pictures)
    assert "http" not in text and "@media (prefers-color-scheme: dark)" in text
    assert "--seed 3" in words and "--seed 3" in printed
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width == 1920 and picture.height > 1500
        assert len(set(np.asarray(picture)[-40:].reshape(-1, 3)[:, 0].tolist())) < 120  # cut off below the last line


def test_scenes_are_new_for_each_seed_and_have_one_to_five_things(demo) -> None:
    from demo_report.subjects import fresh_subjects

    subjects = fresh_subjects(5, 3)
    assert subjects[:2] == fresh_subjects(2, 3)
    assert all(one.scene != other.scene for one, other in zip(subjects, fresh_subjects(5, 4), strict=True))
    assert [len(subject.scene.things) for subject in subjects] == [1, 2, 3, 4, 5]
    unseen = [any(thing.combination in HELD_OUT for thing in subject.scene.things) for subject in subjects]
    assert unseen == [bool(subject.note) for subject in subjects] == [False, False, True, False, False]
    for subject in subjects:
        assert subject.image.size == (96, 96) and subject.shown.size == (384, 384)
        assert check_caption(subject.caption, subject.scene).true
        assert len(subject.questions) == 4 and all(answer for _, answer in subject.questions)


def test_own_pictures(demo, models, tmp_path, capsys) -> None:
    files = [tmp_path / "wide.png", tmp_path / "grey.jpg"]
    Image.new("RGB", (200, 90), (200, 30, 30)).save(files[0])
    Image.new("L", (64, 64), 90).save(files[1])
    question = "is <this> red?"
    assert run(demo, tmp_path / "out", "--images", *files, "--questions", question, *models) == 0
    printed = capsys.readouterr().out
    assert "wide.png" in printed and printed.count(question) == 2
    assert "WRONG" not in printed and "right" not in printed  # nobody knows
    words = " ".join(Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).words)
    assert words.count(question) == 2 and "your pictures" in words

    (tmp_path / "broken.png").write_bytes(b"nothing")
    assert run(demo, tmp_path / "none", "--images", tmp_path / "broken.png", *models) == 2
    assert "broken.png" in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.mark.parametrize("arguments", [["--scenes", "0"], ["--scenes", "9"], ["--questions", "what?"]])
def test_wrong_arguments(demo, arguments, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_what_is_counted(demo) -> None:
    from demo_report.report import Report
    from demo_report.results import Asked, Described, Models, Ranking
    from demo_report.subjects import fresh_subjects

    subjects = fresh_subjects(2, 0)
    answers = [("red", 0.9), ("pink", 0.1)]
    asked = (Asked("a?", tuple(answers), "red"), Asked("b?", tuple(answers), "blue"))
    map_ = np.zeros((1, 2, 2), np.float32)
    results = [
        Described(subject, "a circle", number == 0, asked, (4,), map_, map_[:0])
        for number, subject in enumerate(subjects)
    ]
    cosines, probabilities = np.array([[0.2, 0.3], [0.1, 0.4]]), np.eye(2)
    report = Report(results, Ranking(("x", "y"), cosines, probabilities), Models("a", "a", "b"), True, "make", 3.4)
    assert dict((label, number) for number, label in report.facts) == {
        "captions wholly true": "1 of 2",
        "answers right": "2 of 4",
        "pictures found by ITC": "1 of 2",
        "pictures found by ITM": "2 of 2",
        "for all of it, on this machine": "3 s",
    }
    assert str(report.models) == "a · b"


@pytest.mark.parametrize(
    ("probability", "text"), [(1.0, "100 %"), (0.999, "> 99 %"), (0.5, "50 %"), (0.004, "< 1 %"), (0.0, "< 1 %")]
)
def test_percent(demo, probability, text) -> None:
    from demo_report.report import percent

    assert percent(probability) == text


def test_queries_that_are_shown_look_at_different_places(demo) -> None:
    from demo_report.results import SHOWN_QUERIES, _different

    maps = np.full((2, 12, 3, 4), 0.01)
    for query in range(1, 8):  # the others look everywhere alike
        maps[:, query, query % 3, query // 3] = 1 + 0.1 * query
    assert _different(maps) == (0, 1, 2, 3, 4, 5, 6, 7) and len(_different(maps)) == SHOWN_QUERIES
    assert len(_different(maps[:, :3])) == 3


def test_a_map_is_bright_where_it_is_high(demo) -> None:
    from demo_report.heat import heat_overlay

    values = np.zeros((4, 4), np.float32)
    values[1, 2] = 0.3
    picture = Image.new("RGB", (32, 32), (120, 120, 110))
    light = np.asarray(heat_overlay(picture, values, 64).convert("L"), np.int32)
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert 16 <= row < 32 and 32 <= column < 48
    assert light[24, 40] > 1.5 * light[56, 8]
    assert len(np.unique(heat_overlay(picture, np.ones((4, 4), np.float32), 8))) <= 3  # nothing stands out


def test_makefile_runs_it() -> None:
    assert "examples/demo.py" in (EXAMPLES.parent / "Makefile").read_text()
