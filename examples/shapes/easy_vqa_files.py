"""`easy-vqa` (PyPI) as files: pictures and questions that others have made, in the formats of VQAv2.

    pip install easy-vqa
    python examples/shapes/easy_vqa_files.py --output-dir easy-vqa

4,000 pictures of one shape of one colour with 38,575 questions to train on, 1,000 with 9,673 to test; 64 pixels a side,
13 answers. The last `VALIDATION` training pictures are held out as the split "val".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from blip2_hf.data.shapes.files import IMAGE_PATTERN

NAME = "easy-vqa"
VALIDATION = 200
SHAPES = ("circle", "rectangle", "triangle")
_PEOPLE = 10  # whose answers a question of VQAv2 has
_FIRST_ID = {"train": 1, "val": 1, "test": 10_001}  # no two pictures of the whole share an id

Questions = Sequence[tuple[str, str, int]]  # with answer and number of the picture


def missing() -> str | None:
    """Why it cannot be had here, or None."""
    if importlib.util.find_spec("easy_vqa") is None:
        return "the package easy-vqa is not installed (`pip install easy-vqa`)"
    return None


def kind(answer: str) -> str:
    """What is asked for, as told from the answer: "yes/no", "shape" or "colour"."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "colour"


def write_split(folder: Path, split: str, questions: Questions, pictures: Mapping[int, str]) -> None:
    """Pictures, questions, annotations and the set for --train_sets of one split."""
    images = folder / "images" / split
    images.mkdir(parents=True, exist_ok=True)
    for number in sorted({picture for _, _, picture in questions}):
        shutil.copyfile(pictures[number], images / IMAGE_PATTERN.format(number + _FIRST_ID[split]))
    asked, annotations, of_picture = [], [], dict.fromkeys(pictures, 0)
    for question, answer, picture in questions:
        image = picture + _FIRST_ID[split]
        about = {"question_id": image * 100 + of_picture[picture], "image_id": image}
        of_picture[picture] += 1
        asked.append(about | {"question": question})
        sort = kind(answer)
        annotation = {"question_type": sort, "answer_type": "yes/no" if sort == "yes/no" else "other"}
        annotation |= {"multiple_choice_answer": answer, "answers": [{"answer": answer}] * _PEOPLE}
        annotations.append(about | annotation)
    heading = {"dataset": NAME, "data_subtype": f"{NAME}-{split}"}
    _write(folder / f"questions_{split}.json", heading | {"questions": asked})
    _write(folder / f"annotations_{split}.json", heading | {"annotations": annotations})
    (folder / "sets").mkdir(exist_ok=True)
    files = {"questions": f"../questions_{split}.json", "annotations": f"../annotations_{split}.json"}
    described = {"source": "vqa_questions", **files, "images": f"../images/{split}", "pattern": IMAGE_PATTERN}
    _write(folder / "sets" / f"questions_{split}.json", [described | {"name": NAME}])


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--pictures", type=int, help="only the first ones of each split (default: all)")
    arguments = parser.parse_args(argv)
    if reason := missing():
        parser.error(reason)
    import easy_vqa

    folder = Path(arguments.output_dir)
    learned, asked = (
        [*zip(*part, strict=True)] for part in (easy_vqa.get_train_questions(), easy_vqa.get_test_questions())
    )
    pictures = easy_vqa.get_train_image_paths()
    first = max(pictures) + 1 - VALIDATION
    splits = {
        "train": ([row for row in learned if row[2] < first], pictures, 0),
        "val": ([row for row in learned if row[2] >= first], pictures, first),
        "test": (asked, easy_vqa.get_test_image_paths(), 0),
    }
    for split, (rows, paths, start) in splits.items():
        if arguments.pictures is not None:
            rows = [row for row in rows if row[2] < start + arguments.pictures]
        write_split(folder, split, rows, paths)
        print(f"{split}: {len(rows)} questions about {len({row[2] for row in rows})} pictures")


if __name__ == "__main__":
    main()
