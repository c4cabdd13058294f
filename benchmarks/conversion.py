"""Memory and time of a conversion that merges three checkpoints: ours, tensor by tensor, against all of it in memory.

    python benchmarks/conversion.py [--repeats 1] [--folder DIR] [--small]

The sources are random, of the original's layout and of real sizes: a stage-2 bridge, EVA ViT-g in float16 and an OPT of
2560 in 8 layers in float16, together 4 GB (the folder needs room for three times as much). Each conversion runs in a
fresh process. One JSON line per case: seconds, `peak_gb` of the whole process (resident memory, mapped pages included),
`largest_shard_gb`, and whether the peak is below the largest shard plus 1 GB. Both must write the same tensors.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import add_measuring_arguments, emit, memory_of_process, on_cpu, reset_peak_rss, setting

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, whose `conversion` is this file

GB = 10**9
TOKENS = 10
SHARD_BYTES = 10**9
DTYPES = {"as in the files": None, "frozen parts in bfloat16": torch.bfloat16}


def write_sources(folder: Path, small: bool) -> int:
    """Bridge, tower, language model and config; returns their bytes."""
    from conversion.configs import target_of
    from conversion.precisions import written_as
    from conversion.steps import TensorInfo, plan
    from conversion.tables import writing_table
    from conversion.writing import Planned, write_shards

    config = bench_config(small)
    (folder / "config.json").write_text(json.dumps(config))
    from blip2_hf.configuration import Blip2Config

    infos = target_of(Blip2Config(**config), "generation").infos
    infos = {
        f"bridge:{name}": TensorInfo(info.shape, written_as(name, info.dtype, frozen=torch.float16))
        for name, info in infos.items()
    }
    theirs = plan(writing_table("lavis", "opt"), infos, "from_ours").steps
    parts: dict[str, dict[str, torch.Tensor]] = {"tower": {}, "bridge": {}}
    language: list[Planned] = []
    for step in theirs:
        prefix, _, rest = step.target.partition(".")
        if prefix == "opt_model":
            if rest != "lm_head.weight":  # tied
                language.append(Planned(rest, TensorInfo(step.shape, step.dtype)))
        elif prefix == "visual_encoder":
            parts["tower"][rest] = drawn(step.shape, step.dtype)
        else:
            counted = step.dtype == torch.int64
            parts["bridge"][step.target] = torch.arange(step.shape[-1])[None] if counted else drawn(step.shape)
    torch.save({"model": parts["bridge"], "epoch": 1}, folder / "bridge.pth")
    torch.save(parts["tower"], folder / "tower.pth")
    (folder / "llm").mkdir()
    shapes = {tensor.name: tensor.info for tensor in language}
    write_shards(folder / "llm", language, lambda name: drawn(shapes[name].shape, shapes[name].dtype), SHARD_BYTES)
    (folder / "llm" / "config.json").write_text(json.dumps(config["text_config"]))
    save_tokenizer(folder / "llm")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bench_config(small: bool) -> dict:
    """Small: the same with few layers."""
    text = {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_attention_heads": 32}
    text |= {"model_type": "opt", "vocab_size": 50272, "num_hidden_layers": 1 if small else 8}
    return {
        "model_type": "blip-2",
        "vision_config": {"model_type": "blip_2_vision_model", "num_hidden_layers": 2 if small else 39},
        "qformer_config": {"num_hidden_layers": 2 if small else 12},
        "text_config": text,
        "image_token_index": TOKENS,
    }


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Cheap values, other ones in every row."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.int32) % 8191 / 8191 - 0.5).to(dtype).reshape(shape)


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {token: n for n, token in enumerate(["<pad>", "</s>", "<unk>", *"abcdefg"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)


# -- one conversion, in its own process --------------------------------------------------------------------------------


def convert_once(how: str, folder: Path, target: Path, dtype: str) -> dict[str, float]:
    from conversion.job import Request, prepare

    given = {"tower": "tower.pth", "llm": "llm", "config": "config.json"}
    request = Request(
        str(folder / "bridge.pth"),
        target,
        dtype=DTYPES[dtype],
        max_shard_bytes=SHARD_BYTES,
        **{option: str(folder / name) for option, name in given.items()},
    )
    job = prepare(request)
    imported = memory_of_process("VmRSS")
    if not reset_peak_rss():
        raise SystemExit("the peak memory of a process can be measured on Linux only")
    begin = time.perf_counter()
    {"streamed": streamed, "in memory": in_memory}[how](job, target)
    return {
        "seconds": time.perf_counter() - begin,
        "peak": memory_of_process("VmHWM"),
        "before": imported,
        "largest_shard": max(path.stat().st_size for path in target.glob("*.safetensors")),
    }


def streamed(job, target: Path) -> None:
    from conversion.results import write_folder
    from conversion.writing import finished_or_nothing

    job.run_checks()
    with finished_or_nothing(target) as made:
        write_folder(job, made, lambda done, total: None)


def in_memory(job, target: Path) -> None:
    """As conversion scripts usually do it: load everything, rename, save. The same tensors."""
    from huggingface_hub import save_torch_state_dict

    loaded = {name: job.sources.read(name).clone() for name in job.sources.infos()}
    job.sources.read = loaded.__getitem__
    state_dict = {tensor.name: job.make(tensor.name).contiguous() for tensor in job.planned}
    target.mkdir()
    save_torch_state_dict(state_dict, target, max_shard_size=SHARD_BYTES)


def fingerprint(target: Path) -> str:
    """Of names and values of all tensors."""
    import hashlib

    from conversion.tensor_sources import open_weights

    weights, state = open_weights(target), hashlib.sha256()
    for name in sorted(weights.infos):
        state.update(name.encode())
        state.update(memoryview(weights.read(name).reshape(-1).view(torch.uint8).numpy()))
    return state.hexdigest()


# -- all of them -------------------------------------------------------------------------------------------------------


def measure(folder: Path, dtype: str, repeats: int) -> dict[str, object]:
    results: dict[str, list[dict[str, float]]] = {"streamed": [], "in memory": []}
    prints = set()
    for index in range(repeats):
        for how in results if index % 2 == 0 else reversed(results):
            with tempfile.TemporaryDirectory(dir=folder) as out:
                target = Path(out) / "made"
                command = [sys.executable, __file__, "--convert-once", how, str(folder), str(target), dtype]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{how} failed:\n{done.stderr[-2000:]}")
                results[how].append(json.loads(done.stdout.splitlines()[-1]))
                if index == 0:
                    prints.add(fingerprint(target))
    if len(prints) != 1:
        raise SystemExit(f"{dtype}: the tensors differ")
    shard = max(result["largest_shard"] for result in results["streamed"])
    peak = max(result["peak"] for result in results["streamed"])
    return {
        "precision": dtype,
        "largest_shard_gb": round(shard / GB, 2),
        "peak_gb": {how: round(max(r["peak"] for r in rows) / GB, 2) for how, rows in results.items()},
        "of_it_before_gb": round(max(result["before"] for result in results["streamed"]) / GB, 2),
        "below_shard_plus_1_gb": peak < shard + GB,
        "seconds": {how: round(statistics.median(r["seconds"] for r in rows), 1) for how, rows in results.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measuring_arguments(parser, repeats=1)
    parser.add_argument(
        "--folder", type=Path, help="where to put the files for the time being (default: a temporary one)"
    )
    hidden = ("HOW", "FOLDER", "TARGET", "DTYPE")
    parser.add_argument("--convert-once", nargs=4, metavar=hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert_once:
        how, folder, target, dtype = args.convert_once
        emit(convert_once(how, Path(folder), Path(target), dtype))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        size = write_sources(Path(name), args.small)
        emit({"benchmark": "conversion", "sources_gb": round(size / GB, 2), **setting(on_cpu(args, "float16"))})
        for dtype in list(DTYPES)[: 1 if args.small else 2]:
            emit(measure(Path(name), dtype, args.repeats))


if __name__ == "__main__":
    main()
