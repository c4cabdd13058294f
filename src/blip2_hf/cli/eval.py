"""`blip2 eval`: the paper's benchmarks from their own files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..evaluation.metrics.captions import CAPTION_METRICS
from .common import (
    add_model_options,
    loading,
    new_parser,
    not_negative,
    positive,
    print_error,
    print_result,
    quiet_libraries,
    read_answers,
    reading,
    template,
    working,
)
from .match import unused_parts_missing

_ABOUT = """\
Every task writes predictions while they are made (--output-dir), so that a run that was stopped goes on when it is
started again, and prints its scores below the paper's. docs/evaluation.md says what to download. Several GPUs:
  accelerate launch --num_processes 4 -m blip2_hf.cli eval captioning ...
"""
_CAPTIONING = """\
examples:
  blip2 eval captioning --annotations dataset_coco.json --images coco --model blip2-opt-2.7b-coco --output-dir out
  blip2 eval captioning --benchmark nocaps --annotations nocaps_val_4500_captions.json --images nocaps \\
      --model blip2-opt-2.7b-coco
"""
_VQA = """\
examples:
  blip2 eval vqa --questions v2_OpenEnded_mscoco_val2014_questions.json \\
      --annotations v2_mscoco_val2014_annotations.json --images val2014 --model blip2-flan-t5-xl --output-dir out
  blip2 eval vqa --benchmark gqa --questions testdev_balanced_questions.json --images gqa --model blip2-flan-t5-xl
"""
_RETRIEVAL = """\
examples:
  blip2 eval retrieval --annotations dataset_coco.json --images coco --model blip2-itm-vit-g-coco --output-dir out
  blip2 eval retrieval --annotations dataset_flickr30k.json --images flickr30k-images --model blip2-itm-vit-g-coco
"""


def add_parser(commands: Any) -> None:
    """Adds the command and its tasks to the parser."""
    parser = commands.add_parser(
        "eval",
        help="evaluate on a benchmark",
        description="Evaluate on a benchmark of the paper.",
        epilog=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = parser.add_subparsers(metavar="TASK", required=True)
    _add_captioning(tasks)
    _add_vqa(tasks)
    _add_retrieval(tasks)


# -- options ---------------------------------------------------------------------------------------------------------


def _add_captioning(tasks: Any) -> None:
    parser = new_parser(tasks, "captioning", "describe the images of COCO or NoCaps", _captioning, epilog=_CAPTIONING)
    parser.add_argument("--benchmark", choices=("coco", "nocaps"), default="coco", help="(default: coco)")
    parser.add_argument(
        "--annotations",
        required=True,
        metavar="FILE",
        help="Karpathy's dataset_coco.json, or captions in COCO's format",
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="what the names in the file are relative to")
    parser.add_argument("--split", help="of Karpathy's file (default: test)")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=(*CAPTION_METRICS, "available", "none"),
        default=["available"],
        metavar="NAME",
        help=f"some of {', '.join(CAPTION_METRICS)}; or available, none (default: available)",
    )
    _add_generation(parser, presets=("paper", "lavis"))
    parser.add_argument("--prompt", help='text that the model continues, "" for none (default: the preset\'s)')
    _add_run(parser, batch_size=16, unit="images")
    add_model_options(parser, default="blip2-tiny-opt", released="blip2-opt-2.7b-coco")
    parser.set_defaults(wrong=parser.error)


def _add_vqa(tasks: Any) -> None:
    parser = new_parser(tasks, "vqa", "answer the questions of VQAv2, OK-VQA or GQA", _vqa, epilog=_VQA)
    parser.add_argument("--benchmark", choices=("vqav2", "okvqa", "gqa"), default="vqav2", help="(default: vqav2)")
    parser.add_argument("--questions", required=True, metavar="FILE", help="the benchmark's question file")
    parser.add_argument("--annotations", metavar="FILE", help="its answers (GQA's are in the question file)")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of the images")
    parser.add_argument(
        "--image-pattern", metavar="NAME", help="names of the images, such as 'COCO_val2014_{:012d}.jpg'"
    )
    parser.add_argument(
        "--answers-file", metavar="FILE", help="rank these (a line each, or a list in JSON) instead of generating"
    )
    parser.add_argument("--evaluator", choices=("official", "lavis"), help="of VQAv2 and OK-VQA (default: official)")
    _add_generation(parser, presets=("paper", "paper-finetuned", "lavis"))
    parser.add_argument("--prompt", type=template, help="with {} for the question (default: the preset's)")
    _add_run(parser, batch_size=32, unit="questions")
    add_model_options(parser, default="blip2-tiny-opt-vqa", released="blip2-flan-t5-xl")
    parser.set_defaults(wrong=parser.error)


def _add_retrieval(tasks: Any) -> None:
    parser = new_parser(
        tasks, "retrieval", "find the texts of images and the images of texts", _retrieval, epilog=_RETRIEVAL
    )
    parser.add_argument(
        "--benchmark", choices=("coco", "flickr30k", "other"), help="(default: what the file says that it is)"
    )
    parser.add_argument(
        "--annotations",
        required=True,
        metavar="FILE",
        help="Karpathy's dataset_*.json, captions in COCO's format, CSV, TSV",
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="what the names in the file are relative to")
    parser.add_argument("--split", help="of Karpathy's file, or of a table with this column (default: test)")
    group = parser.add_argument_group("scores")
    group.add_argument("--k", type=positive, default=128, metavar="N", help="candidates to re-rank (default: 128)")
    group.add_argument(
        "--rule", choices=("itm+itc", "itm", "itc"), default="itm+itc", help="of the final score (default: itm+itc)"
    )
    group.add_argument("--autocast", choices=("float16", "bfloat16"), help="compute in it (weights: --dtype)")
    group.add_argument(
        "--device-memory", type=float, default=0.0, metavar="GB", help="for keys and values of images (default: 0)"
    )
    group.add_argument(
        "--host-memory", type=float, default=8.0, metavar="GB", help="for those that do not fit (default: 8)"
    )
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", metavar="DIR", help="finished parts, and the report")
    group.add_argument("--batch-size", type=positive, default=64, metavar="N", help="pairs at a time (default: 64)")
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    add_model_options(parser, default="blip2-tiny-itm", released="blip2-itm-vit-g-coco")


def _add_generation(parser: argparse.ArgumentParser, presets: tuple[str, ...]) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--preset", choices=presets, help="prompt and generation (default: paper)")
    group.add_argument(
        "--generate", type=_options, metavar="JSON", help="options of generate, such as '{\"num_beams\": 1}'"
    )
    group.add_argument("--autocast", choices=("float16", "bfloat16"), help="compute in it (weights: --dtype)")


def _add_run(parser: argparse.ArgumentParser, batch_size: int, unit: str) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", metavar="DIR", help="predictions, results for the server, and the report")
    group.add_argument(
        "--batch-size", type=positive, default=batch_size, metavar="N", help=f"{unit} at a time (default: {batch_size})"
    )
    group.add_argument("--num-workers", type=not_negative, default=2, metavar="N", help="that read images (default: 2)")
    group.add_argument("--limit", type=positive, metavar="N", help=f"only the first N {unit}")


def _options(text: str) -> dict[str, Any]:
    """A JSON object from the command line."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}: {error}") from error
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return options


