"""The generated world as files in the formats of COCO and VQAv2, so that every script for those runs on it.

```
world.json                         seed and sizes; "complete" once everything is there
images/<split>/000000000001.png    named by the image's id
captions_<split>.json              COCO's format
dataset_shapes.json                all captions in the format of Karpathy's splits; images are relative to images/
questions_<split>.json             VQAv2's formats; images are named {:012d}.png
annotations_<split>.json           ten people who agree
scenes_<split>.jsonl               what each picture shows
corpus_train.txt, corpus_val.txt   text alone, one document per line
sets/captions_<split>.json         for --train_sets and --eval_sets of the example scripts
sets/questions_<split>.json
```
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ..records import PathLike, existing_file, json_lines
from ..seeding import random_generator
from .corpus import corpus
from .drawing import picture, render
from .scenes import SIDE, Scene, Thing
from .splits import SPLITS, example

DOCUMENTS = {"train": 60_000, "val": 1_000}  # of the corpus
NAME = "shapes"  # of the dataset, in the files and before image ids
IMAGE_PATTERN = "{:012d}.png"

_CHUNK = 500  # scenes that one process draws at a time
_SAMPLE = 8  # examples of a split that tell whether a folder holds the same world
_PEOPLE = 10  # whose answers a question of VQAv2 has


def write_world(
    folder: PathLike,
    *,
    sizes: Mapping[str, int] | None = None,
    documents: Mapping[str, int] | None = None,
    seed: int = 0,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the world into a folder. A finished one is left as it is, an interrupted one goes on where it stopped.

    Args:
        folder: new, or of an earlier call with the same arguments.
        sizes: scenes of each split, of which some may be left out; None: `SPLITS`.
        documents: of the corpora "train" and "val"; None: `DOCUMENTS`.
        seed: of everything.
        processes: that draw; they do not change the result. With more than one the calling script needs
            `if __name__ == "__main__"`, as for any pool.
        progress: called with how many pictures are done, and how many there will be.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown split, a number that is not positive; a folder with another world (other arguments, or
            written by another version of this code).
    """
    sizes = _checked(SPLITS if sizes is None else sizes, "sizes", SPLITS)
    documents = _checked(DOCUMENTS if documents is None else documents, "documents", DOCUMENTS)
    if processes < 1:
        raise ValueError(f"`processes` must be at least 1, got {processes}")
    folder = Path(folder)
    facts = {"seed": seed, "sizes": sizes, "documents": documents, "side": SIDE, "digest": world_digest(seed)}
    if _state(folder, facts):
        return folder
    (folder / "sets").mkdir(parents=True, exist_ok=True)
    _write_json(folder / "world.json", facts | {"complete": False})
    karpathy = []
    total, done = sum(sizes.values()), 0
    for split, size in sizes.items():
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        records: list[dict] = []
        for chunk in _drawn(folder, split, size, seed, processes):
            records += chunk
            done += len(chunk)
            if progress is not None:
                progress(done, total)
        _write_split(folder, split, records)
        karpathy += [_karpathy(split, record) for record in records]
    _write_json(folder / "dataset_shapes.json", {"dataset": NAME, "images": karpathy})
    for name, count in documents.items():
        texts = corpus(random_generator(NAME, "corpus", seed, name))
        _write_lines(folder / f"corpus_{name}.txt", (_one_line(next(texts)) for _ in range(count)))
    _write_json(folder / "world.json", facts | {"complete": True})
    return folder


def read_scenes(path: PathLike) -> dict[int, Scene]:
    """What the pictures of a `scenes_<split>.jsonl` show, by image id.

    Raises:
        ValueError: no such file, a record that is not of this form.
    """
    scenes = {}
    for place, record in json_lines(existing_file(path, "path")):
        try:
            things = tuple(Thing(**thing) for thing in record["things"])
            scenes[record["image_id"]] = Scene(things, record["background"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{place} is not a scene: {error!r}") from error
    return scenes


def _checked(given: Mapping[str, int], name: str, known: Mapping[str, int]) -> dict[str, int]:
    if not given or not set(given) <= set(known):
        raise ValueError(f"`{name}` must have some of {tuple(known)}, got {tuple(given)}")
    for key, value in given.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"`{name}` must be whole numbers of at least 1, got {value!r} for {key!r}")
    return {key: given[key] for key in known if key in given}


def world_digest(seed: int) -> str:
    """Of the first examples: other drawing or other wording has another one."""
    digest = hashlib.blake2b(digest_size=8)
    for split in SPLITS:
        for number in range(_SAMPLE):
            one = example(split, number, seed)
            digest.update(repr(one).encode())
            digest.update(picture(one.scene).tobytes())
    texts = corpus(random_generator(NAME, "corpus", seed, "val"))
    for _ in range(_SAMPLE):
        digest.update(next(texts).encode())
    return digest.hexdigest()


def _state(folder: Path, facts: dict) -> bool:
    """Whether the folder is complete.

    Raises:
        ValueError: it holds another world, or something else.
    """
    path = folder / "world.json"
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"`folder` {str(folder)!r} must be new or hold this world, got one without world.json")
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    complete = found.pop("complete", None)
    for name, value in facts.items():
        if found.get(name) != value:
            reason = " (the code that writes the world has changed)" if name == "digest" else ""
            raise ValueError(
                f"`folder` {str(folder)!r} holds a world with {name} {found.get(name)!r}, expected {value!r}{reason}: "
                "delete it or give another"
            )
    return complete is True


