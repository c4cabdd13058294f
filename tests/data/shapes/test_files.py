"""The world's files: read by the readers of COCO and VQAv2, the same whatever the way they came about."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2_hf.data import coco_captions, karpathy_captions, vqa_questions
from blip2_hf.data.shapes import files
from blip2_hf.data.shapes.drawing import picture
from blip2_hf.data.shapes.files import IMAGE_PATTERN, read_scenes, write_world
from blip2_hf.data.shapes.scenes import HELD_OUT
from blip2_hf.data.shapes.splits import CAPTIONS, QUESTIONS, example
from blip2_hf.data.training_sets import training_set
from blip2_hf.evaluation.benchmark_labels import caption_label, retrieval_label
from blip2_hf.evaluation.caption_benchmarks import coco_benchmark
from blip2_hf.evaluation.question_benchmarks import vqa_benchmark
from blip2_hf.evaluation.retrieval_data import retrieval_set

SIZES = {"train": 6, "val": 2, "test": 3, "combinations": 2}
DOCUMENTS = {"train": 5, "val": 2}
SEED = 7


def write(folder: Path, **changes) -> Path:
    return write_world(folder, **({"sizes": SIZES, "documents": DOCUMENTS, "seed": SEED} | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("shapes") / "world")


def test_pictures_are_those_of_the_scenes(world: Path) -> None:
    for number, (split, size) in enumerate(SIZES.items()):
        scenes = read_scenes(world / f"scenes_{split}.jsonl")
        assert list(scenes) == [number * 10_000_000 + 1 + index for index in range(size)]
        names = {path.name for path in (world / "images" / split).iterdir()}
        assert names == {IMAGE_PATTERN.format(image_id) for image_id in scenes}
        for image_id, scene in scenes.items():
            with Image.open(world / "images" / split / IMAGE_PATTERN.format(image_id)) as image:
                assert np.array_equal(np.asarray(image), picture(scene))


def test_captions_for_training_and_evaluation(world: Path) -> None:
    for split, size in SIZES.items():
        images, path = world / "images" / split, world / f"captions_{split}.json"
        samples = coco_captions(path, images, name="shapes")
        expected = [example(split, number, SEED) for number in range(size)]
        assert [sample.captions for sample in samples] == [one.captions for one in expected]
        assert [sample.image_id for sample in samples] == [f"shapes/{one.image_id}" for one in expected]
        assert all(len(sample.captions) == CAPTIONS and Path(sample.image).is_file() for sample in samples)
        karpathys = world / "dataset_shapes.json"
        again = karpathy_captions(karpathys, world / "images", splits=(split,), name="shapes")
        assert [(s.captions, s.image_id, Path(s.image)) for s in again] == [
            (s.captions, s.image_id, Path(s.image)) for s in samples
        ]
        whole, part = coco_benchmark(karpathys, world / "images", split=split), coco_benchmark(path, images)
        assert whole.references == part.references == {one.image_id: list(one.captions) for one in expected}
        assert (whole.name, whole.split) == (part.name, part.split) == ("shapes", split)


def test_retrieval(world: Path) -> None:
    path = world / "dataset_shapes.json"
    found = retrieval_set(path, world / "images", split="test")
    assert (len(found.images), len(found.texts), found.skipped) == (3, 3 * CAPTIONS, ())
    assert all(Path(image).is_file() for image in found.images)
    assert retrieval_label(path, None, None) == ("shapes", "test")
    own = world / "captions_test.json"
    assert caption_label(own, json.loads(own.read_text()), None) == ("shapes", "test")
    assert retrieval_set(own, world / "images" / "test").texts == found.texts


def test_questions_for_training_and_evaluation(world: Path) -> None:
    for split, size in SIZES.items():
        given = (world / f"questions_{split}.json", world / f"annotations_{split}.json", world / "images" / split)
        samples = vqa_questions(*given, pattern=IMAGE_PATTERN, name="shapes")
        asked = [(one.image_id, q) for one in (example(split, n, SEED) for n in range(size)) for q in one.questions]
        assert len(asked) == size * QUESTIONS
        assert [(s.image_id, s.question, s.answers, s.weights) for s in samples] == [
            (f"shapes/{image_id}", q.question, (q.answer,), (1.0,)) for image_id, q in asked
        ]
        assert all(Path(sample.image).is_file() for sample in samples)
        data = vqa_benchmark(*given, pattern=IMAGE_PATTERN)
        assert data.split == f"shapes-{split}"  # no split of VQAv2, so its numbers are not put beside ours
        assert [(item.text, Path(item.image).is_file()) for item in data.items] == [
            (q.question, True) for _, q in asked
        ]
        types = {"yes": "yes/no", "no": "yes/no"}
        for record, (_, question) in zip(data.annotations, asked, strict=True):
            default = "number" if question.kind == "count" else "other"
            assert record["question_type"] == question.kind
            assert record["answer_type"] == types.get(question.answer, default)
            assert Counter(answer["answer"] for answer in record["answers"]) == {question.answer: 10}


@pytest.mark.parametrize(("kind", "per_image"), [("captions", 1), ("questions", QUESTIONS)])
def test_sets_of_the_example_scripts(world: Path, kind: str, per_image: int) -> None:
    for split, size in SIZES.items():
        found = training_set(world / "sets" / f"{kind}_{split}.json", lambda image, *_, **__: {"size": image.size})
        assert len(found) == size * per_image
        assert found.samples[0].image_id == f"shapes/{example(split, 0, SEED).image_id}"
        assert Path(found.samples[-1].image).is_file()


def test_only_one_split_has_the_combinations_held_out(world: Path) -> None:
    for split in SIZES:
        for scene in read_scenes(world / f"scenes_{split}.jsonl").values():
            assert any(one.combination in HELD_OUT for one in scene.things) == (split == "combinations")


def test_a_document_is_a_line(world: Path) -> None:
    texts = {name: (world / f"corpus_{name}.txt").read_text().splitlines() for name in DOCUMENTS}
    assert {name: len(lines) for name, lines in texts.items()} == DOCUMENTS
    assert all(line.strip() for lines in texts.values() for line in lines)
    assert not set(texts["train"]) & set(texts["val"])


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])  # 2: each imports torch
def test_processes_and_parts_do_not_change_anything(
    world: Path, tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(files, "_CHUNK", 4)
    again = write(tmp_path / "again", processes=processes, progress=lambda done, total: calls.append((done, total)))
    assert contents(again) == contents(world)
    assert calls == [(4, 13), (6, 13), (8, 13), (11, 13), (13, 13)]


def test_another_seed_gives_another_world(world: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", seed=8)
    same = {name for name, data in contents(other).items() if contents(world).get(name) == data}
    assert {Path(name).parts[0] for name in same} == {"sets"}


def test_a_larger_split_begins_with_the_smaller_one(world: Path, tmp_path: Path) -> None:
    larger = write(tmp_path / "larger", sizes={"test": 5})
    small, large = (read_scenes(folder / "scenes_test.jsonl") for folder in (world, larger))
    assert list(large.items())[:3] == list(small.items())
    assert not (larger / "images" / "train").exists()


def test_an_interrupted_run_goes_on(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, progress=stop)
    kept = folder / "images" / "train" / IMAGE_PATTERN.format(3)
    before = kept.stat().st_mtime_ns
    assert not (folder / "dataset_shapes.json").exists()
    write(folder)
    assert contents(folder) == contents(world)
    assert kept.stat().st_mtime_ns == before


def test_a_finished_world_is_left_alone(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    (folder / "captions_test.json").unlink()  # would be written again
    write(folder)
    assert not (folder / "captions_test.json").exists()


@pytest.mark.parametrize("changes", [{"seed": 8}, {"sizes": {"val": 2}}, {"documents": {"val": 2}}])
def test_another_world_in_the_folder_is_refused(world: Path, changes: dict) -> None:
    with pytest.raises(ValueError, match=f"`folder`.*holds a world with {next(iter(changes))}"):
        write(world, **changes)


def test_a_world_of_other_code_is_refused(world: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "picture", lambda scene: np.zeros(1))
    with pytest.raises(ValueError, match="has changed"):
        write(world)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="`folder`"):
        write(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": {"dev": 3}},
        {"sizes": {}},
        {"sizes": {"val": 0}},
        {"sizes": {"val": True}},
        {"documents": {"test": 3}},
        {"processes": 0},
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}`"):
        write(tmp_path / "world", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line", ['{"image_id": 1, "background": 2}', '{"image_id": 1, "background": 2, "things": [{"shape": "star"}]}']
)
def test_a_line_that_is_no_scene_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "scenes.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match="line 1 is not a scene"):
        read_scenes(path)


def test_unknown_splits_and_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="`split`"):
        example("dev", 0, 0)
    with pytest.raises(ValueError, match="`number`"):
        example("val", -1, 0)
