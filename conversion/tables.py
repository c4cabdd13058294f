"""Which tables a conversion needs, put together."""

from __future__ import annotations

from typing import Literal

from .language_tables import language_folder
from .lavis_table import FROZEN_LANGUAGE_MODEL, FROZEN_TOWER, TABLE
from .rows import Table
from .tower_tables import BLIP2_FOLDER, clip_file, clip_folder, eva_file
from .transformers_tables import BLIP2, INSTRUCTBLIP

Layout = Literal["lavis", "transformers", "instructblip", "ours"]
LANGUAGES = ("opt", "t5")  # that the original has names for

_BLIP2_KINDS = ("ours", "transformers", "instructblip")


def original_table(language: str | None = None) -> Table:
    """The original's model files, with the names of one language model or of none.

    Raises:
        ValueError: for a language model that the original has no names for.
    """
    if language not in (None, *LANGUAGES):
        raise ValueError(f"`language` must be 'opt', 't5' or None, got {language!r}")
    return tuple(row for row in TABLE if row.language in (None, language))


def reading_table(kind: str, layers: int, tower: str | None = None, language: str | None = None) -> Table:
    """For a conversion to ours.

    Args:
        kind: what is converted, as in `conversion.detect.Detected.kind`.
        layers: how many layers of the tower are used (`Blip2Config.vision_feature_index()`).
        tower: kind of the file or folder that the tower is taken from; None: the checkpoint has its own.
        language: `model_type` of the language model; the names of its own folder are among the rows.

    Raises:
        ValueError: for kinds that have no table.
    """
    if kind in ("lavis_stage1", "lavis_stage2"):
        table = original_table(language if kind == "lavis_stage2" else None)
    elif kind in ("ours", "transformers"):
        table = BLIP2
    elif kind == "instructblip":
        table = INSTRUCTBLIP
    else:
        raise ValueError(f"`kind` must be a BLIP-2 checkpoint's, got {kind!r}")
    if tower is not None:
        table += tower_table(tower, layers)
    return table if language is None else table + language_folder(language)


def tower_table(kind: str, layers: int) -> Table:
    """For the file or folder that a tower is taken from.

    Raises:
        ValueError: if it is no such thing.
    """
    if kind == "tower_eva":
        return eva_file(layers)
    if kind == "tower_clip":
        return clip_file(layers)
    if kind == "tower_clip_folder":
        return clip_folder(layers)
    if kind in _BLIP2_KINDS:
        return BLIP2_FOLDER
    raise ValueError(
        f"`tower` must be a file or folder of an EVA-CLIP or CLIP tower, or a BLIP-2 folder, got one of kind {kind!r}"
    )


def writing_table(
    layout: Layout, language: str | None = None, with_tower: bool = True, with_language_model: bool = True
) -> Table:
    """For a conversion from ours.

    Args:
        layout: whose names the target has.
        language: `model_type` of the language model; None for a retrieval model.
        with_tower, with_language_model: for the original's layout, whether they are written; its own files hold what
            was trained, and of frozen parts second names only.

    Raises:
        ValueError: for a language model that the original has no names for.
    """
    if layout == "lavis":
        table = original_table(language)
        frozen = (() if with_tower else FROZEN_TOWER) + (() if with_language_model else FROZEN_LANGUAGE_MODEL)
        return frozen + table  # the first row that explains a name counts
    if layout == "transformers":
        return BLIP2
    if layout == "instructblip":
        return INSTRUCTBLIP
    raise ValueError(f"`layout` must be 'lavis', 'transformers' or 'instructblip', got {layout!r}")
