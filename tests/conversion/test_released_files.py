"""Every command of docs/checkpoints.md on files of real size that hold nothing: nothing is written."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from torch.serialization import skip_data

from blip2_hf.checkpoints import CHECKPOINTS
from blip2_hf.configuration import Blip2Config
from conversion.configs import original_vocabulary, target_of
from conversion.convert import main
from conversion.precisions import DTYPE_NAMES
from conversion.steps import Step, plan
from conversion.tables import writing_table

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[2:] for line in TEXT.splitlines() if line.startswith("python conversion/convert.py blip2_")
]
DEFAULT = ("blip2-opt-6.7b", "blip2-itm-vit-l")
LAST_EVA_BLOCK = 39
# Parameters as the issue and the paper's table 2 count them, with tower and language model.
TOTALS = {
    "blip2-opt-6.7b": "7,752,869,376",
    "blip2-flan-t5-xxl": "12,098,000,384",
    "blip2-itm-vit-g": "1,172,654,910",
}


def name_of(command: list[str]) -> str:
    return command[command.index("--to") + 1]


def marked(command: list[str]):
    marks = () if name_of(command) in DEFAULT else pytest.mark.slow
    return pytest.param(command, id=name_of(command), marks=marks)


@pytest.mark.parametrize("command", [marked(command) for command in COMMANDS])
def test_plan_for_files_of_real_size(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    name = name_of(command)
    write_files(name, command)
    before = sorted(tmp_path.rglob("*"))
    assert main([*command, "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    assert f", {name})\n" in said  # told from names, shapes and the name of the file
    assert TOTALS.get(name, "") in said


def write_files(name: str, command: list[str]) -> None:
    """The files that the command names, as sparse files."""
    entry, config = CHECKPOINTS[name], Blip2Config.for_checkpoint(name)
    language = config.text_config.model_type if entry.kind == "generation" else None
    target = target_of(config, entry.kind)
    infos = {f"bridge:{key}": info for key, info in target.infos.items() if key not in target.tied}
    rows = original_vocabulary(config) if language else None
    steps = plan(writing_table("lavis", language), infos, "from_ours", vocabulary=rows).steps
    parts: dict[str, list[tuple[str, Step]]] = {"visual_encoder": [], "language": [], "bridge": []}
    for step in steps:
        prefix, _, rest = step.target.partition(".")
        if prefix == f"{language}_model":
            parts["language"].append((rest, step))
        elif prefix == "visual_encoder":
            parts[prefix].append((rest, step))
        else:
            parts["bridge"].append((step.target, step))
    tower = {rest: torch.empty(step.shape, dtype=torch.float16) for rest, step in parts["visual_encoder"]}
    bridge = {rest: torch.empty(step.shape, dtype=step.dtype) for rest, step in parts["bridge"]}
    if "--tower" in command:
        write_sparse(command[command.index("--tower") + 1], tower | behind_the_tower(tower))
    else:
        bridge |= {f"visual_encoder.{rest}": tensor.float() for rest, tensor in tower.items()}
    write_sparse(command[0], {"model": bridge, "epoch": 9})
    if language:
        write_language_folder(Path(entry.language_model), parts["language"])


def behind_the_tower(tower: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the towers' own files hold and BLIP-2 does not use."""
    if "conv1.weight" in tower:
        return {"ln_post.weight": torch.ones(1024), "ln_post.bias": torch.zeros(1024), "proj": torch.empty(1024, 768)}
    first = "blocks.0."
    last = {k.replace(first, f"blocks.{LAST_EVA_BLOCK}."): t for k, t in tower.items() if k.startswith(first)}
    return last | {"norm.weight": torch.ones(1408), "norm.bias": torch.ones(1408), "head.weight": torch.ones(9, 1408)}


def write_sparse(path: str, content: object) -> None:
    with skip_data():
        torch.save(content, path)


def write_language_folder(folder: Path, tensors: list[tuple[str, Step]]) -> None:
    folder.mkdir(parents=True)
    header, end = {}, 0
    for rest, step in tensors:
        if rest in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):  # tied
            continue
        size = torch.Size(step.shape).numel() * 2
        header[rest] = {"dtype": DTYPE_NAMES[torch.bfloat16], "shape": step.shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
