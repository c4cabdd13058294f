"""How many captions are true of their scenes: every statement, read by the parser of the world's grammar.

    python examples/shapes/eval_truth.py --predictions eval/captioning/test/captioning-opt \\
        --scenes world/scenes_test.jsonl --output eval/captioning/test/captioning-opt/truth.json

Also how much they say: statements per caption, and the share of the scene's things that some noun phrase of the caption
can mean ("a circle" one of two circles, "two circles" both). "three objects" alone mentions none.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip2_hf.data.shapes.claims import Claim
from blip2_hf.data.shapes.files import read_scenes
from blip2_hf.data.shapes.grammar import check_caption, read_caption
from blip2_hf.data.shapes.scenes import Scene

_EXAMPLES = 20  # of captions that are not true, for the report


def results_of(folder: str) -> list[dict[str, Any]]:
    """The captions that eval_captioning.py has written.

    Raises:
        ValueError: none, or those of several evaluations.
    """
    found = sorted(Path(folder).glob("results*.json"))
    if len(found) != 1:
        raise ValueError(f"`predictions` must be a folder with one results*.json, got {[str(path) for path in found]}")
    return json.loads(found[0].read_text(encoding="utf-8"))


def mentioned(claims: Sequence[Claim], scene: Scene) -> int:
    """How many things of `scene` the noun phrases of a caption can mean at most, each "a" and number other things."""
    sure: set[int] = set()
    slots: list[list[int]] = []  # of each thing that is to be found, those that it may be
    for phrase in dict.fromkeys(phrase for claim in claims for phrase in claim.phrases):
        fitting = [number for number, thing in enumerate(scene.things) if thing in phrase.possible(scene)]
        if phrase.sort in ("some", "number"):
            slots += [fitting] * (phrase.count or 1)
        else:
            sure.update(fitting)
    owner: dict[int, int] = {}

    def placed(slot: int, tried: set[int]) -> bool:
        """Whether a thing is found for the slot, those of earlier slots being moved where necessary."""
        for thing in slots[slot]:
            if thing in sure or thing in tried:
                continue
            tried.add(thing)
            if thing not in owner or placed(owner[thing], tried):
                owner[thing] = slot
                return True
        return False

    return len(sure) + sum(placed(slot, set()) for slot in range(len(slots)))


def truth_of(captions: Sequence[tuple[str, Scene]]) -> dict[str, Any]:
    """The report on captions and their scenes, at least one; shares from 0 to 1."""
    statements: Counter[str] = Counter()
    true_statements: Counter[str] = Counter()
    by_things: dict[int, list[bool]] = {}
    parsed = true = named = 0
    for caption, scene in captions:
        check = check_caption(caption, scene)
        parsed, true = parsed + check.parsed, true + check.true
        by_things.setdefault(len(scene.things), []).append(check.true)
        named += mentioned(read_caption(caption) or [], scene)
        for statement in check.statements:
            statements[statement.kind] += 1
            true_statements[statement.kind] += statement.true
    return {
        "captions": len(captions),
        "parsed": round(parsed / len(captions), 4),
        "true": round(true / len(captions), 4),
        "true_by_things": {str(n): round(sum(them) / len(them), 4) for n, them in sorted(by_things.items())},
        "different": round(len({caption for caption, _ in captions}) / len(captions), 4),
        "statements_per_caption": round(sum(statements.values()) / len(captions), 4),
        "things_mentioned": round(named / sum(len(scene.things) for _, scene in captions), 4),
        "true_statements": {kind: round(true_statements[kind] / number, 4) for kind, number in statements.items()},
        "statements": dict(statements),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--predictions", required=True, help="output folder of eval_captioning.py")
    parser.add_argument("--scenes", required=True, help="scenes_<split>.jsonl of the world")
    parser.add_argument("--output", required=True, help="JSON file for the result")
    arguments = parser.parse_args(argv)
    scenes = read_scenes(arguments.scenes)
    captions = results_of(arguments.predictions)
    report = truth_of([(row["caption"], scenes[row["image_id"]]) for row in captions])
    print(json.dumps(report, indent=1))
    wrong = [(row, check_caption(row["caption"], scenes[row["image_id"]])) for row in captions]
    report["not_true"] = [
        {**row, "false": [one.text for one in check.statements if not one.true]}
        for row, check in wrong
        if not check.true
    ][:_EXAMPLES]
    Path(arguments.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
