"""Where our time goes: operators of the other benchmarks' cases in groups, and the five that cost most.

    python benchmarks/profile_cases.py [--device cpu|cuda] [--dtype float32] [--repeats 1] [--threads 2] [--small]
                                       [--cases vqa-opt stage1 ...]

Cases: questions and captions with beam search as in generation.py ("vqa-opt": answers of 10 tokens; "full-caption":
captions with OPT-2.7B, by default on cuda only); a training step as in stage1_step.py ("stage1"; "stage1-whole" with
ViT-g and the optimiser, by default on cuda only) and in stage2_step.py; re-ranking as in retrieval.py, the texts of a
few images; a 12-megapixel JPEG file through the image processor, by default and every pixel; `blip2 caption FOLDER` on
four of them without workers.

Each runs once to warm up, once by the clock (`seconds`), and `--repeats` times under torch.profiler, whose run is a
little slower (`profiled_seconds`, of one) and is what shares refer to. `groups`: shares of the time that operators
took themselves, without those that they called; on cuda of that of their kernels. "dispatch" is the rest: Python,
views, and what an operator spends before it computes; on cuda all the time that the device waits. `operators`: the
five that took most, name, share and calls of one run. `matmul_gflops`: what linear layers and convolutions reached;
`best_gflops` in the setting: a product of matrices of 2048 x 2048 in this dtype, the best of ten.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import folder
import generation
import processor
import retrieval
import stage1_step
import stage2_models
import stage2_step
import torch
from common import add_arguments, emit, seconds, setting, synchronise
from profile_groups import Profile, seen_images, summary
from torch.profiler import ProfilerActivity, profile, record_function
from whole_stage1 import WholeStep

from blip2_hf.image_processing import Blip2ImageProcessor

Case = Iterator[Callable[[], object]]


@contextlib.contextmanager
def answers(args: argparse.Namespace, family: str, case: str) -> Case:
    models = generation.build_pair(family, False, args)
    for model in models.values():
        model.to(getattr(torch, args.dtype))
    trial = generation.Trial(case, models, generation.BATCH, args.device, getattr(torch, args.dtype))
    with trial.watching():
        yield trial.ours


@contextlib.contextmanager
def stage1(args: argparse.Namespace) -> Case:
    case = stage1_step.Case(stage1_step.build(args, stage1_step.config_of(args.small)), 8, args)
    yield lambda: case.step(case.ours)


@contextlib.contextmanager
def stage1_whole(args: argparse.Namespace) -> Case:
    step = WholeStep(argparse.Namespace(**{**vars(args), "dtype": "bfloat16"}))
    inputs = step.inputs(4 if args.small else 100)
    yield lambda: step(inputs)


@contextlib.contextmanager
def stage2(args: argparse.Namespace, name: str) -> Case:
    full = args.device == "cuda"
    config = stage2_models.config_of(name, "small" if args.small else "full" if full else "reduced")
    model = stage2_models.ours(config, args.device, getattr(torch, args.dtype))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.05, fused=True)
    case = stage2_step.Case({"ours": model}, optimizer, 64 if full and not args.small else 2, args)
    yield lambda: case.step("ours")


@contextlib.contextmanager
def rerank(args: argparse.Namespace) -> Case:
    images, texts = (64, 320) if args.device == "cuda" and not args.small else (8, 40)
    bench = retrieval.bench_of(argparse.Namespace(**vars(args), images=images), retrieval.caption_lengths(None, texts))
    wanted, _ = retrieval.candidates(bench.similarity, 32)
    matched = images // 2
    wanted[matched:] = False

    @torch.no_grad()
    def run() -> torch.Tensor:
        return bench.ours(wanted, matched)

    yield run


@contextlib.contextmanager
def photo(args: argparse.Namespace, exact: bool) -> Case:
    with tempfile.TemporaryDirectory() as place:
        paths = processor.write_photos(Path(place), processor.SIZES["0.3 MP" if args.small else "12 MP"])
        image_processor = Blip2ImageProcessor(size=224, jpeg_draft=not exact)
        yield lambda: [image_processor(path, return_tensors="pt") for path in paths]


@contextlib.contextmanager
def captions_of_folder(args: argparse.Namespace) -> Case:
    pipe = folder.build_pipeline(argparse.Namespace(**vars(args), batch_size=4))
    options = {"num_beams": 5, "min_new_tokens": folder.TOKENS, "max_new_tokens": folder.TOKENS, "batch_size": 4}
    with tempfile.TemporaryDirectory() as place:
        photos = Path(place, "photos")
        folder.write_folder(photos, folder.PHOTOS["1MP" if args.small else "12MP"], 4)
        yield lambda: folder.command(pipe, str(photos), options, 0)


CASES: dict[str, Callable[[argparse.Namespace], contextlib.AbstractContextManager]] = {
    "vqa-opt": lambda args: answers(args, "opt", "vqa"),
    "caption-opt": lambda args: answers(args, "opt", "caption"),
    "vqa-t5": lambda args: answers(args, "t5", "vqa"),
    "full-caption": lambda args: answers(args, "blip2-opt-2.7b", "caption"),
    "stage1": stage1,
    "stage1-whole": stage1_whole,
    "stage2-opt": lambda args: stage2(args, "blip2-opt-2.7b"),
    "stage2-t5": lambda args: stage2(args, "blip2-flan-t5-xl"),
    "rerank": rerank,
    "photo": lambda args: photo(args, exact=False),
    "photo-exact": lambda args: photo(args, exact=True),
    "folder": captions_of_folder,
}
ON_CUDA_ONLY = ("full-caption", "stage1-whole")


def profiled(run: Callable[[], object], repeats: int, device: str) -> Profile:
    """Of `repeats` runs together."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with seen_images(), profile(activities=activities, with_flops=True, record_shapes=True) as found:
        begin = time.perf_counter()
        with record_function("all runs"):
            for _ in range(repeats):
                run()
            synchronise(device)
        taken = time.perf_counter() - begin
    return Profile(list(found.events()), taken, device == "cuda")


def best_gflops(device: str, dtype: torch.dtype) -> float:
    side = 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / 1e9 / min(seconds(lambda: a @ b, device) for _ in range(10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(repeats=1)
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE")
    args = parser.parse_args()
    described = setting(args)
    best = round(best_gflops(args.device, getattr(torch, args.dtype)), 1)
    emit({"benchmark": "profile", **described, "best_gflops": best})
    for name in args.cases or [name for name in CASES if args.device == "cuda" or name not in ON_CUDA_ONLY]:
        with CASES[name](args) as run:
            run()
            taken = seconds(run, args.device)
            found = profiled(run, args.repeats, args.device)
        emit({"case": name, "seconds": round(taken, 3), **summary(found, args.repeats)})


if __name__ == "__main__":
    main()
