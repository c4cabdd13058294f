"""Image-text samples from the columns of a `datasets` table, among them Parquet files and sets of the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from .records import PathLike, existing_file
from .samples import Entry, ImageTextSample, as_captions
from .skipped import BAD_RECORD

if TYPE_CHECKING:
    import datasets


class DatasetSamples(Sequence[Entry]):
    """A `datasets.Dataset` (of local files or the Hub) as a sequence of samples; rows are read when asked for.

    A row with a value of another type than said below (an id that is null, a caption that is a number) gives the record
    of a malformed sample, {"reason", "where"}, which `ImageTextPairs` skips and counts.

    Args:
        dataset: the table; one row is one sample.
        image_column: an `Image` feature, a struct of "bytes" and "path", encoded bytes, or a path.
        caption_column: a string or a list of strings.
        id_column: the image's id, an integer or a string; None: the row number is the id.
        image_folder: what relative paths in `image_column` are relative to; None: the current folder.
        name: put before the image ids.

    Raises:
        ValueError: not a `datasets.Dataset`, or a column that it lacks.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        image_column: str = "image",
        caption_column: str = "caption",
        id_column: str | None = None,
        image_folder: PathLike | None = None,
        name: str,
    ) -> None:
        import datasets

        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(f"`dataset` must be a datasets.Dataset (one split), got {type(dataset).__name__}")
        check_columns(dataset.column_names, image_column, caption_column, id_column)
        self.reader = RowReader(image_column, caption_column, id_column, image_folder, name)
        wanted = [column for column in (image_column, caption_column, id_column) if column is not None]
        self.dataset = undecoded(dataset.select_columns(wanted), image_column)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Entry:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` must lie in [{-len(self)}, {len(self)}), got {index}")
        index = int(index) % len(self)
        return self.reader.entry(self.dataset[index], str(index))


def parquet_samples(
    files: PathLike | Sequence[PathLike],
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    id_column: str | None = None,
    image_folder: PathLike | None = None,
    name: str,
) -> DatasetSamples:
    """Parquet files as one sequence of samples, through `datasets` (which keeps an Arrow copy in its cache).

    Args as for `DatasetSamples`.

    Raises:
        ValueError: a missing file or column.
    """
    import datasets

    paths = file_list(files, "files")
    dataset = datasets.load_dataset("parquet", data_files=paths, split="train")
    return DatasetSamples(
        dataset,
        image_column=image_column,
        caption_column=caption_column,
        id_column=id_column,
        image_folder=image_folder,
        name=name,
    )


class RowReader:
    """Makes a sample of a row, or the record of a malformed one."""

    def __init__(
        self,
        image_column: str,
        caption_column: str,
        id_column: str | None,
        image_folder: PathLike | None,
        name: str,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name` must be a string, not empty, got {name!r}")
        self.image_column = image_column
        self.caption_column = caption_column
        self.id_column = id_column
        self.image_folder = image_folder
        self.name = name

    def entry(self, row: Mapping[str, Any], row_name: str) -> Entry:
        """The sample of `row`; `row_name` names the row in messages and is the id if there is no id column."""
        try:
            return self._sample(row, row_name)
        except ValueError as error:  # one record of many, so not worth an end
            return {"reason": BAD_RECORD, "where": str(error)}

    def _sample(self, row: Mapping[str, Any], row_name: str) -> ImageTextSample:
        place = f"{self.name}, row {row_name}"
        for column in (self.image_column, self.caption_column, self.id_column):
            if column is not None and column not in row:
                raise ValueError(f"{place} has no column {column!r}; it has {sorted(row)}")
        captions = as_captions(row[self.caption_column], f"{place}: column {self.caption_column!r}")
        image_id = row_name if self.id_column is None else row[self.id_column]
        if isinstance(image_id, bool) or not isinstance(image_id, (int, str)):
            raise ValueError(
                f"{place}: column {self.id_column!r} must be an integer or a string, got {image_id!r:.100}"
            )
        return ImageTextSample(self._image(row[self.image_column], place), captions, f"{self.name}/{image_id}", place)

    def _image(self, value: Any, place: str) -> Any:
        if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and self.image_folder is not None:
            return os.path.join(self.image_folder, value)
        if value is None or isinstance(value, (str, bytes, Image.Image)):
            return value or None
        raise ValueError(
            f"{place}: column {self.image_column!r} must be an image, a struct of 'bytes' and 'path', bytes or a "
            f"path, got {type(value).__name__}"
        )


def undecoded(dataset: Any, image_column: str) -> Any:
    """The set with the images of an `Image` column left as bytes: a broken one must not stop the reading."""
    import datasets

    feature = (dataset.features or {}).get(image_column)
    if isinstance(feature, datasets.Image) and feature.decode:
        return dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset


def check_columns(
    existing: Sequence[str] | None, image_column: str, caption_column: str, id_column: str | None
) -> None:
    """A ValueError that names the argument for a column that does not exist; `existing` None: not known yet."""
    wanted = {"image_column": image_column, "caption_column": caption_column, "id_column": id_column}
    for argument, column in wanted.items():
        if existing is not None and column is not None and column not in existing:
            raise ValueError(f"`{argument}` {column!r} is not a column of the set; it has {sorted(existing)}")


def file_list(files: PathLike | Sequence[PathLike], argument: str) -> list[str]:
    """One path or several as a list of existing files."""
    several = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    if not several:
        raise ValueError(f"`{argument}` is empty; expected at least one file")
    return [str(existing_file(path, argument)) for path in several]
