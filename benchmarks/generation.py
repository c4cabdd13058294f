"""Questions and captions with beam search: ours against the installed `transformers`, the same weights and tokens.

    python benchmarks/generation.py [--device cpu|cuda] [--dtype float32] [--repeats 5] [--threads 2] [--small]
                                    [--cases vqa-short vqa caption questions] [--models opt t5 t5-large]
                                    [--no-onednn]
    python benchmarks/generation.py --device cuda --dtype bfloat16 --batch-sizes 8 64 --cases vqa-short caption \\
        --models blip2-opt-2.7b blip2-flan-t5-xl

Cases, all with beam 5 and 32 image tokens before the text:

- vqa-short: the paper's setting for visual question answering (batch 8 or `--batch-sizes`, `length_penalty` -1, at most
  10 new tokens, questions of 10 to 20 tokens), a model that ends its answers after about two tokens;
- vqa: the same, a model that never ends them, so that there are ten;
- caption: likewise a batch of 8, prompts of 4 tokens, captions of 20;
- questions: 5 questions about each of 2 images, with a tower of ViT-B's size and a Q-Former of BERT-base's; short
  answers. Theirs reads an image once per question, as its `generate` wants one per row.

OPT has 24 layers of width 1024, T5 12 + 12 or, with "t5-large", 24 + 24 (random weights, logits as peaked as a trained
model's); but for "questions", tower and Q-Former are small, so that what is measured is the language model. Released
checkpoints by name are of full size in all parts (random weights, too). "Ends" means that from the third token on the
end has probability 0.7, put there by a hook on either model's logits.

Both run in turns in one process. One JSON line per case: `time_ratio` is the median of their time over ours, round by
round, `flop_ratio` that of the floating point operations; `peak_mb` is what a run needs beyond weights and inputs;
`positions` counts what the language model's layers computed (of an encoder-decoder: the decoder's). In float32 the
tokens must be identical; a half-precision run looks at that first, in float32 with 8 rows (10 of "questions";
`identical_rows_float32`, at least 0.75), and says which share of its own rows is identical (`identical_rows`: products
are rounded otherwise in batches of another shape). `--compile` measures everything once more with our language model
under torch.compile (for shapes of any size: rows leave, and keys are added at every step).
Part of the time ratio, on processors by AMD, is that ours computes large layers with oneDNN
(`blip2_hf.modeling.linears`): with `--no-onednn` it does not.
"""

import argparse
import contextlib
import gc
import math
import random
from collections.abc import Iterator

import torch
from common import add_arguments, compared, emit, flops, held_bytes, in_turns, peak_mb, randomise, setting
from limits import MODES
from stage2_models import adopt, config_of, ours as released, theirs as around
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig, T5Config
from transformers.initialization import no_init_weights

import blip2_hf
from blip2_hf.checkpoints import CHECKPOINTS
from blip2_hf.modeling.linears import onednn_is_faster

QUERIES, BATCH, BEAMS = 32, 8, 5
SMALL_SIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
BASE_SIDE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VQA = {"num_beams": BEAMS, "length_penalty": -1.0, "max_new_tokens": 10}
CAPTION = {"num_beams": BEAMS, "length_penalty": 1.0, "min_new_tokens": 8, "max_new_tokens": 20}
# options, whether answers end after two tokens, tokens of text, rows (None: as many as wished), rows per image
CASES = {
    "vqa-short": (VQA, True, (10, 20), None, 1),
    "vqa": (VQA, False, (10, 20), None, 1),
    "caption": (CAPTION, False, (4, 4), None, 1),
    "questions": (VQA, True, (10, 20), 10, 5),
}
PLAIN = ("opt", "t5", "t5-large")
RELEASED = tuple(name for name, entry in CHECKPOINTS.items() if entry.kind == "generation")
END = 2
# Standard deviation of the logits: the likeliest token then has a probability of 0.1 to 0.3.
PEAKED = 4.0


def language_config(family: str, small: bool):
    if family == "opt":
        width, layers = (128, 2) if small else (1024, 24)
        return OPTConfig(
            vocab_size=1024 if small else 50304,
            hidden_size=width,
            word_embed_proj_dim=width,
            ffn_dim=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            eos_token_id=END,
        )
    width, layers = (128, 2) if small else (1024, 24 if family == "t5-large" else 12)
    return T5Config(
        vocab_size=1024 if small else 32128,
        d_model=width,
        d_kv=64,
        d_ff=11 * width // 4,
        num_layers=layers,
        num_heads=width // 64,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        eos_token_id=END,
    )


