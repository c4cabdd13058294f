"""Reading annotation files and checking the fields of their records."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike


def existing_file(path: PathLike, argument: str) -> Path:
    """`path` as a Path.

    Raises:
        ValueError: no such file; names the argument.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`{argument}` must be an existing file, got {str(path)!r}")
    return path


def existing_folder(path: PathLike, argument: str) -> Path:
    """`path` as a Path.

    Raises:
        ValueError: no such folder; names the argument.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"`{argument}` must be an existing folder, got {str(path)!r}")
    return path


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: not JSON; names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON-lines file, each with its place; blank lines are passed over.

    Raises:
        ValueError: a line that is not a JSON object; names file and line.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place} is not valid JSON: {error}") from error
            yield place, as_object(record, place)


def csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a CSV file with a header, each with its place.

    Raises:
        ValueError: a row with more or fewer fields than the header; names file and line.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{place} must have the header's {len(reader.fieldnames or ())} fields")
            yield place, row


def as_object(record: Any, place: str) -> dict:
    """`record` if it is a dict; else a ValueError that names `place`."""
    if not isinstance(record, dict):
        raise ValueError(f"{place} must be an object, got {type(record).__name__}")
    return record


def list_field(record: dict, field: str, place: str) -> list:
    """The list in `field`; a ValueError that names both if there is none."""
    value = required(record, field, place)
    if not isinstance(value, list):
        raise ValueError(f"{place}: field {field!r} must be a list, got {type(value).__name__}")
    return value


def text_field(record: dict, field: str, place: str) -> str:
    """The string in `field`, not empty; a ValueError that names both if there is none."""
    value = required(record, field, place)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{place}: field {field!r} must be a string, not empty, got {value!r:.100}")
    return value


def id_field(record: dict, field: str, place: str) -> str:
    """The integer or string in `field`, as a string."""
    value = required(record, field, place)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{place}: field {field!r} must be an integer or a string, got {value!r:.100}")
    return str(value)


def required(record: dict, field: str, place: str) -> Any:
    """`record[field]`; a ValueError that names the place, the field and the fields that exist if it is absent."""
    if field not in record:
        raise ValueError(f"{place} has no field {field!r}; it has {sorted(map(str, record))}")
    return record[field]
