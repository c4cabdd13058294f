"""One training step of stage 1 (forward and backward): ours against the original procedure, on the same weights.

    python benchmarks/stage1_step.py [--device cpu|cuda] [--dtype float32] [--repeats 5] [--threads 2]
        [--batch-sizes 8 16] [--flops-only] [--small]
    python benchmarks/stage1_step.py --whole --device cuda --dtype bfloat16 [--largest 4096] [--compile MODE]

The Q-Former of the paper (12 layers of width 768, 32 queries, 30,523 words; random weights) on given image features
[B, 257, 1408], which get a gradient (the norm before them is trained). Captions are padded to 32 tokens and have the
lengths of `CAPTION_LENGTHS` ([CLS] and [SEP] included; repeated for larger batches). The peer (`original_stage1.py`)
runs separate passes with keys and values projected anew, all 32 positions and all of the last layer, without the
bookkeeping of a model class, with whichever of eager and fused attention is faster. Both get the same negatives and
no dropout; the losses and a sample of the gradients (`SAMPLED`) must be equal in float32. In half precision, where
both are rounded, ours must not be farther from the float32 ones than theirs are, times `ROUNDED_ALIKE` (numbers: than
theirs are at most).

One JSON line per batch size: `time_ratio` is the median of their time over ours, round by round; `gflop` the floating
point operations of a forward, `gflop_step` those of forward and backward; `gflop_passes` splits a forward: what
matching (`itm`) and captioning (`itg`) add to the contrastive loss, whose text and query passes are the rest;
`peak_mb` what a step needs beyond weights and inputs (gradients of the weights included). In half precision the
weights stay float32 and autocast is used. Takes about 15 minutes on 2 CPU cores, 4 with `--flops-only`.

`--whole` times the whole step of ours instead, with the ViT-g and the optimiser: see `whole_stage1.py`.
"""

import argparse
from collections.abc import Callable

import torch
from common import add_arguments, compared, emit, flops, in_turns, peak_mb, randomise, seconds, setting
from limits import MODES
from original_stage1 import KERNELS, OriginalStage1
from torch.utils.flop_counter import FlopCounterMode

import blip2_hf

# Mean 11.9 over the first 8 and 12.1 over all, longest 17.
CAPTION_LENGTHS = (12, 10, 17, 11, 13, 9, 12, 11, 14, 10, 12, 11, 15, 9, 15, 12)
PADDED_LENGTH = 32
CLS, SEP, FIRST_WORD = 101, 102, 1000
TOLERANCE = 1e-4  # in float32, relative; of gradients in the 2-norm
ROUNDED_ALIKE = 1.5
SAMPLED = (
    "query_tokens",
    "temperature",
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "vision_projection.weight",
    "text_projection.weight",
    "itm_head.weight",
    "lm_head.dense.weight",
    "lm_head.decoder.bias",
    "qformer.layernorm.weight",
    *(
        f"qformer.encoder.layer.{layer}.{name}"
        for layer in (0, -2, -1)
        for name in (
            "attention.attention.query.weight",
            "attention.attention.value.weight",
            "crossattention.attention.key.weight",
            "crossattention.attention.value.weight",
            "intermediate.dense.weight",
            "output_query.dense.weight",
        )
    ),
)


