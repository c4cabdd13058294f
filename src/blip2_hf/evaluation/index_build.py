"""Making and changing a photo index: which files are new or changed, and their features."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..data.skipped import SkippedSample
from .fingerprints import model_fingerprint, texts_fingerprint
from .index_file import IndexEntry, IndexModel, PhotoIndex, check_finite
from .retrieval_images import ImageFiles
from .retrieval_run import UNUSED

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2"})


def index_model(model: Any, processor: Any, name: str) -> IndexModel:
    """What identifies a model in an index: its weights and how images are made ready for it."""
    settings = processor.image_processor.to_dict()
    described = [f"{key}={settings[key]!r}" for key in sorted(settings) if not key.startswith("_")]
    return IndexModel(name, texts_fingerprint([model_fingerprint(model, UNUSED), *described]))


def image_paths(sources: Sequence[str | os.PathLike]) -> list[str]:
    """Absolute paths: files as they are, of folders all image files in them and below (by suffix, in order of their
    names; hidden ones are left out).

    Raises:
        ValueError: a path that does not exist.
    """
    found: dict[str, None] = {}
    for source in map(os.path.abspath, sources):
        if os.path.isdir(source):
            found |= dict.fromkeys(files_below(source))
        elif os.path.isfile(source):
            found[source] = None
        else:
            raise ValueError(f"there is no file or folder {source!r}")
    return list(found)


@dataclass
class IndexChanges:
    """What an update did.

    Attributes:
        added, updated, removed, unchanged: numbers of images.
        skipped: images that could not be read, and why.
    """

    added: int = 0
    updated: int = 0
    removed: int = 0
    unchanged: int = 0
    skipped: list[SkippedSample] = field(default_factory=list)


@torch.no_grad()
def update_index(
    index: PhotoIndex,
    paths: Sequence[str],
    model: Any,
    processor: Any,
    *,
    keep_others: bool = True,
    batch_size: int = 16,
    save: Callable[[PhotoIndex], object] | None = None,
    save_seconds: float = 60.0,
    advance: Callable[[int], object] | None = None,
) -> tuple[PhotoIndex, IndexChanges]:
    """An index with the images `paths`, of which only new and changed files are encoded.

    A file is unchanged if its size and time of change are, or else its content is.

    Args:
        index: the old one, or an empty one; it is not changed.
        paths: absolute, from `image_paths`.
        model: a `Blip2ForImageTextRetrieval`, in evaluation mode.
        processor: its `Blip2Processor`.
        keep_others: whether images that are not among `paths` stay.
        batch_size: images at a time.
        save: called with the index so far, so that a run that is killed is continued by the next one: after every
            `save_seconds` (or 20 times what the last call took, if more), and when the run is stopped by an error or
            by Ctrl-C.
        advance: called with the number of files done.
    """
    changes = IndexChanges()
    numbers = {index.path(number): number for number in range(len(index))}
    dropped = set() if keep_others else set(numbers.values()) - {numbers[path] for path in paths if path in numbers}
    changes.removed = len(dropped)
    entries, new = list(index.entries), []
    for path in paths:
        number = numbers.get(path)
        entry = None if number is None else _if_unchanged(entries[number], path)
        if entry is None:
            new.append(path)
            continue
        entries[number] = entry
        changes.unchanged += 1
        if advance is not None:
            advance(1)
    index = replace(index, entries=tuple(entries))
    pending, unsaved = _Pending(), False
    saved, patience = time.monotonic(), save_seconds
    try:
        for start in range(0, len(new), batch_size):
            batch = new[start : start + batch_size]
            pending.add(*_encoded(index, batch, model, processor, changes.skipped))
            dropped |= {numbers[path] for path in batch if path in numbers}
            unsaved = True
            if advance is not None:
                advance(len(batch))
            if save is not None and time.monotonic() - saved >= patience:
                index, begun = pending.added_to(index), time.monotonic()
                save(index.without(dropped))
                unsaved, saved = False, time.monotonic()
                # Each save writes everything: of a large index they may not take most of the time.
                patience = max(save_seconds, 20 * (saved - begun))
    except BaseException:  # also Ctrl-C
        if save is not None and unsaved:
            save(pending.added_to(index).without(dropped))
        raise
    updated = {index_path(index, entry) for entry in index.entries[len(entries) :] + tuple(pending.entries)}
    changes.updated = len(updated & set(numbers))
    changes.added = len(updated) - changes.updated
    index = pending.added_to(index)
    lost = {entry["where"] for entry in changes.skipped} & set(numbers)
    changes.removed += len(lost)  # there before, not readable now
    return index.without(dropped), changes


def remove_images(index: PhotoIndex, sources: Sequence[str | os.PathLike]) -> tuple[PhotoIndex, int]:
    """An index without some files, or without all that are in some folders; they need not exist any more.

    Returns:
        The index, and how many images were removed.

    Raises:
        ValueError: a path that is neither in the index nor a folder of images in it.
    """
    removed: set[int] = set()
    paths = [index.path(number) for number in range(len(index))]
    for source in map(os.path.abspath, sources):
        inside = os.path.join(source, "")
        found = {number for number, path in enumerate(paths) if path == source or path.startswith(inside)}
        if not found:
            raise ValueError(f"the index has no image {source!r} and none in such a folder")
        removed |= found
    return index.without(removed), len(removed)


def index_path(index: PhotoIndex, entry: IndexEntry) -> str:
    """Absolute path of an entry."""
    return os.path.join(index.folder, entry.path)


@dataclass
class _Pending:
    """Images that are encoded but not yet in the index: joining tensors copies them all."""

    entries: list[IndexEntry] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)

    def add(self, entries: list[IndexEntry], features: torch.Tensor) -> None:
        if entries:
            check_finite(features, entries)
            self.features.append(features)
            self.entries += entries

    def added_to(self, index: PhotoIndex) -> PhotoIndex:
        """The index with them; none are left."""
        if not self.entries:
            return index
        index = index.plus(self.entries, torch.cat(self.features))
        self.entries, self.features = [], []
        return index


def _encoded(
    index: PhotoIndex, paths: list[str], model: Any, processor: Any, skipped: list[SkippedSample]
) -> tuple[list[IndexEntry], torch.Tensor]:
    """Entries and features of those images that can be read, as one batch."""
    # Facts are taken before the picture is read: a file that changes meanwhile is found changed next time.
    facts = [_facts(path) for path in paths]
    files = ImageFiles(model, processor, paths, paths, batch_size=len(paths))
    features, readable = files(0, len(paths))
    skipped += files.skipped.values()
    kept = [number for number, read in enumerate(readable.tolist()) if read]
    entries = [IndexEntry(_stored(paths[n], index.folder), *facts[n]) for n in kept if facts[n] is not None]
    if not entries:
        return [], torch.zeros(0, 0, 0)
    with_facts = [position for position, number in enumerate(kept) if facts[number] is not None]
    return entries, model.get_image_features(image_embeds=features).half().cpu()[with_facts]


def _if_unchanged(entry: IndexEntry, path: str) -> IndexEntry | None:
    """The entry, with the file's time, if its content is the same."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if status.st_size != entry.size:
        return None
    if status.st_mtime_ns == entry.mtime:
        return entry
    return replace(entry, mtime=status.st_mtime_ns) if _digest(path) == entry.digest else None


def _facts(path: str) -> tuple[int, int, str] | None:
    try:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns, _digest(path)
    except OSError:
        return None


def _digest(path: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _stored(path: str, folder: Path) -> str:
    """Relative where the index and its images can be moved together."""
    inside = os.path.join(folder, "")
    return path[len(inside) :] if path.startswith(inside) else path


def files_below(folder: str) -> Iterator[str]:
    """Paths of the image files in a folder and below it: by suffix, in order of their names, without hidden ones."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(parent, name)
