"""examples/shapes: what is measured, and tables, figures and cards of it, on made-up folders of runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from blip2_hf.data.shapes.files import write_world
from blip2_hf.data.shapes.grammar import read_caption
from blip2_hf.data.shapes.scenes import Scene, Thing
from blip2_hf.evaluation import vqa_benchmark
from example_scripts import EXAMPLES

DOCUMENT = "# Shapes\n<!-- results:{0} -->\nold\n<!-- /results:{0} -->\nafter\n"


def write(folder: Path, name: str, content: object) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def recalls(value: float) -> dict:
    return {f"{side}_r{k}": value for side in ("txt", "img") for k in (1, 5, 10)}


@pytest.fixture
def run(tmp_path) -> Path:
    """Two seeds of some findings, retrieval of one model, one oracle; nothing else."""
    folder = tmp_path / "run"
    write(folder, "world/world.json", {"sizes": {"train": 30000, "test": 1000}})
    write(folder, "eval/oracle/test.json", {"txt_r1": 0.91, "img_r1": 0.72})
    metrics = {"itc": recalls(0.5), "reranked": recalls(0.625)}
    write(folder, "eval/retrieval/test/retrieval/report.json", {"metrics": metrics})
    for seed, found in ((0, 0.4), (1, 0.5)):
        for model, less in (("stage1", 0), ("stage1-no-itg", 0.1)):
            metrics = {"itc": recalls(found - less), "reranked": recalls(found)}
            write(folder, f"eval/retrieval/test/findings/{seed}/{model}/report.json", {"metrics": metrics})
        for model, less in (("stage2", 0), ("stage2-without-stage1", 0.2), ("stage2-t5", 0)):
            points = [{"step": s, "loss": 1.0, "answered": found - less, "true": found} for s in (250, 500)]
            write(folder, f"eval/curve/findings/{seed}/{model}.json", {"points": points})
    write(folder, "eval/vqa/test/findings/1/stage2/report.json", {"metrics": {"overall": 0.333}})
    return folder


def test_tables(script, run) -> None:
    tables, run = script("result_tables"), script("measured").Measured(run)
    found = {name: make(run) for name, make in tables.TABLES.items()}
    rows = found["retrieval"].splitlines()
    assert "| unseen scenes (1,000): fine-tuned, re-ranked by ITM | 62.5 |" in found["retrieval"]
    assert "| unseen scenes (1,000): oracle | 91.0 | – | – | 72.0 | – | – |" in rows
    assert "| unseen scenes (1,000): stage 1, ITC | not measured |" in found["retrieval"]
    assert found["finding-itg"].splitlines()[2:] == [
        "| ITC + ITM | 35.0 ± 7.1 | 35.0 ± 7.1 | 45.0 ± 7.1 | 45.0 ± 7.1 |",
        "| ITC + ITM + ITG | 45.0 ± 7.1 | 45.0 ± 7.1 | 45.0 ± 7.1 | 45.0 ± 7.1 |",
    ]
    assert "| OPT, with stage 1 | 33.3 (1 of 2 seeds) | not measured | not measured |" in found["finding-stage1"]
    write(run.folder, "eval/captioning/test/stage2-t5/truth.json", {"true": 0.93, "statements_per_caption": 3.25})
    text = tables.captions(run)
    assert "| unseen scenes (1,000): stage 2, T5 | 93.0 | 3.2 |" in text
    assert text.endswith("Not measured: CIDEr; BLEU@4; METEOR; ROUGE-L; things mentioned, %; different, %.")
    assert not run.limited
    empty = script("measured").Measured(run.folder / "nothing")
    for name, make in tables.TABLES.items():
        text = make(empty)
        assert "not measured" in text, name
        cells = [cell.strip() for line in text.splitlines()[2:] for cell in line.strip("|").split("|")[1:]]
        assert not any(cell.replace(".", "").isdecimal() for cell in cells if cell), name  # no number from nowhere


def test_documents_are_filled(script, run, tmp_path, capsys, monkeypatch) -> None:
    results = script("results")
    document = tmp_path / "docs" / "shapes.md"
    document.parent.mkdir()
    document.write_text(DOCUMENT.format("finding-itg") + DOCUMENT.format("figure-stage1"))
    options = ["--run-dir", str(run), "--output-dir", str(tmp_path / "results"), "--docs", str(document)]
    for _ in range(2):  # the second time there is nothing to change
        results.main(options)
        text = document.read_text()
        assert "old" not in text and "| ITC + ITM | 35.0 ± 7.1 |" in text and text.count("after") == 2
        assert "(figures/stage1.png)" in text and text.count("<!--") == 4
    with Image.open(document.parent / "figures" / "stage1.png") as figure:
        assert figure.width > 1000
        colours = np.unique(np.array(figure.convert("RGB")).reshape(-1, 3), axis=0)
    figures = script("result_figures")
    for colour, drawn in ((figures.BLUE, True), (figures.ORANGE, True), (figures.PURPLE, False)):
        assert (np.abs(colours.astype(int) - colour).max(axis=1) < 12).any() == drawn
    assert (tmp_path / "results" / "queries.png").is_file() and "numbers not measured" in capsys.readouterr().out
    document.write_text(DOCUMENT.format("finding-stage7"))
    with pytest.raises(ValueError, match="results:finding-stage7 must be one of"):
        results.main(options)
    document.write_text("<!-- results:kinds -->\n<!-- /results:times -->")
    with pytest.raises(ValueError, match="has no other half"):
        results.main(options)
    metrics = {"itc": recalls(0.0), "reranked": recalls(0.0)}
    write(run, "eval/retrieval/test/stage1/report-first-8.json", {"metrics": metrics})
    with pytest.raises(ValueError, match="whole evaluations.*retrieval/test/stage1"):
        results.main(options)
    monkeypatch.setattr(results, "FIGURES", {})
    results.main(options[:4])
    assert (tmp_path / "results" / "tables.md").read_text().startswith("Of the first few items only, so no results")


def test_rows_that_hold_nothing_are_named_below(script) -> None:
    shortened = script("results").shortened
    head, full = "|  | a | b |\n| --- | ---: | ---: |", "| one | 1.0 | not measured |"
    empty = "| two | not measured | – |\n| three | not measured | not measured |"
    assert shortened(f"{head}\n{full}\n{empty}") == f"{head}\n{full}\n\nNot measured: two; three."
    assert shortened(f"{head}\n{full}") == f"{head}\n{full}"
    assert shortened(f"{head}\n{empty}") == "(not measured)"


def test_the_documentation_has_places_for_all_results(script) -> None:
    results, root = script("results"), EXAMPLES.parent
    found = [name for name, *_ in results.sections((root / "docs" / "shapes.md").read_text(encoding="utf-8"), "docs")]
    places = {*results.TABLES, *(f"figure-{name}" for name in results.FIGURES)}
    assert sorted(found) == sorted(places - {"summary"})
    assert [name for name, *_ in results.sections((root / "README.md").read_text(encoding="utf-8"), "")] == ["summary"]


def test_a_card(script, run) -> None:
    """Numbers of the shipped files where they were measured; where the run came from, by the marks of its steps."""
    cards, measured = script("cards"), script("measured")
    folder = run / "shipped" / "blip2-tiny-opt"
    write(folder, "config.json", {"architectures": ["Blip2ForConditionalGeneration"]})
    tensors = {"vision_model.a": torch.zeros(3, 4, dtype=torch.float16), "query_tokens": torch.zeros(5)}
    save_file(tensors, folder / "model.safetensors")
    before = {"stage1": ["--vision", "towers/base"], "stage2-opt": ["--stage1", "runs/stage1"]}
    before |= {"captioning-opt": ["--model", "runs/stage2-opt"]}
    for name, options in before.items():
        task = name.split("-")[0]
        command = [f"run_{task}.py", "--recipe", f"examples/shapes/recipes/{task}.json", *options]
        write(run, f"done/{name}.json", {"command": command, "seconds": 60.0})
        log = [{"learning_rate": rate, "step": step} for step, rate in enumerate((0.0, 3e-4, 1e-5))]
        write(run, f"runs/{name}/trainer_state.json", {"global_step": 1500, "train_batch_size": 64, "log_history": log})
    metrics = {"overall": 0.5, "per_question_type": {"colour": 0.9, "count": 0.2, "size": 0.4, "shape": 0.7}}
    write(run, "eval/vqa/test/captioning-opt/report.json", {"metrics": metrics})
    cards.main(["--run-dir", str(run), "--shipped", str(run / "shipped")])
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n") and "license: apache-2.0" in text
    assert "| vision tower | F16 | 12 |" in text and "| Q-Former and heads | F32 | 5 |" in text
    lines = [
        line for line in text.splitlines() if line.startswith(("| stage1", "| stage2", "| captioning", "| towers"))
    ]
    assert [line.split(" | ")[0] for line in lines] == ["| towers/base", "| stage1", "| stage2-opt", "| captioning-opt"]
    assert lines[-1] == "| captioning-opt | run_captioning.py, captioning.json | 1,500 | 64 | 0.0003 |"
    assert "of the run, before it was stored" in text and "| questions answered, % | 50.0 |" in text
    assert "| captions whose every statement is true, % | not measured |" in text
    assert "count (20.0 %), size (40.0 %), shape (70.0 %)." in text and "30,000 generated scenes" in text
    write(run, "eval/vqa/test/shipped/blip2-tiny-opt/report.json", {"metrics": {"overall": 0.498}})
    cards.write_card(folder, measured.Measured(run), "captioning-opt")
    text = (folder / "README.md").read_text()
    assert "of these files" in text and "| questions answered, % | 49.8 |" in text


def thing(shape: str, colour: str, x: int) -> Thing:
    return Thing(shape, colour, "small", "plain", x, 40, 20)


@pytest.mark.parametrize(
    ("caption", "count"),
    [
        ("a circle", 1),
        ("two circles", 2),
        ("a circle and a red circle", 2),  # the first is then the blue one
        ("a red circle and a circle", 2),
        ("a red circle and a red circle", 1),
        ("the star is to the right of the red circle", 2),
        ("three objects, one of them red", 0),
        ("a heart", 0),
    ],
)
def test_how_many_things_a_caption_mentions(script, caption: str, count: int) -> None:
    scene = Scene((thing("circle", "red", 15), thing("circle", "blue", 45), thing("star", "green", 80)), 0)
    claims = read_caption(caption)
    assert claims is not None and script("eval_truth").mentioned(claims, scene) == count


def test_the_oracle(script, tmp_path) -> None:
    world = write_world(tmp_path / "world", sizes={"test": 12}, documents={"val": 2})
    output = tmp_path / "oracle.json"
    report = script("eval_oracle").main(["--world", str(world), "--output", str(output)])
    assert (report["scenes"], report["captions"]) == (12, 60) and json.loads(output.read_text()) == report
    assert 0.3 < report["img_r1"] <= report["txt_r1"] <= 1


def test_easy_vqa_as_files(script, tmp_path, monkeypatch) -> None:
    """Pictures, questions and sets as the package has them, read by our own readers."""
    pictures = {}
    for number in range(6):
        pictures[number] = str(tmp_path / f"{number}.png")
        Image.new("RGB", (8, 8), (number, 0, 0)).save(pictures[number])
    asked = [("what shape is it?", "circle"), ("is it red?", "no"), ("what color is it?", "teal")]
    rows = [(question, answer, number) for number in pictures for question, answer in asked]
    columns = tuple(list(column) for column in zip(*rows, strict=True))
    package = {"get_train_questions": columns, "get_test_questions": tuple(column[:6] for column in columns)}
    package |= {"get_train_image_paths": pictures, "get_test_image_paths": pictures}
    fake = SimpleNamespace(**{name: lambda value=value: value for name, value in package.items()}, __spec__=object())
    monkeypatch.setitem(sys.modules, "easy_vqa", fake)
    files, folder = script("easy_vqa_files"), tmp_path / "easy-vqa"
    monkeypatch.setattr(files, "VALIDATION", 2)
    files.main(["--output-dir", str(folder)])
    found = {}
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        paths = [folder / f"{name}_{split}.json" for name in ("questions", "annotations")]
        data = vqa_benchmark(*paths, folder / "images" / split, pattern=files.IMAGE_PATTERN)
        assert len(data.items) == count and all(Path(item.image).is_file() for item in data.items)
        found[split] = {item.image for item in data.items}
        assert {one["question_type"] for one in data.annotations} == {"shape", "yes/no", "colour"}
        assert json.loads((folder / "sets" / f"questions_{split}.json").read_text())[0]["source"] == "vqa_questions"
    assert not {Path(path).name for path in found["train"]} & {Path(path).name for path in found["val"]}
    with Image.open(min(found["val"])) as picture:
        assert picture.getpixel((0, 0)) == (4, 0, 0)  # the last two of six
    questions = script("eval_blind").read_questions(str(folder), "test")
    assert [one["answer"] for one in questions[:3]] == ["circle", "no", "teal"]
