"""The best retrieval that is possible: captions of one scene are true of others, too.

    python examples/shapes/eval_oracle.py --world world --split test --output eval/oracle/test.json

The expected recall at 1 of whoever knows exactly which captions fit which scenes, reads a list of things as complete,
and guesses where several fit. A model can be above it by chance and by habits of wording, not by seeing better.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from blip2_hf.data.shapes.files import read_scenes
from blip2_hf.data.shapes.recall import oracle_recall


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", required=True, help="JSON file for the result")
    arguments = parser.parse_args(argv)
    world = Path(arguments.world)
    scenes = read_scenes(world / f"scenes_{arguments.split}.jsonl")
    captions: dict[int, list[str]] = {image: [] for image in scenes}
    said = json.loads((world / f"captions_{arguments.split}.json").read_text(encoding="utf-8"))
    for one in said["annotations"]:
        captions[one["image_id"]].append(one["caption"])
    found = oracle_recall(list(captions.values()), list(scenes.values()))
    report = {  # names and fractions as in the reports of eval_retrieval.py
        "scenes": len(scenes),
        "captions": len(said["annotations"]),
        "txt_r1": round(found.text_at_1 / 100, 4),
        "img_r1": round(found.image_at_1 / 100, 4),
    }
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