def _drawn(folder: Path, split: str, size: int, seed: int, processes: int) -> Iterator[list[dict]]:
    """The records of a split in order, in chunks; their pictures are in the folder."""
    draw = partial(_draw, folder, split, seed)
    chunks = [range(start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK)]
    if processes == 1 or len(chunks) == 1:
        yield from map(draw, chunks)
        return
    context = multiprocessing.get_context("spawn")  # forked children of a process with threads may hang
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(draw, chunks)


def _draw(folder: Path, split: str, seed: int, numbers: range) -> list[dict]:
    records = []
    for number in numbers:
        one = example(split, number, seed)
        name = IMAGE_PATTERN.format(one.image_id)
        path = folder / "images" / split / name
        if not path.exists():
            with _replacing(path) as part:
                render(one.scene).save(part, "PNG")
        records.append(
            {
                "image_id": one.image_id,
                "file_name": name,
                "scene": asdict(one.scene),
                "captions": list(one.captions),
                "questions": [[q.question, q.answer, q.kind] for q in one.questions],
            }
        )
    return records


def _write_split(folder: Path, split: str, records: list[dict]) -> None:
    images = [{"id": r["image_id"], "file_name": r["file_name"], "width": SIDE, "height": SIDE} for r in records]
    said = [
        {"image_id": r["image_id"], "id": r["image_id"] * 100 + number, "caption": caption}
        for r in records
        for number, caption in enumerate(r["captions"])
    ]
    coco = {"dataset": NAME, "split": split, "images": images, "annotations": said}
    _write_json(folder / f"captions_{split}.json", coco)
    questions, annotations = [], []
    for record in records:
        for number, (question, answer, kind) in enumerate(record["questions"]):
            about = {"question_id": record["image_id"] * 100 + number, "image_id": record["image_id"]}
            questions.append(about | {"question": question})
            annotations.append(about | _annotation(answer, kind))
    heading = {"dataset": NAME, "data_subtype": f"{NAME}-{split}"}
    _write_json(folder / f"questions_{split}.json", heading | {"questions": questions})
    _write_json(folder / f"annotations_{split}.json", heading | {"annotations": annotations})
    shown = ({"image_id": r["image_id"], "file_name": r["file_name"], **r["scene"]} for r in records)
    _write_lines(folder / f"scenes_{split}.jsonl", map(_json, shown))
    _write_sets(folder, split)


def _annotation(answer: str, kind: str) -> dict:
    other = "number" if kind == "count" else "other"
    return {
        "question_type": kind,
        "answer_type": "yes/no" if answer in ("yes", "no") else other,
        "multiple_choice_answer": answer,
        "answers": [{"answer": answer}] * _PEOPLE,
    }


def _karpathy(split: str, record: dict) -> dict:
    return {
        "filepath": split,
        "filename": record["file_name"],
        "split": split,
        "cocoid": record["image_id"],
        "sentences": [{"raw": caption} for caption in record["captions"]],
    }


def _write_sets(folder: Path, split: str) -> None:
    """Descriptions for `training_set`, with paths relative to them."""
    images = f"../images/{split}"
    captions = {"source": "coco_captions", "annotations": f"../captions_{split}.json", "images": images, "name": NAME}
    questions = {
        "source": "vqa_questions",
        "questions": f"../questions_{split}.json",
        "annotations": f"../annotations_{split}.json",
        "images": images,
        "pattern": IMAGE_PATTERN,
        "name": NAME,
    }
    _write_json(folder / "sets" / f"captions_{split}.json", [captions])
    _write_json(folder / "sets" / f"questions_{split}.json", [questions])


def _one_line(document: str) -> str:
    if "\n" in document:
        raise ValueError(f"a document of the corpus must be one line, got {document!r}")
    return document


def _json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _write_json(path: Path, content: object) -> None:
    _write_lines(path, [_json(content)])


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with _replacing(path) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which then takes its place: there is never half a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
