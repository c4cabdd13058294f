"""Are two checkpoints the same model?

    python conversion/verify.py A B [--llm …] [--tower …] [--image FILE] [--text …]

A and B are each a folder or Hub id of ours, of `transformers`' BLIP-2 or of InstructBLIP, the short name of a released
checkpoint, or a `.pth` file of the original. They are loaded one after the other, run on the same pixels and texts and
compared layer by layer: tower, Q-Former, language model, and losses and logits at the end. A `.pth` is computed from
the original's own parameter names by a forward that shares neither names nor modules with ours. Weights stored in
another precision on the other side are rounded to it on both, so that the comparison itself is in float32.

Exit codes: 0 equal, 1 not equal, 2 a side that cannot be read or wrong arguments.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a script: `conversion` is what lies beside it, not what lies in it
    _ROOT = Path(__file__).resolve().parents[1]
    sys.path[0] = str(_ROOT)
    if importlib.util.find_spec("blip2_hf") is None:
        sys.path.insert(1, str(_ROOT / "src"))

import torch

from conversion.compare import (
    compare_weights,
    divergence,
    lose_added_words,
    measures,
    only_one_has,
    unexpected_keys,
)
from conversion.example_inputs import Inputs, example_inputs
from conversion.model_side import NotAModel, run_model
from conversion.original_side import is_original, needs_config, open_original, run_original
from conversion.report import Report
from conversion.sides import LIBRARIES, ORIGINAL, TRANSFORMERS, OpenedSide, Side, open_folder, part_of
from conversion.traces import Recorder, Trace

# The largest relative error of equal results. In float32 it is rounding and its growth over some eighty layers; half
# precision rounds every intermediate result, in other orders on the two sides.
TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 1e-1}


def verify(
    a: Side,
    b: Side,
    *,
    image: str | Path | None = None,
    texts: Sequence[str] | None = None,
    tolerance: float | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> Report:
    """Runs both sides, one after the other, on the same images and texts.

    Args:
        a, b: the sides. A `.pth` of another size than the released ones takes its config from the other side if that
            is a folder and it has none of its own.
        image: file of the first of two images; default: both are drawn.
        texts: one text or two; default: two fixed ones, by the tokenizer of either side, else drawn ids.
        tolerance: the largest relative error of equal results; default: that of `TOLERANCES`.
        dtype: "float32", "float16" or "bfloat16": what is computed in.
        device: where.

    Raises:
        ValueError: for a side that cannot be read or computed, or wrong arguments.
        OSError: for files that cannot be read, and for Hub ids that cannot be reached.
    """
    if dtype not in TOLERANCES:
        raise ValueError(f"`dtype` must be one of {', '.join(TOLERANCES)}, got {dtype!r}")
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    if not 0.0 < tolerance < float("inf"):
        raise ValueError(f"`tolerance` must be a positive number, got {tolerance}")
    opened = [_open(side, other) for side, other in ((a, b), (b, a))]
    names = [f"{o.side.source} (computed by {o.engine})" for o in opened]
    different = [
        f"{name}: {value} in A, {opened[1].facts[name]} in B"
        for name, value in opened[0].facts.items()
        if value != opened[1].facts[name]
    ]
    if different:
        return Report(*names, tolerance=tolerance, problems=tuple(different))
    inputs = example_inputs(*opened, image=image, texts=texts)
    rounding, notes = _rounding(*opened)
    weights = compare_weights(*opened, rounding)
    notes += weights.notes if weights is not None else []
    problems, beyond_transformers = _other_epsilons(*opened)
    notes += beyond_transformers
    size = inputs.pixels.shape[-1]
    setting = f"computed in {dtype} on {device}; two images of {size} px, texts {inputs.words}"
    report = Report(*names, setting, tolerance, weights=weights)
    options = (inputs, getattr(torch, dtype), device, rounding)
    traces = []
    for letter, side in zip("AB", opened, strict=True):
        try:
            traces.append(_run(side, Recorder(), *options))
        except NotAModel as error:
            problems.append(str(error))
            continue
        problems += unexpected_keys(letter, side, traces[-1])
    if len(traces) < 2:
        return replace(report, problems=tuple(problems), notes=tuple(notes))
    one, other = traces
    lose_added_words(one, other, inputs.labels)
    problems += only_one_has(one, other, (opened[0].engine, opened[1].engine))
    kl = divergence(one, other)
    report = replace(
        report,
        measures=tuple(measures(one, other)),
        losses=_losses(one, other),
        divergence=None if kl is None else (kl.mean().item(), kl.max().item(), len(kl)),
        problems=tuple(problems),
        notes=tuple(notes),
    )
    if report.first_divergence is not None:
        forced = _run(opened[1], Recorder(one), *options)
        lose_added_words(one, forced, inputs.labels)
        report = replace(report, local=tuple(measures(one, forced)))
    return report


def _open(side: Side, other: Side) -> OpenedSide:
    if not is_original(side):
        return open_folder(side)
    if side.config is None and not is_original(other) and needs_config(side):
        side = replace(side, config=other.source)
    return open_original(side)


def _run(side: OpenedSide, recorder: Recorder, inputs: Inputs, dtype: torch.dtype, device: str, rounding) -> Trace:
    """One side's results; its weights are gone afterwards."""
    run = run_original if side.engine == ORIGINAL else run_model
    with _exact_kernels():
        run(side, inputs, recorder, dtype, device, rounding)
    gc.collect()
    return recorder.trace


