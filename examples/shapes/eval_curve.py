"""A stage-2 run at each of its checkpoints: answers to unseen questions (the paper's figure 5), captions, loss.

    python examples/shapes/eval_curve.py --run runs/findings/0/stage2 --world world --output curve.json

The first questions and scenes of a split, word by word (no beams): few and quick, to compare runs with each other.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from eval_truth import truth_of

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.data.shapes.files import IMAGE_PATTERN, read_scenes
from blip2_hf.evaluation import coco_benchmark, evaluate_captioning, evaluate_vqa, vqa_benchmark
from blip2_hf.evaluation.settings import captioning_settings, changed, vqa_settings

_GREEDY = {"num_beams": 1}


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step.

    Raises:
        ValueError: none.
    """
    found = {int(path.name.split("-")[1]): path for path in run.glob("checkpoint-*")}
    if not found:
        raise ValueError(f"`run` must be the folder of a run with checkpoint-*, got {str(run)!r}")
    return dict(sorted(found.items()))


def losses(run: Path) -> dict[int, float]:
    """The loss on the evaluation set at each step where the run has measured it."""
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    return {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--world", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--questions", type=int, default=600, help="how many (default: 600)")
    parser.add_argument("--captions", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--output", required=True, help="JSON file for the result")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    world, split, run = Path(arguments.world), arguments.split, Path(arguments.run)
    files = (world / f"questions_{split}.json", world / f"annotations_{split}.json", world / "images" / split)
    asked = vqa_benchmark(*files, pattern=IMAGE_PATTERN)
    shown = coco_benchmark(world / "dataset_shapes.json", world / "images", split=split)
    scenes = read_scenes(world / f"scenes_{split}.jsonl")
    measured = losses(run)
    points = []
    for step, folder in checkpoints(run).items():
        model = Blip2ForConditionalGeneration.from_pretrained(folder).eval().to(arguments.device)
        processor = Blip2Processor.from_pretrained(folder)
        kind = {"is_encoder_decoder": model.config.is_encoder_decoder}
        settings = changed(vqa_settings("paper", "vqav2", **kind), generate=_GREEDY)
        options = {"settings": settings, "limit": arguments.questions, "progress": False}
        answered = evaluate_vqa(model, processor, asked, **options).report["metrics"]["overall"]
        # stage 2 has learned captions without prompt
        settings = changed(captioning_settings("paper", "coco", **kind), prompt="", generate=_GREEDY)
        options = {"settings": settings, "limit": arguments.captions, "progress": False, "metrics": ()}
        captions = evaluate_captioning(model, processor, shown, **options).predictions
        truth = truth_of([(caption, scenes[image]) for image, caption in captions.items()])
        points.append({"step": step, "loss": measured.get(step), "answered": answered, "true": truth["true"]})
        print(json.dumps(points[-1]), flush=True)
    report = {"questions": arguments.questions, "captions": arguments.captions, "split": split, "points": points}
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
