"""The generated world as a `datasets.Dataset`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from ..records import PathLike
from .drawing import render
from .scenes import Thing
from .splits import SPLITS, example

if TYPE_CHECKING:
    import datasets


def shapes_dataset(
    split: str, count: int | None = None, seed: int = 0, *, cache_dir: PathLike | None = None
) -> datasets.Dataset:
    """The first examples of a split, as `write_world` writes them.

    Args:
        split: of `SPLITS`.
        count: how many; None: the split's size in `SPLITS`.
        seed: of the world.
        cache_dir: where `datasets` keeps what it has drawn; None: its usual folder.

    Returns:
        Columns: image (PIL, RGB), image_id, captions, questions, answers, kinds (lists of strings; the last three
        belong together), things (a list of the fields of `Thing`), background.

    Raises:
        ValueError: an unknown split, a count that is not positive.
        ImportError: `datasets` is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {tuple(SPLITS)}, got {split!r}")
    count = SPLITS[split] if count is None else count
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}")
    import datasets

    from .files import world_digest

    text, number = datasets.Value("string"), datasets.Value("int64")
    thing = {field.name: number if field.name in ("x", "y", "side") else text for field in fields(Thing)}
    columns = {
        "image": datasets.Image(),
        "image_id": number,
        "captions": [text],
        "questions": [text],
        "answers": [text],
        "kinds": [text],
        "things": [thing],
        "background": number,
    }
    # The digest is for the cache: what other code has drawn is not taken for this.
    return datasets.Dataset.from_generator(
        _rows,
        features=datasets.Features(columns),
        gen_kwargs={"split": split, "count": count, "seed": seed, "digest": world_digest(seed)},
        cache_dir=None if cache_dir is None else str(cache_dir),
    )


def _rows(split: str, count: int, seed: int, digest: str) -> Iterator[dict[str, Any]]:
    for number in range(count):
        one = example(split, number, seed)
        yield {
            "image": render(one.scene),
            "image_id": one.image_id,
            "captions": list(one.captions),
            "questions": [question.question for question in one.questions],
            "answers": [question.answer for question in one.questions],
            "kinds": [question.kind for question in one.questions],
            "things": [asdict(thing) for thing in one.scene.things],
            "background": one.scene.background,
        }