def build_pair(family: str, large_tower: bool, args: argparse.Namespace) -> dict[str, nn.Module]:
    """`transformers`' model and ours on the same parameter objects, in float32."""
    if family in RELEASED:
        config = config_of(family, "small" if args.small else "full")
        config.text_config.eos_token_id = END
        model = released(config, args.device, torch.float32).requires_grad_(False)
        return {"ours": model, "theirs": sharpened(around(model))}
    text = language_config(family, args.small)
    vision, qformer = {**SMALL_SIDE, "image_size": 56}, {**SMALL_SIDE, "vocab_size": 100}
    if large_tower and not args.small:
        vision, qformer = {**BASE_SIDE, "image_size": 224, "patch_size": 16}, {**BASE_SIDE, "vocab_size": 100}
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=text.vocab_size - 1,
    )
    with no_init_weights():
        theirs = Blip2ForConditionalGeneration(config)
    theirs = sharpened(randomise(theirs.to(args.device)))
    with torch.device("meta"):
        ours = blip2_hf.Blip2ForConditionalGeneration(blip2_hf.Blip2Config.from_dict(config.to_dict()))
    adopt(ours, theirs)
    buffers = dict(theirs.named_buffers())
    for name, _ in list(ours.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        ours.get_submodule(owner).register_buffer(leaf, buffers[name], persistent=False)
    return {"ours": ours.eval().requires_grad_(False), "theirs": theirs.requires_grad_(False)}


@torch.no_grad()
def sharpened(model: nn.Module) -> nn.Module:
    """With the last norm before the vocabulary scaled such that its logits are peaked."""
    language_model, ids = model.language_model, torch.arange(10, 42, device=model.query_tokens.device)[None]
    seq2seq = language_model.config.is_encoder_decoder
    logits = language_model(input_ids=ids, **({"decoder_input_ids": ids} if seq2seq else {})).logits
    norm = (language_model.decoder if seq2seq else language_model.model.decoder).final_layer_norm
    norm.weight.mul_(PEAKED / logits.std(dim=-1).mean())
    return model


class Meter:
    """A language model that is watched: how many positions its decoder computes, and, if `ends`, an end of answers
    that has probability 0.7 from the third token on. To be told when a new generation begins."""

    def __init__(self, model: nn.Module, ends: bool):
        self.model, self.ends, self.steps, self.positions = model.language_model, ends, 0, 0
        # of logits from a normal distribution with standard deviation `PEAKED`: their sum's logarithm, and 0.7 : 0.3
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self.end = math.log(vocabulary) + PEAKED**2 / 2 + math.log(0.7 / 0.3)

    def begin(self) -> None:
        self.steps = self.positions = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [self.model.register_forward_hook(self._end), self._layer().register_forward_pre_hook(self._count)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _layer(self) -> nn.Module:
        return (
            self.model.decoder.block[0] if self.model.config.is_encoder_decoder else self.model.model.decoder.layers[0]
        )

    def _count(self, module: nn.Module, args: tuple) -> None:
        self.positions += args[0].shape[:2].numel()

    def _end(self, module: nn.Module, args: tuple, outputs) -> None:
        if self.ends and self.steps > 1:
            outputs.logits[..., END] = self.end
        self.steps += 1


def prompts(
    case: str, models: dict[str, nn.Module], batch: int, device: str, dtype: torch.dtype
) -> dict[str, dict[str, torch.Tensor]]:
    """What each is given: images and texts, padded where `transformers` is right about it."""
    _, _, (shortest, longest), rows, per_image = CASES[case]
    rows = rows or batch
    config = models["theirs"].config
    image_token, side = config.image_token_index, config.vision_config.image_size
    numbers = random.Random(0)
    left = not models["ours"].config.is_encoder_decoder
    pad = 1 if left else 0
    lengths = [shortest, longest, *(numbers.randint(shortest, longest) for _ in range(rows - 2))]
    texts = [[image_token] * QUERIES + [numbers.randint(10, image_token - 1) for _ in range(n)] for n in lengths]
    blanks = [[pad] * (QUERIES + longest - len(text)) for text in texts]
    ids = torch.tensor([blank + text if left else text + blank for text, blank in zip(texts, blanks, strict=True)])
    pixels = torch.randn(rows // per_image, 3, side, side, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(device, dtype)
    text = {"input_ids": ids.to(device), "attention_mask": (ids != pad).long().to(device)}
    return {
        "ours": {"pixel_values": pixels, **text},
        "theirs": {"pixel_values": pixels.repeat_interleave(per_image, dim=0), **text},
    }


class Trial:
    """A case with a batch size: both models as functions without arguments (`runs`), while `watching`."""

    def __init__(self, case: str, models: dict[str, nn.Module], batch: int, device: str, dtype: torch.dtype):
        self.case, self.models = case, models
        self.options, ends, _, _, per_image = CASES[case]
        self.inputs = prompts(case, models, batch, device, dtype)
        self.rows = len(self.inputs["ours"]["input_ids"])
        self.meters = {name: Meter(model, ends) for name, model in models.items()}
        images = torch.arange(self.rows // per_image).repeat_interleave(per_image)
        self.image_of_row = None if per_image == 1 else images.to(device)
        self.runs = {"ours": self.ours, "theirs": self.theirs}

    def ours(self) -> torch.Tensor:
        self.meters["ours"].begin()
        model, text = self.models["ours"], dict(self.inputs["ours"])
        pixels = text.pop("pixel_values")
        if self.image_of_row is None:
            return model.generate(pixels, **text, **self.options)
        return model.generate(image_embeds=model.encode_image(pixels)[self.image_of_row], **text, **self.options)

    def theirs(self) -> torch.Tensor:
        self.meters["theirs"].begin()
        return self.models["theirs"].generate(**self.inputs["theirs"], **self.options)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with self.meters["ours"].watching(), self.meters["theirs"].watching():
            yield

    def tokens(self) -> dict[str, torch.Tensor]:
        return {name: run() for name, run in self.runs.items()}


def equal_rows(tokens: dict[str, torch.Tensor]) -> float:
    """Share of rows that are the same."""
    longest = max(each.shape[1] for each in tokens.values())
    ours, theirs = (nn.functional.pad(each, (0, longest - each.shape[1]), value=-1) for each in tokens.values())
    return (ours == theirs).all(dim=1).float().mean().item()


def check(case: str, family: str, models: dict[str, nn.Module], args: argparse.Namespace) -> float:
    """Share of rows with the same tokens in float32. (Of billions of weights one row may meet a tie within rounding.)

    Raises:
        SystemExit: if it is less than three quarters.
    """
    trial = Trial(case, models, BATCH, args.device, torch.float32)
    with trial.watching():
        identical = equal_rows(trial.tokens())
    if identical < 0.75:
        raise SystemExit(f"{family} {case}: the tokens differ in {1 - identical:.0%} of the rows, in float32")
    return round(identical, 3)


def measure(
    case: str, family: str, models: dict[str, nn.Module], batch: int, args: argparse.Namespace, *, count: bool
) -> dict[str, object]:
    """A record; without counted operations where torch's counter does not see them, in compiled code."""
    trial = Trial(case, models, batch, args.device, getattr(torch, args.dtype))
    with trial.watching():
        tokens = trial.tokens()  # warms up as well
        identical = equal_rows(tokens)
        if args.dtype == "float32" and identical < 1:
            raise SystemExit(f"{family} {case}: the tokens differ")
        times = in_turns(trial.runs, args.repeats, args.device) if args.repeats else {}
        operations = {name: flops(run, models[name]) for name, run in trial.runs.items()} if count else {}
        held, peak = held_bytes(args.device), peak_mb(trial.runs, args.device)
    prompt = 1 if models["ours"].config.is_encoder_decoder else trial.inputs["ours"]["input_ids"].shape[1]
    new = tokens["ours"][:, prompt:]
    counted = (
        {
            "flop_ratio": round(operations["theirs"] / operations["ours"], 2),
            "gflop": {name: round(value / 1e9, 1) for name, value in operations.items()},
        }
        if count
        else {}
    )
    return {
        "language_model": family,
        "case": case,
        "rows": trial.rows,
        "parameters": sum(weight.numel() for weight in models["ours"].language_model.parameters()),
        "identical_tokens": identical == 1,
        "identical_rows": round(identical, 3),
        "new_tokens_mean": round((new > END).float().sum(dim=1).mean().item(), 1),
        "distinct_tokens": len(new.unique()),
        **(compared(times) if times else {"time_ratio": None}),
        **counted,
        "steps": {name: meter.steps for name, meter in trial.meters.items()},
        "positions": {name: meter.positions for name, meter in trial.meters.items()},
        "held_mb": round(held / 2**20),
        "peak_mb": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--cases", nargs="+", default=["vqa-short", "vqa", "caption"], choices=CASES)
    parser.add_argument("--models", nargs="+", default=["opt", "t5"], choices=(*PLAIN, *RELEASED), metavar="MODEL")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[BATCH], help='rows, but of "questions"')
    parser.add_argument("--compile", choices=MODES, help="once more with the language model of ours compiled")
    parser.add_argument("--no-onednn", action="store_true", help="ours uses torch's default matrix library, too")
    args = parser.parse_args()
    torch.backends.mkldnn.enabled = not args.no_onednn
    onednn = args.device == "cpu" and not args.no_onednn and onednn_is_faster()
    emit({"benchmark": "generation", **setting(args), "onednn": onednn})
    for family in args.models:
        for large_tower in (False, True):
            cases = [case for case in args.cases if (CASES[case][4] > 1) is large_tower]
            models = build_pair(family, large_tower, args) if cases else {}
            before: dict[str, dict[str, float]] = {case: {} for case in cases}
            if args.dtype != "float32":
                before = {case: {"identical_rows_float32": check(case, family, models, args)} for case in cases}
                for model in models.values():
                    model.to(getattr(torch, args.dtype))
            records = []
            for case in cases:
                for batch in args.batch_sizes if CASES[case][3] is None else [BATCH]:
                    record = measure(case, family, models, batch, args, count=True) | before[case] | {"compiled": "no"}
                    records.append((case, batch, record))
                    emit(record)
            if args.compile is not None and cases:
                models["ours"].language_model.compile(mode=args.compile, dynamic=True)
                for case, batch, record in records:
                    again = measure(case, family, models, batch, args, count=False)
                    emit(record | again | {"compiled": args.compile})
            del models  # before the next are made: two of full size need not fit together
            gc.collect()


if __name__ == "__main__":
    main()
