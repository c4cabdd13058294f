"""Sources of weights: single files, shards, folders and what is wrong with them; memory that is given back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import conversion.tensor_sources as tensor_sources
from conversion.steps import TensorInfo
from conversion.tensor_sources import Sources, open_weights

WEIGHTS = {
    "query_tokens": torch.randn(1, 4, 8),
    "temp": torch.tensor(0.07),
    "ids": torch.arange(5)[None],
    "half": torch.randn(3).to(torch.bfloat16),
}
INFOS = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in WEIGHTS.items()}


def halves() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    names = list(WEIGHTS)
    return {name: WEIGHTS[name] for name in names[:2]}, {name: WEIGHTS[name] for name in names[2:]}


def write(folder: Path, layout: str) -> Path:
    """What `open_weights` is given for a layout."""
    if layout == "pth":
        torch.save({"model": WEIGHTS, "epoch": 1}, folder / "model.pth")
        return folder / "model.pth"
    if layout == "old pth":
        torch.save(WEIGHTS, folder / "model.pth", _use_new_zipfile_serialization=False)
        return folder / "model.pth"
    if layout == "safetensors file":
        save_file(WEIGHTS, folder / "any.safetensors")
        return folder / "any.safetensors"
    if layout == "folder":
        save_file(WEIGHTS, folder / "model.safetensors")
    elif layout == "pickle folder":
        torch.save(WEIGHTS, folder / "pytorch_model.bin")
    else:
        end, write_one = ("bin", torch.save) if layout == "pickle shards" else ("safetensors", save_file)
        stem = "pytorch_model" if end == "bin" else "model"
        places = {}
        for number, part in enumerate(halves(), start=1):
            file = f"{stem}-{number:05d}-of-00002.{end}"
            write_one(part, folder / file)
            places |= dict.fromkeys(part, file)
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize(
    "layout", ["pth", "old pth", "safetensors file", "folder", "shards", "pickle folder", "pickle shards"]
)
def test_layouts(tmp_path, layout):
    weights = open_weights(write(tmp_path, layout))
    assert weights.infos == INFOS
    assert weights.nbytes == 4 * 8 * 4 + 4 + 5 * 8 + 3 * 2
    assert weights.is_pth == layout.endswith("pth")
    assert [file.mapped for file in weights.files] == [layout != "old pth"] * len(weights.files)
    for _ in range(2):
        for name, tensor in WEIGHTS.items():
            assert torch.equal(weights.read(name), tensor)
    with pytest.raises(KeyError):
        weights.read("none")


def test_several_under_one_namespace(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    parts = {"bridge": open_weights(write(tmp_path / "a", "pth")), "llm": open_weights(write(tmp_path / "b", "shards"))}
    sources = Sources(parts)
    assert sources.infos() == {f"{part}:{name}": info for part in parts for name, info in INFOS.items()}
    assert torch.equal(sources.read("llm:half"), WEIGHTS["half"])
    assert torch.equal(sources.read("bridge:temp"), WEIGHTS["temp"])


@pytest.mark.parametrize("layout", ["pth", "shards"])
def test_files_are_opened_anew_after_a_while(tmp_path, monkeypatch, layout):
    """So that the pages that were read leave the process."""
    monkeypatch.setattr(tensor_sources, "REOPEN_AFTER", 100)
    opened = []
    for name in ("open_pth", "safe_open"):
        original = getattr(tensor_sources, name)
        monkeypatch.setattr(
            tensor_sources,
            name,
            lambda path, original=original, **options: opened.append(path) or original(path, **options),
        )
    weights = open_weights(write(tmp_path, layout))
    opened.clear()
    for name in [*WEIGHTS, "temp", "query_tokens"]:  # the first alone is over 100 bytes
        assert torch.equal(weights.read(name), WEIGHTS[name])
    assert len(opened) == (2 if layout == "pth" else 3)


# -- what is wrong -----------------------------------------------------------------------------------------------------


def test_missing_shard(tmp_path):
    write(tmp_path, "shards")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors of .* is missing, model.safetensors.index"):
        open_weights(tmp_path)


def test_shard_without_what_the_index_names(tmp_path):
    write(tmp_path, "shards")
    save_file({"half": WEIGHTS["half"]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors lacks 1 tensors .* such as 'ids'"):
        open_weights(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": {"a": 3}}'])
def test_broken_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="index.json is not an index of weight files"):
        open_weights(tmp_path)


@pytest.mark.parametrize("layout", ["folder", "pth"])
def test_truncated_file(tmp_path, layout):
    name = write(tmp_path, layout)
    file = name / "model.safetensors" if layout == "folder" else name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"(truncated or )?damaged"):
        open_weights(name)


def test_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match="`--llm` .* has no weights: none of model.safetensors"):
        open_weights(tmp_path, "--llm")


def test_part_of_a_checkpoint(tmp_path):
    save_file(WEIGHTS, tmp_path / "connector.safetensors")
    with pytest.raises(ValueError, match="holds only what was trained"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["none.pth", "eva_vit_g.pth", "folder/none.safetensors"])
def test_no_such_file(name):
    with pytest.raises(ValueError, match=f"`--tower` {name} does not exist"):
        open_weights(name, "--tower")


def test_no_such_folder():
    with pytest.raises(
        ValueError, match="`SOURCE` must be a file, a folder or a Hub id, but there is no folder './none'"
    ):
        open_weights("./none")


def test_file_of_another_kind(tmp_path):
    (tmp_path / "model.h5").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"model.h5 must be one of .pth, .pt, .bin, .safetensors"):
        open_weights(tmp_path / "model.h5")


def test_adapter_beside_the_weights(tmp_path):
    """`transformers` would load it, so that the weights alone are another model."""
    (write(tmp_path, "folder") / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has an adapter of peft \(adapter_config.json\); merge it into its weights"):
        open_weights(tmp_path)


def test_what_is_not_in_the_cache():
    with pytest.raises(ValueError, match=r"`--llm` me/none is no folder here, and on the Hub or \(offline\) in its"):
        open_weights("me/none", "--llm")


@pytest.mark.parametrize("name", ["no name!", "a/b/c", "folder"])
def test_neither_a_path_nor_an_id(name):
    with pytest.raises(ValueError, match=f"`SOURCE` must be a file, a folder or a Hub id, got '{name}'"):
        open_weights(name)


def test_short_name_of_what_is_not_on_the_hub():
    with pytest.raises(ValueError, match="it must be converted from the original file 'blip2_pretrained_vitL.pth'"):
        open_weights("blip2-itm-vit-l")