@contextmanager
def _exact_kernels():
    """Without TF32, which a GPU's convolutions use by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _rounding(a: OpenedSide, b: OpenedSide):
    """(name, tensor) -> the tensor, rounded to the half precisions that its part has on one side only; and why."""
    chains: dict[str, list[torch.dtype]] = {}
    for part in sorted(a.precisions.keys() & b.precisions.keys()):
        if a.precisions[part] != b.precisions[part]:
            both = a.precisions[part] | b.precisions[part]
            chains[part] = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in both]
    notes = [
        f"{part}: the weights of both are rounded to {' and '.join(str(d).removeprefix('torch.') for d in chain)}"
        for part, chain in chains.items()
        if chain
    ]

    def rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        kept = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
        for dtype in chains.get(part_of(name), ()):
            tensor = tensor.to(dtype)
        return tensor.to(torch.float32 if chains.get(part_of(name)) else kept)

    return rounded, notes


def _other_epsilons(a: OpenedSide, b: OpenedSide) -> tuple[list[str], list[str]]:
    """Problems, and notes on what `transformers` has no choice of: it takes the tower's for `ln_vision`."""
    problems, notes = [], []
    for part, epsilon in a.epsilons.items():
        if None not in (epsilon, b.epsilons[part]) and epsilon != b.epsilons[part]:
            forced = part == "ln_vision" and TRANSFORMERS in (a.engine, b.engine)
            said = f"epsilon of the norms, {part}: {epsilon:g} in A, {b.epsilons[part]:g} in B"
            (notes if forced else problems).append(said)
    return problems, notes


def _losses(a: Trace, b: Trace) -> dict[str, tuple[float, float]]:
    return {
        place.removeprefix("end, "): (value.item(), b.places[place].item())
        for place, value in a.places.items()
        if place.endswith("loss") and place in b.places
    }


# -- command -----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="verify.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("a", metavar="A", help="folder, Hub id, short name, or .pth of the original")
    add("b", metavar="B", help="the same")
    add("--llm", help="folder or Hub id of the language model, for a stage-2 .pth")
    add("--tower", metavar="PATH", help="the frozen tower, as for convert.py, for a .pth without it")
    add("--config", metavar="DIR", help="BLIP-2's config.json, for a .pth of another size than the released ones")
    add("--tokenizer", help="folder or Hub id of the Q-Former's tokenizer, for a stage-1 .pth")
    for side in "ab":
        add(
            f"--{side}-with",
            choices=LIBRARIES,
            help=f"whose classes compute {side.upper()} (default: transformers', unless they cannot or it is ours)",
        )
    add("--image", metavar="FILE", help="the first of the two images (default: both are drawn)")
    add("--text", action="append", help="the first text; once more: the second (default: two fixed ones)")
    add("--tolerance", type=float, help="largest relative error of equal results (default: 1e-4 in float32)")
    add("--dtype", choices=sorted(TOLERANCES), default="float32", help="to compute in (default: float32)")
    add("--device", default="cpu", help="cpu (default), cuda, …")
    args = parser.parse_args(argv)
    try:
        sides = [_side(args.a, args, args.a_with), _side(args.b, args, args.b_with)]
        report = verify(
            *sides,
            image=args.image,
            texts=args.text,
            tolerance=args.tolerance,
            dtype=args.dtype,
            device=args.device,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(report)
    return 0 if report.equal else 1


def _side(source: str, args: argparse.Namespace, library: str | None) -> Side:
    """A file of the original gets what it lacks."""
    side = Side(source, library=library)
    if not is_original(side):
        return side
    from conversion.tensor_sources import open_weights

    has_tower = any(name.startswith("visual_encoder.") for name in open_weights(source, "source").infos)
    tower = None if has_tower else args.tower
    return replace(side, llm=args.llm, tower=tower, config=args.config, tokenizer=args.tokenizer)


if __name__ == "__main__":
    sys.exit(main())