# -- tasks -----------------------------------------------------------------------------------------------------------


def _captioning(args: argparse.Namespace) -> int:
    """Prints the scores of captions."""
    metrics: Any = args.metrics
    if {"available", "none"} & set(metrics):
        if len(metrics) > 1:
            args.wrong("argument --metrics: available and none stand alone")
        metrics = "available" if metrics == ["available"] else ()
    elif len(set(metrics)) < len(metrics):
        args.wrong(f"argument --metrics: one is there twice: {' '.join(metrics)}")
    if args.benchmark == "nocaps" and args.split is not None:
        args.wrong("argument --split: nocaps has a file for each split")

    def evaluate(model: Any, processor: Any, data: Any) -> dict[str, Any]:
        from ..evaluation.captioning import evaluate_captioning
        from ..evaluation.settings import captioning_settings, changed

        settings = captioning_settings(
            args.preset or "paper", args.benchmark, is_encoder_decoder=model.config.is_encoder_decoder
        )
        found = evaluate_captioning(
            model,
            processor,
            data,
            settings=changed(settings, prompt=args.prompt, generate=args.generate, autocast=args.autocast),
            metrics=metrics,
            **_run_options(args),
        )
        return found.report

    def read() -> Any:
        from ..evaluation.caption_benchmarks import coco_benchmark, nocaps_benchmark
        from ..evaluation.captioning import check_captions

        if args.benchmark == "nocaps":
            data = nocaps_benchmark(args.annotations, args.images)
        else:
            data = coco_benchmark(args.annotations, args.images, split=args.split)
        check_captions(data, metrics)
        return data

    return _evaluate(args, read, evaluate)


