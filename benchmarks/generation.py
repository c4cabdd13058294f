"""Answering questions with beam search: ours against the installed `transformers`, the same weights and tokens.

    python benchmarks/generation.py [--device cpu|cuda] [--dtype float32] [--repeats 5] [--threads 2] [--small]

The paper's setting for visual question answering: batch 8, beam 5, `length_penalty` -1, at most 10 new tokens,
prompts of 10 to 20 tokens behind 32 image tokens. OPT has 24 layers of width 1024, T5 12 + 12 (random weights); tower
and Q-Former are small, so that what is measured is the language model. Both run in turns in one process. One JSON line
per case: `time_ratio` is the median of their time over ours, round by round, `flop_ratio` that of the floating point
operations; `peak_mb` is what a run needs beyond weights and inputs. In float32 the tokens must be identical.
"""

import argparse
import random
import statistics

import torch
from common import add_arguments, emit, flops, in_turns, median_ratio, peak_bytes, randomise, setting
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig, T5Config
from transformers.initialization import no_init_weights

import blip2_hf

QUERIES, BATCH, IMAGE_SIZE = 32, 8, 56
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
QFORMER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODING = {
    "vqa": {"num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 10},
    "caption": {"num_beams": 5, "length_penalty": 1.0, "min_new_tokens": 8, "max_new_tokens": 30},
    "greedy": {"max_new_tokens": 10},
}


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
        )
    width, layers = (128, 2) if small else (1024, 12)
    return T5Config(
        vocab_size=1024 if small else 32128,
        d_model=width,
        d_kv=64,
        d_ff=11 * width // 4,
        num_layers=layers,
        num_heads=width // 64,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )


def build_pair(family: str, args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """`transformers`' model and ours on the same tensors."""
    text = language_config(family, args.small)
    config = Blip2Config(
        vision_config={**VISION, "image_size": IMAGE_SIZE},
        qformer_config={**QFORMER, "vocab_size": 100},
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=text.vocab_size - 1,
    )
    with no_init_weights():
        theirs = Blip2ForConditionalGeneration(config)
    theirs = randomise(theirs).to(args.device, getattr(torch, args.dtype))
    with torch.device("meta"):
        ours = blip2_hf.Blip2ForConditionalGeneration(blip2_hf.Blip2Config.from_dict(config.to_dict()))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    buffers = dict(theirs.named_buffers())
    for name, _ in list(ours.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        ours.get_submodule(owner).register_buffer(leaf, buffers[name], persistent=False)
    return {"ours": ours.eval().requires_grad_(False), "theirs": theirs.requires_grad_(False)}


def prompts(family: str, image_token: int, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """8 images and 8 prompts of 10 to 20 tokens, padded where `transformers` is right about it."""
    numbers = random.Random(0)
    pad = 1 if family == "opt" else 0
    rows = []
    for length in (10, 20, *(numbers.randint(10, 20) for _ in range(BATCH - 2))):
        rows.append([image_token] * QUERIES + [numbers.randint(10, image_token - 1) for _ in range(length)])
    longest = max(len(row) for row in rows)
    blanks = [[pad] * (longest - len(row)) for row in rows]
    left = family == "opt"
    ids = torch.tensor([blank + row if left else row + blank for row, blank in zip(rows, blanks, strict=True)])
    pixels = torch.randn(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    return {
        "pixel_values": pixels.to(args.device, getattr(torch, args.dtype)),
        "input_ids": ids.to(args.device),
        "attention_mask": (ids != pad).long().to(args.device),
    }


def measure(family: str, decoding: str, models: dict, args: argparse.Namespace) -> dict[str, object]:
    inputs = prompts(family, models["ours"].config.image_token_index, args)
    options = DECODING[decoding]
    runs = {name: lambda model=model: model.generate(**inputs, **options) for name, model in models.items()}
    tokens = {name: run() for name, run in runs.items()}
    identical = torch.equal(tokens["ours"], tokens["theirs"])
    if args.dtype == "float32" and not identical:
        raise SystemExit(f"{family} {decoding}: the tokens differ")
    prompt = 0 if models["ours"].config.is_encoder_decoder else inputs["input_ids"].shape[1]
    times = in_turns(runs, args.repeats, args.device)
    operations = {name: flops(run, models[name]) for name, run in runs.items()}
    peak = {name: peak_bytes(run, args.device) for name, run in runs.items()}
    return {
        "language_model": family,
        "decoding": decoding,
        "parameters": sum(weight.numel() for weight in models["ours"].language_model.parameters()),
        "identical_tokens": identical,
        "distinct_tokens": len(tokens["ours"][:, prompt:].unique()),
        "time_ratio": round(median_ratio(times), 2),
        "flop_ratio": round(operations["theirs"] / operations["ours"], 2),
        "seconds": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "gflop": {name: round(value / 1e9, 1) for name, value in operations.items()},
        "peak_mb": {name: None if value is None else round(value / 2**20) for name, value in peak.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--decoding", nargs="+", default=["vqa"], choices=DECODING, help="what to measure")
    args = parser.parse_args()
    emit({"benchmark": "generation", **setting(args)})
    for family in ("opt", "t5"):
        models = build_pair(family, args)
        for decoding in args.decoding:
            emit(measure(family, decoding, models, args))


if __name__ == "__main__":
    main()