def config_of(small: bool) -> blip2_hf.Blip2Config:
    """The paper's, with a tower of one layer, as its features are given."""
    vision = {"num_hidden_layers": 1, "intermediate_size": 64}
    if small:
        vision |= {"hidden_size": 64, "num_attention_heads": 4, "image_size": 56}
    shape = {"num_hidden_layers": 4, "hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 384}
    return blip2_hf.Blip2Config(
        vision_config=vision,
        qformer_config={"vocab_size": 30523, "use_qformer_text_input": True, **(shape if small else {})},
    )


def build(args: argparse.Namespace, config: blip2_hf.Blip2Config) -> blip2_hf.Blip2ForImageTextRetrieval:
    model = randomise(blip2_hf.Blip2ForImageTextRetrieval(config))
    wider = (768 / config.qformer_config.hidden_size) ** 0.5  # small models: weights that pass on as much
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(wider if parameter.ndim > 1 else 1.0)
        model.temperature.fill_(config.temperature_init)
    return model.to(args.device)


def captions(batch: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random words, [CLS] first and [SEP] last, padded to `PADDED_LENGTH`."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([CAPTION_LENGTHS[row % len(CAPTION_LENGTHS)] for row in range(batch)])
    mask = (torch.arange(PADDED_LENGTH) < lengths[:, None]).long()
    ids = torch.randint(FIRST_WORD, vocabulary - 1, mask.shape, generator=generator)
    ids[:, 0] = CLS
    ids[torch.arange(batch), lengths - 1] = SEP
    return {"input_ids": ids * mask, "attention_mask": mask}


def inputs_of(batch: int, config: blip2_hf.Blip2Config, device: str) -> dict[str, torch.Tensor]:
    """Text, image features and negatives (each row's neighbours).

    The features have a mean of their own per image: of pure noise attention would leave nothing, images would look the
    same, and the contrastive loss would have hardly a gradient to compare.
    """
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(batch, tokens, vision.hidden_size, generator=generator)
    features += torch.randn(batch, 1, vision.hidden_size, generator=generator)
    inputs = {
        "image_embeds": features,
        **captions(batch, config.qformer_config.vocab_size),
        "negative_image_indices": torch.arange(batch).roll(1),
        "negative_text_indices": torch.arange(batch).roll(-1),
    }
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    inputs["image_embeds"].requires_grad_(True)
    return inputs


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative, in the 2-norm, by name."""
    return {name: ((found[name] - value).norm() / value.norm()).item() for name, value in expected.items()}


def largest(by_name: dict[str, float]) -> dict[str, float]:
    """Of the losses and of the gradients."""
    return {
        kind: float(f"{max(value for name, value in by_name.items() if name.startswith(kind)):.1e}")
        for kind in ("loss", "gradient")
    }


class Case:
    """One batch size: both implementations as functions without arguments."""

    def __init__(self, model: blip2_hf.Blip2ForImageTextRetrieval, batch: int, args: argparse.Namespace):
        self.model, self.args = model, args
        self.dtype = getattr(torch, args.dtype)
        self.inputs = inputs_of(batch, model.config, args.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.args.device, self.dtype, enabled=self.dtype != torch.float32)

    def ours(self, *wanted: str) -> dict[str, torch.Tensor]:
        """Losses by name; without `wanted` all three."""
        for name in ("itc", "itm", "itg"):
            setattr(self.model.config, f"{name}_weight", float(not wanted or name in wanted))
        with self.autocast():
            output = self.model(**self.inputs, return_loss=True)
        losses = {"itc": output.loss_itc, "itm": output.loss_itm, "itg": output.loss_itg}
        return {"loss": output.loss} | {name: loss for name, loss in losses.items() if loss is not None}

    def theirs(self, *wanted: str, attention: str = "sdpa") -> dict[str, torch.Tensor]:
        with self.autocast():
            peer = OriginalStage1(self.model, attention)
            losses = peer.losses(**self.inputs, wanted=wanted or ("itc", "itm", "itg"))
        return {"loss": sum(losses.values()), **losses}

    def step(self, forward: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        self.clear()
        losses = forward()
        losses["loss"].backward()
        return losses

    def alone(self, forward: Callable[[], dict[str, torch.Tensor]]) -> None:
        """A step that leaves no gradients behind, so that the memory for them counts as its own."""
        self.step(forward)
        self.clear()

    def clear(self) -> None:
        self.model.zero_grad()
        self.inputs["image_embeds"].grad = None

    def check_equal(self) -> dict[str, object]:
        """Largest relative differences of losses and of sampled gradients: between both in float32, and in half
        precision of each from the float32 one.

        Raises:
            SystemExit: if they are beyond `TOLERANCE`, or ours beyond theirs times `ROUNDED_ALIKE`.
        """
        wanted, self.dtype = self.dtype, torch.float32
        exact = self.losses_and_gradients(self.ours)
        result = self.checked(exact, self.losses_and_gradients(self.theirs), {})
        self.dtype = wanted
        if wanted == torch.float32:
            return result
        theirs = differences(self.losses_and_gradients(self.theirs), exact)
        # One number may be right by chance.
        numbers = {name for name, value in exact.items() if value.numel() == 1}
        most = max(theirs[name] for name in numbers)
        allowed = {name: most if name in numbers else value for name, value in theirs.items()}
        ours = self.checked(self.losses_and_gradients(self.ours), exact, allowed)
        return {"float32": result, "ours": ours, "theirs": largest(theirs)}

    def losses_and_gradients(self, forward: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        losses = {f"loss {name}": loss.detach().clone() for name, loss in self.step(forward).items()}
        gradients = self.sampled_gradients().items()
        return losses | {f"gradient of {name}": gradient.float().clone() for name, gradient in gradients}

    @staticmethod
    def checked(
        found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], allowed: dict[str, float]
    ) -> dict[str, float]:
        """The largest differences; each may be as large as `TOLERANCE` or what is `allowed` times `ROUNDED_ALIKE`."""
        by_name = differences(found, expected)
        for name, value in by_name.items():
            if not value <= max(TOLERANCE, ROUNDED_ALIKE * allowed.get(name, 0.0)):  # so that NaN fails, too
                raise SystemExit(f"{name} differs by {value:.1e} (relative)")
        return largest(by_name)

    def sampled_gradients(self) -> dict[str, torch.Tensor]:
        parameters, layers = dict(self.model.named_parameters()), self.model.config.qformer_config.num_hidden_layers
        names = [name.replace(".-2.", f".{layers - 2}.").replace(".-1.", f".{layers - 1}.") for name in SAMPLED]
        gradients = {name: parameters[name].grad for name in names if name in parameters}
        return gradients | {"image_embeds": self.inputs["image_embeds"].grad}


def pass_flops(case: Case, name: str) -> dict[str, float]:
    """GFLOP of a forward by pass, of "ours" or "theirs"."""

    def count(*wanted: str) -> int:
        return flops(
            lambda: case.ours(*wanted) if name == "ours" else case.theirs(*wanted, attention="eager"),
            case.model.qformer,
        )

    text = our_text_flops(case) if name == "ours" else their_text_flops(case)
    contrastive, matching, everything = count("itc"), count("itc", "itm"), count()
    parts = {
        "query": contrastive - text,
        "text": text,
        "itm": matching - contrastive,
        "itg": everything - matching,
    }
    return {part: round(value / 1e9, 2) for part, value in parts.items()}


def their_text_flops(case: Case) -> int:
    text = case.inputs["input_ids"], case.inputs["attention_mask"]
    return flops(lambda: OriginalStage1(case.model, "eager").text_pass(*text), case.model.qformer)


def our_text_flops(case: Case) -> int:
    """Of the Q-Former's call without queries, while only the contrastive loss is computed."""
    calls: list[list[int]] = []  # query length, operations before, operations after
    counter = FlopCounterMode(display=False)
    hooks = [
        case.model.qformer.register_forward_pre_hook(
            lambda module, args, options: calls.append([options.get("query_length"), counter.get_total_flops()]),
            with_kwargs=True,
        ),
        case.model.qformer.register_forward_hook(lambda *_: calls[-1].append(counter.get_total_flops())),
    ]

    def run() -> None:
        with counter:
            case.ours("itc")

    flops(run, case.model.qformer)  # for its eager attention
    for hook in hooks:
        hook.remove()
    return sum(after - before for query_length, before, after in calls if query_length == 0)


def measure(model: blip2_hf.Blip2ForImageTextRetrieval, batch: int, args: argparse.Namespace) -> dict[str, object]:
    case = Case(model, batch, args)
    difference = case.check_equal()  # warms up as well
    lengths = case.inputs["attention_mask"].sum(1).float()
    record: dict[str, object] = {
        "batch": batch,
        "caption_tokens": {"mean": round(lengths.mean().item(), 2), "longest": int(lengths.max())},
        "losses": {name: round(loss.item(), 4) for name, loss in case.ours().items()},
        "relative_difference": difference,
    }
    if not args.flops_only:
        theirs = {name: lambda name=name: case.theirs(attention=name) for name in KERNELS}

        def tried(name: str) -> float:
            return min(seconds(lambda: case.step(theirs[name]), args.device) for _ in range(2))

        kernel = min(KERNELS, key=tried)
        forwards = {"ours": case.ours, "theirs": theirs[kernel]}
        runs = {name: lambda forward=forward: case.step(forward) for name, forward in forwards.items()}
        times = in_turns(runs, args.repeats, args.device)
        case.clear()
        runs = {name: lambda forward=forward: case.alone(forward) for name, forward in forwards.items()}
        record |= {"peer_attention": kernel, **compared(times), "peak_mb": peak_mb(runs, args.device)}
    passes = {name: pass_flops(case, name) for name in ("ours", "theirs")}
    step = {
        "ours": flops(lambda: case.step(case.ours), model.qformer),
        "theirs": flops(lambda: case.step(lambda: case.theirs(attention="eager")), model.qformer),
    }
    return record | {
        "gflop": {name: round(sum(parts.values()), 1) for name, parts in passes.items()},
        "gflop_passes": passes,
        "gflop_step": {name: round(value / 1e9, 1) for name, value in step.items()},
        "flop_share": round(step["ours"] / step["theirs"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="default: 8 16; with --whole: 100")
    parser.add_argument("--flops-only", action="store_true", help="compare and count, without timing")
    parser.add_argument("--whole", action="store_true", help="time the whole step of ours, with ViT-g and optimiser")
    parser.add_argument("--largest", type=int, metavar="MOST", help="with --whole: look for the largest batch up to it")
    parser.add_argument("--compile", choices=MODES, help="with --whole: once more with the tower compiled")
    parser.add_argument("--peak-tflops", type=float, help="with --whole: of the device, if it is not a known one")
    args = parser.parse_args()
    emit({"benchmark": "stage1_step", "whole": args.whole, "caption_lengths": CAPTION_LENGTHS, **setting(args)})
    if args.whole:
        from whole_stage1 import measure_whole

        for record in measure_whole(args):
            emit(record)
        return
    model = build(args, config_of(args.small))
    for batch in args.batch_sizes or (8, 16):
        emit(measure(model, batch, args))


if __name__ == "__main__":
    main()
