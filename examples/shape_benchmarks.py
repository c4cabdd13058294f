"""The pictures of `smoke_shapes` as benchmarks in the official file formats: data for the smoke runs of eval_*.py."""

import csv
import json
from pathlib import Path

from smoke_shapes import write_captions, write_questions


def _rows(folder: str) -> list[dict[str, str]]:
    with open(Path(folder, "metadata.csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def karpathy_files(folder: Path) -> list[str]:
    """Options of `blip2 eval captioning` and `retrieval`: a dataset_coco.json and its images."""
    images = write_captions(folder / "images")
    captions: dict[str, list[str]] = {}
    for row in _rows(images):
        captions.setdefault(row["file_name"], []).append(row["caption"])
    records = [
        {"filename": name, "split": "test", "cocoid": number, "sentences": [{"raw": text} for text in texts]}
        for number, (name, texts) in enumerate(captions.items())
    ]
    return ["--annotations", _write(folder / "dataset_coco.json", {"images": records}), "--images", images]


def vqa_files(folder: Path) -> list[str]:
    """Options of `blip2 eval vqa`: questions, answers of ten people who agree, images named by number."""
    images = Path(write_questions(folder / "images"))
    rows = _rows(str(images))
    numbers = {name: number for number, name in enumerate(dict.fromkeys(row["file_name"] for row in rows))}
    questions, annotations = [], []
    for key, row in enumerate(rows):
        about = {"question_id": key, "image_id": numbers[row["file_name"]]}
        questions.append(about | {"question": row["question"]})
        annotations.append(about | {"question_type": "what", "answers": [{"answer": row["answer"]}] * 10})
    for name, number in numbers.items():
        (images / name).rename(images / f"{number}.png")
    return [
        *("--questions", _write(folder / "questions.json", {"data_subtype": "val2014", "questions": questions})),
        *("--annotations", _write(folder / "annotations.json", {"annotations": annotations})),
        *("--images", str(images), "--image-pattern", "{}.png"),
    ]
