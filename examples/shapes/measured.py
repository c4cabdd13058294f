"""What the folder of a run (run_all.py) holds, as plain numbers. What has not been measured is None."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steps import GROUPS, Step

_LIMITED = re.compile(r"report-first-(\d+)\.json")


def number(content: Any, *names: str) -> float | None:
    """`content[names[0]][names[1]]…` where all of it is there and a number, else None."""
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content if isinstance(content, int | float) and not isinstance(content, bool) else None


def read_json(path: Path) -> Any:
    """The content of a file, or None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@dataclass
class Measured:
    """The evaluations below one folder.

    Attributes:
        folder: `--output-dir` of run_all.py.
        limited: names of evaluations that were read and are of the first few items only.
    """

    folder: Path
    limited: set[str] = field(default_factory=set)

    # -- evaluations -------------------------------------------------------------------------------------------------

    def report(self, task: str, split: str, model: str) -> dict[str, Any] | None:
        """The report of eval_<task>.py on a model; where there is none, one of the first items (noted in `limited`)."""
        folder = self.folder / "eval" / task / split / model
        if (found := read_json(folder / "report.json")) is not None:
            return found
        for path in sorted(folder.glob("report-first-*.json")):
            if _LIMITED.fullmatch(path.name):
                self.limited.add(f"{task}/{split}/{model}")
                return read_json(path)
        return None

    def metric(self, task: str, split: str, model: str, *names: str) -> float | None:
        """A number of that report's metrics, such as "itc", "txt_r1"."""
        return number(self.report(task, split, model), "metrics", *names)

    def truth(self, split: str, model: str) -> dict[str, Any] | None:
        return read_json(self.folder / "eval" / "captioning" / split / model / "truth.json")

    def blind(self, split: str, language: str) -> dict[str, Any] | None:
        return read_json(self.folder / "eval" / "blind" / split / f"{language}.json")

    def oracle(self, split: str) -> dict[str, Any] | None:
        return read_json(self.folder / "eval" / "oracle" / f"{split}.json")

    def curve(self, model: str) -> list[dict[str, Any]]:
        """A point for each checkpoint of a run ("step", "loss", "answered", "true"); none where not measured."""
        found = read_json(self.folder / "eval" / "curve" / f"{model}.json")
        return found["points"] if found else []

    def backbone(self, name: str) -> dict[str, Any] | None:
        """The report of a tower or language model, such as "towers/base"."""
        return read_json(self.folder / name / "report.json")

    def size(self, split: str) -> int | None:
        """Scenes of a split of the world."""
        found = number(read_json(self.folder / "world" / "world.json"), "sizes", split)
        return None if found is None else int(found)

    def seeds(self) -> list[int]:
        """Of the findings that have been measured, in part at least."""
        folders = [*self.folder.glob("eval/*/test/findings/*"), *self.folder.glob("eval/curve/findings/*")]
        return sorted({int(path.name) for path in folders if path.name.isdecimal()})

    # -- runs --------------------------------------------------------------------------------------------------------

    def done(self, step: str) -> dict[str, Any] | None:
        """Command and seconds of a step that is done."""
        return read_json(self.folder / "done" / f"{step.replace('/', '.')}.json")

    def seconds(self, steps: list[Step]) -> dict[str, tuple[float, int, int]]:
        """For each group of the plan with steps that are done: their seconds, how many they are, and of how many."""
        found = {}
        for group in GROUPS:
            planned = [step for step in steps if step.group == group and not step.always]
            ran = [state["seconds"] for step in planned if (state := self.done(step.name)) is not None]
            if ran:
                found[group] = (sum(ran), len(ran), len(planned))
        return found

    def options(self, run: str) -> dict[str, str]:
        """Of the command that made a run; none where it is not known."""
        state = self.done(run)
        if state is None:
            return {}
        words = state["command"][1:]
        return dict(zip(words[::2], words[1::2], strict=True))

    def lineage(self, run: str) -> list[str]:
        """The training runs that a run comes from, first to last, and the run itself."""
        options, before = self.options(run), []
        for name in ("--stage1", "--text_branch", "--model"):
            source = options.get(name, "")
            if source.startswith("runs/"):
                before += [other for other in self.lineage(source.removeprefix("runs/")) if other not in before]
        return [*before, run]

    def backbones(self, run: str) -> dict[str, str]:
        """Folders of "--vision" and "--language" that a run started from, or a run before it."""
        found = {}
        for one in self.lineage(run):
            options = self.options(one)
            found |= {name: options[name] for name in ("--vision", "--language") if name in options}
        return found

    def trained(self, run: str) -> dict[str, Any] | None:
        """Steps, batch and seconds of a run as far as they are known; None where it has not ended."""
        state = read_json(self.folder / "runs" / run / "trainer_state.json")
        if state is None:
            return None
        done = self.done(run) or {}
        script = done["command"][0] if done else None
        recipe = Path(self.options(run)["--recipe"]).name if done else None
        return {
            "script": script,
            "recipe": recipe,
            "steps": state.get("global_step"),
            "batch": state.get("train_batch_size"),
            "learning_rate": max(
                (e["learning_rate"] for e in state["log_history"] if "learning_rate" in e), default=None
            ),
            "seconds": done.get("seconds"),
        }

    def command(self, step: str) -> str | None:
        """What was typed, on one line."""
        state = self.done(step)
        return None if state is None else shlex.join(state["command"])
