"""Reads result files, which `run.py` writes: DATE-NAME-DEVICE.jsonl.

In a file, a line says what the results after it depend on, then comes a line per case, and so on. Of each case the
newest is taken: the last file by date, the last line in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "results"
_NAME = re.compile(r"(\d{4}-\d\d-\d\d)-(.+)-(cpu|cuda|meta)\.jsonl")


@dataclass(frozen=True)
class Row:
    """One case: when it was measured, what it depends on, and what came out."""

    date: str
    setting: dict
    case: dict

    def __getitem__(self, field: str) -> object:
        """Of the case, else of the setting."""
        return self.case[field] if field in self.case else self.setting[field]

    def get(self, field: str) -> object | None:
        return self.case.get(field, self.setting.get(field))

    @property
    def when(self) -> str:
        """Date, and the precision if it is not float32."""
        dtype = self.setting.get("dtype", "float32")
        return self.date if dtype == "float32" else f"{self.date}, {dtype}"


class Results:
    """All rows of a folder.

    Raises:
        ValueError: a file of another name, a case before any setting, results of small models.
    """

    def __init__(self, folder: Path = FOLDER):
        self._rows: dict[tuple[str, str], list[Row]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            name = _NAME.fullmatch(path.name)
            if name is None:
                raise ValueError(f"`folder`: {path.name} must be called DATE-NAME-DEVICE.jsonl")
            setting = None
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                if "benchmark" in record:
                    setting = record
                    if setting.get("small"):
                        raise ValueError(f"`folder`: {path.name} has results of a quick check, which say nothing")
                    continue
                if setting is None:
                    raise ValueError(f"`folder`: {path.name} must begin with what its results depend on")
                self._rows.setdefault((setting["benchmark"], name[3]), []).append(Row(name[1], setting, record))

    def newest(
        self,
        benchmark: str,
        device: str,
        case: Sequence[str],
        needs: Sequence[str] = (),
        where: Callable[[Row], bool] = lambda row: True,
    ) -> list[Row]:
        """The newest row of each case, the newest run first: cases are told apart by the fields `case` and the dtype,
        and only rows count that have all the fields `needs`."""
        found: dict[tuple, Row] = {}
        for row in reversed(self._rows.get((benchmark, device), [])):
            if all(row.get(field) is not None for field in (*case, *needs)) and where(row):
                key = (*(json.dumps(row[field]) for field in case), row.setting.get("dtype"))
                found.setdefault(key, row)
        return list(reversed(found.values()))
