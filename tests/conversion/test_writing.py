"""Writing: shards tensor by tensor, and a folder that is there as a whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

import conversion.writing as writing
from conversion.steps import TensorInfo
from conversion.tensor_sources import open_weights
from conversion.writing import (
    Planned,
    check_target,
    finished_or_nothing,
    into_shards,
    parse_size,
    readable,
    space_needed,
    unfinished_beside,
    write_shards,
)

TENSORS = {
    "a.weight": torch.randn(5, 3),
    "a.bias": torch.randn(3).to(torch.bfloat16),
    "counter": torch.tensor(7),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
    "half": torch.randn(4, 2).to(torch.float16),
    "scalar": torch.tensor(0.07),
    "turned": torch.randn(3, 4).T,
}


def planned(tensors: dict[str, torch.Tensor]) -> list[Planned]:
    return [Planned(name, TensorInfo(tuple(tensor.shape), tensor.dtype)) for name, tensor in tensors.items()]


def assert_same(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_one_file(tmp_path):
    files = write_shards(tmp_path, planned(TENSORS), TENSORS.__getitem__, 10**6)
    assert files == [tmp_path / "model.safetensors"] and os.listdir(tmp_path) == ["model.safetensors"]
    assert_same(load_file(files[0]))
    source = open_weights(tmp_path)
    assert source.infos == {tensor.name: tensor.info for tensor in planned(TENSORS)}
    assert_same({name: source.read(name) for name in source.infos})


def test_shards_and_their_index(tmp_path):
    files = write_shards(tmp_path, planned(TENSORS), TENSORS.__getitem__, 70)
    assert [file.name for file in files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    size = sum(tensor.numel() * tensor.element_size() for tensor in TENSORS.values())
    assert index["metadata"] == {"total_size": size, "total_parameters": sum(t.numel() for t in TENSORS.values())}
    assert_same({name: load_file(tmp_path / shard)[name] for name, shard in index["weight_map"].items()})
    source = open_weights(tmp_path)
    assert_same({name: source.read(name) for name in source.infos})


def test_cuts_between_shards():
    sizes = {"a": 6, "b": 4, "c": 1, "d": 12, "e": 10}
    tensors = planned({name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()})
    shards = [[tensor.name for tensor in shard] for shard in into_shards(tensors, 10)]
    assert shards == [["a", "b"], ["c"], ["d"], ["e"]]


def test_one_tensor_at_a_time(tmp_path):
    """The one before is gone when the next is asked for."""
    import weakref

    alive = []

    def make(name: str) -> torch.Tensor:
        assert not any(reference() is not None for reference in alive)
        tensor = TENSORS[name].clone()
        alive.append(weakref.ref(tensor))
        return tensor

    write_shards(tmp_path, planned(TENSORS), make, 40)
    assert len(alive) == len(TENSORS)


def test_other_than_planned(tmp_path):
    with pytest.raises(ValueError, match=r"'a' was planned as .*\(3,\).*, but is .*\(4,\)"):
        write_shards(tmp_path, planned({"a": torch.ones(3)}), lambda name: torch.ones(4), 100)
    with pytest.raises(ValueError, match="planned as .*float32.* but is .*float16"):
        write_shards(tmp_path, planned({"a": torch.ones(3)}), lambda name: torch.ones(3).half(), 100)


# -- finished or nothing -----------------------------------------------------------------------------------------------


def test_folder_gets_its_name_at_the_end(tmp_path):
    target = tmp_path / "new" / "model"
    with finished_or_nothing(target) as folder:
        (folder / "weights").write_text("1")
        assert not target.exists() and folder.parent == target.parent
        assert unfinished_beside(target) == [folder]
    assert os.listdir(target) == ["weights"]
    assert os.listdir(target.parent) == ["model"]
    other = tmp_path / "made"
    other.mkdir()
    assert target.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_after_an_error(tmp_path, error):
    target = tmp_path / "model"
    with pytest.raises(error), finished_or_nothing(target) as folder:
        (folder / "weights").write_text("1")
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "broken link"])
def test_existing_target_is_left_alone(tmp_path, kind):
    target = tmp_path / "model"
    if kind == "file":
        target.write_text("mine")
    elif kind == "broken link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir()
    if kind == "folder":
        (target / "README.md").write_text("mine")
    for check in (lambda: check_target(target, 1), lambda: finished_or_nothing(target).__enter__()):
        with pytest.raises(ValueError, match="`--to` .* exists already; nothing is written over it"):
            check()
    assert os.listdir(tmp_path) == ["model"]


def test_target_that_appears_meanwhile(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(ValueError, match="come into being"), finished_or_nothing(target):
        target.mkdir()
    assert os.listdir(tmp_path) == ["model"] and os.listdir(target) == []


# -- disk --------------------------------------------------------------------------------------------------------------


def test_space_is_checked_before(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**8, 10**8))
    target = tmp_path / "deep" / "model"
    check_target(target, 10**8)
    with pytest.raises(ValueError, match=r"needs 1\.5 GB of disk space, but there are 100\.0 MB free, 1\.4 GB too lit"):
        check_target(target, 15 * 10**8)
    assert os.listdir(tmp_path) == []


def test_space_needed_is_enough(tmp_path):
    many = {f"layer.{n}.attention.self.query.weight": torch.empty(3, dtype=torch.uint8) for n in range(2000)}
    write_shards(tmp_path, planned(many), many.__getitem__, 100)
    used = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert used < space_needed(planned(many)) - writing._SMALL_FILES // 2


def test_disk_that_fills_up_meanwhile(tmp_path):
    full = {"a": torch.ones(4), "b": torch.ones(4)}

    def make(name: str) -> torch.Tensor:
        if name == "b":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return full[name]

    with pytest.raises(OSError, match="No space left"), finished_or_nothing(tmp_path / "model") as folder:
        write_shards(folder, planned(full), make, 100)
    assert os.listdir(tmp_path) == []


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2GiB", 2**31), ("300", 300), ("20KB", 20_000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 apples", "0", "0.4", "1e3", "5GB2"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match=r"must be a size such as '5GB'"):
        parse_size(text)


def test_readable_sizes():
    assert [readable(size) for size in (999, 1500, 2_340_000, 12_100_000_000)] == [
        "999 bytes",
        "1.5 kB",
        "2.3 MB",
        "12.1 GB",
    ]