def _vqa(args: argparse.Namespace) -> int:
    """Prints the accuracy of answers."""
    if args.benchmark == "gqa" and (args.annotations or args.image_pattern or args.evaluator):
        args.wrong("--annotations, --image-pattern and --evaluator are not for gqa")
    if args.evaluator and args.annotations is None:
        args.wrong("argument --evaluator: there are no answers to compare with, give --annotations")
    if args.answers_file is not None and args.generate is not None:
        args.wrong("argument --generate: answers that are given are not generated")
    answers = None if args.answers_file is None else read_answers(args.answers_file)

    def evaluate(model: Any, processor: Any, data: Any) -> dict[str, Any]:
        from ..evaluation.settings import changed, default_vqa_preset, vqa_settings
        from ..evaluation.vqa import evaluate_vqa

        preset = args.preset or default_vqa_preset(model.config.qformer_config.use_qformer_text_input)
        settings = vqa_settings(preset, args.benchmark, is_encoder_decoder=model.config.is_encoder_decoder)
        found = evaluate_vqa(
            model,
            processor,
            data,
            settings=changed(settings, prompt=args.prompt, generate=args.generate, autocast=args.autocast),
            answers=answers,
            evaluator=args.evaluator,
            **_run_options(args),
        )
        return found.report

    def read() -> Any:
        from ..evaluation.question_benchmarks import gqa_benchmark, vqa_benchmark

        if args.benchmark == "gqa":
            return gqa_benchmark(args.questions, args.images)
        return vqa_benchmark(
            args.questions, args.annotations, args.images, name=args.benchmark, pattern=args.image_pattern
        )

    return _evaluate(args, read, evaluate)


def _retrieval(args: argparse.Namespace) -> int:
    """Prints recalls."""
    label: tuple[str, str | None] = ("", None)

    def evaluate(model: Any, processor: Any, data: Any) -> dict[str, Any]:
        from ..evaluation.processes import Processes
        from ..evaluation.reports import save_evaluation, without_nan
        from ..evaluation.retrieval_run import RetrievalSettings, evaluate_retrieval

        settings = RetrievalSettings(
            k=args.k,
            rule=args.rule,
            batch_size=args.batch_size,
            device_memory=args.device_memory,
            host_memory=args.host_memory,
            autocast=args.autocast,
        )
        work = None if args.output_dir is None else Path(args.output_dir, "parts")
        found = evaluate_retrieval(model, processor, data, settings, limit=args.limit, work_folder=work)
        report = without_nan({**found, "benchmark": label[0], "split": label[1]})
        with Processes() as processes:
            processes.on_first(lambda: save_evaluation(args.output_dir, report))
        return report

    def read() -> Any:
        from ..evaluation.benchmark_labels import retrieval_label
        from ..evaluation.retrieval_data import retrieval_set

        nonlocal label
        label = retrieval_label(args.annotations, args.benchmark, args.split)
        return retrieval_set(args.annotations, args.images, split=args.split or "test", name=label[0])

    return _evaluate(args, read, evaluate, retrieval=True)


def _run_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": args.output_dir,
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
        "limit": args.limit,
    }


# -- running ---------------------------------------------------------------------------------------------------------


def _evaluate(
    args: argparse.Namespace,
    read: Callable[[], Any],
    evaluate: Callable[[Any, Any, Any], dict[str, Any]],
    retrieval: bool = False,
) -> int:
    """The whole run; the first process prints, and ends with exit code 2 if something cannot be read."""
    with reading():
        data = read()
    with quiet_libraries(args):
        with loading(args):
            model, processor = _load(args, retrieval)
        with working(args):
            report = evaluate(model, processor, data)
    from ..distributed import process_index
    from ..evaluation.reports import notes, table_rows

    if process_index() == 0:
        for note in notes(report):
            print_error(note)
        print_result(args, report, table_rows(report))
        return 2 if report.get("broken_images") or report.get("skipped") else 0
    return 0  # the first process has said it


def _load(args: argparse.Namespace, retrieval: bool) -> tuple[Any, Any]:
    import os

    import torch

    from ..evaluation.processes import join_processes
    from ..modeling.generation import Blip2ForConditionalGeneration
    from ..modeling.retrieval import Blip2ForImageTextRetrieval
    from ..processing import Blip2Processor

    join_processes()
    device = args.device
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        if device.type != "cpu":
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
    processor = Blip2Processor.from_pretrained(args.model)
    kind = Blip2ForImageTextRetrieval if retrieval else Blip2ForConditionalGeneration
    with unused_parts_missing(args) if retrieval else nullcontext():
        model = kind.from_pretrained(args.model, dtype=args.dtype)
    return model.to(device).eval(), processor
