"""Images per second of `blip2 caption FOLDER` on JPEG files, reading ahead and not.

    python benchmarks/folder.py [--device cpu|cuda] [--dtype float32] [--repeats 3] [--threads 2] [--small]
                                [--photos 12MP 1MP] [--images 16] [--batch-size 8] [--workers 1 2] [--num-beams 5]

Tower of ViT-B's size at 224 px, Q-Former of BERT-base's, OPT of 125 million parameters (random weights), captions of
exactly 10 tokens. The command itself runs, with a model that is loaded already, on folders of the pictures of
`processor.py`, every pixel of which is decoded, as the command does it.

One JSON line per kind of photo, all in turns in one process, medians over the rounds: images/s of `read` (decoding,
resizing and normalising in one thread, nothing else), of `model` (given pixels), of `sum_of_parts` (one after the
other), and of the command with `workers_0` (off) and each `--workers`; `against_off` and `against_sum` are those
command's speed over theirs, round by round. What is printed must be the same with any number of workers.
"""

import argparse
import contextlib
import io
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from common import add_arguments, emit, in_turns, randomise, setting
from processor import write_photos
from tokenizers import pre_tokenizers
from transformers import OPTConfig
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer

import blip2_hf
from blip2_hf.cli import caption, main as blip2
from blip2_hf.image_loading import load_image
from blip2_hf.pipelines.image_to_text import Blip2ImageToTextPipeline
from blip2_hf.presets import CAPTION_PROMPT

PHOTOS = {"12MP": (4000, 3000), "1MP": (1152, 864)}
BASE_SIDE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SMALL_SIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS, QUERIES = 10, 32


def build_pipeline(args: argparse.Namespace) -> Blip2ImageToTextPipeline:
    """The model, with a tokenizer of single bytes."""
    side = SMALL_SIDE if args.small else BASE_SIDE
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<image>", *letters])}
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=["<image>"], **special)
    text = OPTConfig(
        vocab_size=len(vocabulary) if args.small else 50304,
        hidden_size=side["hidden_size"],
        word_embed_proj_dim=side["hidden_size"],
        ffn_dim=side["intermediate_size"],
        num_hidden_layers=side["num_hidden_layers"],
        num_attention_heads=side["num_attention_heads"],
        eos_token_id=vocabulary["</s>"],
    )
    config = blip2_hf.Blip2Config(
        vision_config={**side, "image_size": 224, "patch_size": 16},
        qformer_config={**side, "encoder_hidden_size": side["hidden_size"], "vocab_size": 100},
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=vocabulary["<image>"],
    )
    model = randomise(blip2_hf.Blip2ForConditionalGeneration(config)).requires_grad_(False)
    processor = blip2_hf.Blip2Processor(blip2_hf.Blip2ImageProcessor(size=224), tokenizer, num_query_tokens=QUERIES)
    model = model.to(args.device, getattr(torch, args.dtype))
    return Blip2ImageToTextPipeline(model, processor, device=args.device, batch_size=args.batch_size)


def write_folder(folder: Path, size: tuple[int, int], images: int) -> list[str]:
    """A folder of JPEG files, each picture several times."""
    pictures = write_photos(folder.parent, size)
    folder.mkdir()
    for number in range(images):
        shutil.copyfile(pictures[number % len(pictures)], folder / f"{number:05}.jpg")
    return [str(path) for path in sorted(folder.iterdir())]


def command(pipe: Blip2ImageToTextPipeline, folder: str, options: dict[str, int], workers: int) -> str:
    """What `blip2 caption FOLDER` prints."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**options, "workers": workers}.items()]
    printed = io.StringIO()
    with mock.patch.object(caption, "load_pipeline", lambda *_, **__: pipe), contextlib.redirect_stdout(printed):
        assert blip2(["caption", folder, *flags]) == 0
    return printed.getvalue()


def measure(pipe: Blip2ImageToTextPipeline, paths: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Images/s of the parts and of the command."""
    options = {"num_beams": args.num_beams, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    image_processor = pipe.processor.image_processor

    def read() -> list[torch.Tensor]:
        return [image_processor(load_image(path), return_tensors="pt")["pixel_values"][0] for path in paths]

    pixels = read()

    def model() -> list:
        rows = ({"pixel_values": each} for each in pixels)
        return list(pipe(rows, prompt=CAPTION_PROMPT, generate_kwargs=options, progress=False))

    def captions(workers: int) -> str:
        return command(pipe, os.path.dirname(paths[0]), {**options, "batch_size": args.batch_size}, workers)

    runs: dict[str, Callable[[], object]] = {"read": read, "model": model}
    numbers = [0, *args.workers]
    runs |= {f"workers_{number}": lambda number=number: captions(number) for number in numbers}
    printed = {number: captions(number) for number in numbers}
    assert len(set(printed.values())) == 1, "what is printed depends on the workers"
    assert len(printed[0].splitlines()) == len(paths)
    model()
    times = in_turns(runs, args.repeats, args.device)
    times["sum_of_parts"] = [sum(parts) for parts in zip(times["read"], times["model"], strict=True)]
    result: dict[str, float] = {name: round(len(paths) / statistics.median(t), 2) for name, t in times.items()}
    for number in args.workers:
        for name, other in (("off", "workers_0"), ("sum", "sum_of_parts")):
            ratios = [a / b for a, b in zip(times[other], times[f"workers_{number}"], strict=True)]
            result[f"against_{name}_{number}"] = round(statistics.median(ratios), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(repeats=3)
    parser.add_argument("--photos", nargs="+", choices=PHOTOS, default=list(PHOTOS))
    parser.add_argument("--images", type=int, default=16, help="files in a folder")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="settings beside 0")
    parser.add_argument("--num-beams", type=int, default=5)
    args = parser.parse_args()
    facts = {"images": args.images, "batch_size": args.batch_size, "num_beams": args.num_beams}
    emit({"benchmark": "folder", **setting(args), **facts, "cores": os.cpu_count()})
    pipe = build_pipeline(args)
    for name in args.photos:
        with tempfile.TemporaryDirectory() as folder:
            paths = write_folder(Path(folder, "photos"), PHOTOS[name], args.images)
            emit({"photos": name, "unit": "images/s", **measure(pipe, paths, args)})


if __name__ == "__main__":
    main()
