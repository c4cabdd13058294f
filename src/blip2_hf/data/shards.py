"""Sets too large for a list: shards that are read from front to back, and from any place again.

The standard library's tarfile reads tar shards here, not `datasets`' WebDataset loader: that one counts samples
from the shard's start (resuming reads and decodes all before the place again), gives no position with a sample
(what a loader's worker has prefetched then counts as seen), and drops its shuffle buffer on resuming. A tar
member has a byte offset, which is an exact position that costs one seek.
"""

from __future__ import annotations

import gzip
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import count
from typing import Any, Protocol

from .columns import RowReader, check_columns, undecoded
from .records import PathLike, existing_file
from .samples import Entry, ImageTextSample, as_captions
from .skipped import BAD_RECORD, BAD_SHARD

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})
END = -1  # the cursor after a shard's last sample where there is no other

# What reading a damaged file raises, beside errors of the file system: no library wraps all of its own.
_DAMAGE = (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, TypeError, OverflowError)


class Shards(Protocol):
    """A set in shards. `len()` is the number of shards."""

    def __len__(self) -> int: ...

    def read(self, shard: int, cursor: int) -> Iterator[tuple[Entry, int]]:
        """The entries of a shard from `cursor` on, each with the cursor of the next one.

        Args:
            shard: number of the shard.
            cursor: 0 for the start, or what an earlier reading gave; `END` gives nothing.

        Yields:
            a sample, or the record of one that could not be read, and the cursor behind it.
        """
        ...


class TarShards:
    """WebDataset tar files, as img2dataset writes LAION: `key.jpg` beside `key.txt` and/or `key.json`.

    The members of a sample follow one another and share the path up to the first dot of the file name. Caption:
    the text file, else the JSON's `caption_field`. The cursor is a byte offset (of the uncompressed data in a
    .tar.gz, where going to it means reading up to it).

    Args:
        files: the tar files.
        name: put before the image ids, which are the keys.
        caption_field: field of the JSON file.

    Raises:
        ValueError: no files, or one that does not exist.
    """

    def __init__(self, files: Sequence[PathLike], *, name: str, caption_field: str = "caption") -> None:
        if isinstance(files, (str, os.PathLike)):
            raise ValueError(f"`files` must be a list of paths, got {files!r}")
        self.files = [str(existing_file(path, "files")) for path in files]
        if not self.files:
            raise ValueError("`files` is empty; expected at least one tar file")
        if not name:
            raise ValueError("`name` must be a string, not empty")
        self.name = name
        self.caption_field = caption_field

    def __len__(self) -> int:
        return len(self.files)

    def read(self, shard: int, cursor: int) -> Iterator[tuple[Entry, int]]:
        """As `Shards.read`. A damaged file gives what stands before the damage, then one skipped entry."""
        if cursor == END:
            return
        path = self.files[shard]
        try:
            for key, members, behind in _groups(path, cursor):
                yield self._entry(path, key, members), behind
        except _DAMAGE as error:
            reason = f"{path}: {error or type(error).__name__}"
            yield {"reason": BAD_SHARD, "where": reason}, END

    def _entry(self, path: str, key: str, members: dict[str, bytes]) -> Entry:
        place = f"{path}: {key}"
        image = next((data for extension, data in members.items() if extension in IMAGE_EXTENSIONS), None)
        captions: tuple[str, ...] = ()
        try:
            if "txt" in members:
                captions = (members["txt"].decode("utf-8"),)
            elif "json" in members:
                record = json.loads(members["json"])
                captions = as_captions(record[self.caption_field], f"{place}: field {self.caption_field!r}")
        except (ValueError, KeyError, TypeError, RecursionError):  # one record of millions, so not worth an end
            return {"reason": BAD_RECORD, "where": place}
        return ImageTextSample(image, captions, f"{self.name}/{key}", place)


def _groups(path: str, cursor: int) -> Iterator[tuple[str, dict[str, bytes], int]]:
    """(key, data by extension, offset of the next sample) of the samples from `cursor` on."""
    with _open(path) as file:
        file.seek(cursor)
        with closing(tarfile.open(fileobj=file, mode="r:")) as tar:
            key: str | None = None
            members: dict[str, bytes] = {}
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep a record of every member
                if not member.isfile():
                    continue
                folder, _, file_name = member.name.rpartition("/")
                stem, dot, extension = file_name.partition(".")
                if not dot or not stem:
                    continue
                new_key = f"{folder}/{stem}" if folder else stem
                if key is not None and new_key != key:
                    yield key, members, member.offset
                    members = {}
                key = new_key
                extracted = tar.extractfile(member)
                members[extension.lower()] = extracted.read() if extracted is not None else b""
            _check_end(file, tar.offset)
            if key is not None:
                yield key, members, END


def _check_end(file: Any, offset: int) -> None:
    """tarfile takes a header that is not one for the end; the end is a block of zeros, or nothing."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header of a member at byte {offset}")


def _open(path: str) -> Any:
    return gzip.open(path, "rb") if path.endswith(("gz", ".gzip")) else open(path, "rb")


class DatasetShards:
    """A streamed `datasets.IterableDataset`: Parquet or JSON files, or a set of the Hub, one shard per file.

    For example `load_dataset("parquet", data_files=[...], split="train", streaming=True)`. The cursor is the row
    in the shard; going to it means reading up to it.

    Args:
        dataset: the stream; not shuffled by `datasets`, which would make rows move.
        image_column, caption_column, id_column, name: as for `DatasetSamples`.
        image_folder: what relative paths in `image_column` are relative to.

    Raises:
        ValueError: not a streamed set, or a column that it lacks.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        image_column: str = "image",
        caption_column: str = "caption",
        id_column: str | None = None,
        image_folder: PathLike | None = None,
        name: str,
    ) -> None:
        import datasets

        if not isinstance(dataset, datasets.IterableDataset):
            raise ValueError(
                f"`dataset` must be a datasets.IterableDataset (streaming=True), got {type(dataset).__name__}"
            )
        check_columns(dataset.column_names, image_column, caption_column, id_column)
        self.reader = RowReader(image_column, caption_column, id_column, image_folder, name)
        self.dataset = undecoded(dataset, image_column)

    def __len__(self) -> int:
        return self.dataset.num_shards

    def read(self, shard: int, cursor: int) -> Iterator[tuple[Entry, int]]:
        """As `Shards.read`. A damaged file gives what stands before the damage, then one skipped entry."""
        import pyarrow

        if cursor == END:
            return
        rows = self.dataset.shard(num_shards=len(self), index=shard, contiguous=False).skip(cursor)
        iterator = iter(rows)
        for row_number in count(cursor):
            try:
                row = next(iterator)
            except StopIteration:
                return
            except (*_DAMAGE, pyarrow.ArrowException) as error:
                yield {"reason": BAD_SHARD, "where": f"{self.reader.name}, shard {shard}: {error}"}, END
                return
            yield self.reader.entry(row, f"{shard}-{row_number}"), row_number + 1
