"""Weights that are converted while they are read: the same values, and no page of the file beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from blip2_hf.modeling import stored_tensors as module
from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from blip2_hf.modeling.stored_tensors import StoredTensor, stored_tensors
from tiny_models import peer_generation

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PIECE = 64
PARTS = ("vision_model", "query_tokens", "qformer", "language_projection", "language_model")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", PIECE)


def written(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Shapes that are no multiple of a piece, more than a page, values that do not fit or are no numbers."""
    special = [0.0, -0.0, 1e-8, -1e-40, 65504.0, 70000.0, -3e38, float("inf"), -float("inf"), float("nan")]
    tensors = {
        "matrix": torch.randn(7, 5, 3),
        "special": torch.tensor(special),
        "one": torch.tensor(1.1),
        "none": torch.empty(0, 4),
        "pages": torch.randn(PIECE, 150),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()} | {"ids": torch.arange(5)}
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("wanted", FLOATS)
def test_values_are_those_of_torch(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path, small_pieces) -> None:
    tensors = written(tmp_path / "file", stored)
    with stored_tensors([tmp_path / "file"]) as found:
        assert found.keys() == tensors.keys() and not isinstance(found["ids"], StoredTensor)
        for name, tensor in tensors.items():
            read = found[name][...].to(device="cpu", dtype=wanted)
            assert read.dtype == wanted and read.shape == tensor.shape
            assert torch.equal(read.nan_to_num(7.0), tensor.to(wanted).nan_to_num(7.0)), name
            assert found[name].get_shape() == list(tensor.shape)
        assert torch.equal(found["matrix"][1:3], tensors["matrix"][1:3])


def test_targets(tmp_path: Path, small_pieces) -> None:
    matrix = written(tmp_path / "file", torch.float16)["matrix"].float()
    with stored_tensors([tmp_path / "file"]) as found:
        assert torch.equal(found["matrix"].read_into(torch.empty(7, 5, 3)), matrix)
        assert torch.equal(found["matrix"].read_into(torch.empty(7, 3, 5).transpose(1, 2)), matrix)


def test_broken_files(tmp_path: Path) -> None:
    written(tmp_path / "file", torch.float32)
    (tmp_path / "short").write_bytes((tmp_path / "file").read_bytes()[:-8])
    with pytest.raises(SafetensorError), stored_tensors([tmp_path / "short"]):
        pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of OPT, in shards, float32."""
    folder = tmp_path_factory.mktemp("sharded")
    peer_generation("opt").save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The precisions that tensors were converted to while they were read."""
    calls, original = [], StoredTensor.read_into

    def read_into(self: StoredTensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(target.dtype)
        return original(self, target)

    monkeypatch.setattr(StoredTensor, "read_into", read_into)
    return calls


def in_files(folder: Path) -> int:
    return sum(len(load_file(path)) for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [*FLOATS, "auto"])
@pytest.mark.parametrize("device_map", [None, "cpu", {**dict.fromkeys(PARTS, "cpu"), "qformer": "disk"}])
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")  # `query_tokens`
def test_models(dtype: torch.dtype | str, device_map, checkpoint: Path, converted: list, tmp_path: Path) -> None:
    """As `transformers` loads them; with its Q-Former in float32 beside float16."""
    options = {"dtype": dtype, "device_map": device_map, "offload_folder": tmp_path}
    ours = Blip2ForConditionalGeneration.from_pretrained(checkpoint, **options)
    count = in_files(checkpoint) if dtype in (torch.float16, torch.bfloat16) else 0
    kept = sum(weight.dtype == torch.float32 for weight in ours.parameters()) if dtype == torch.float16 else 0
    if not isinstance(device_map, dict):  # what stays on the disk need not be read
        assert converted == [dtype] * (count - kept)
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(checkpoint, **options)
    other = theirs.state_dict()
    assert len(other) > 50
    for name, weight in ours.state_dict().items():
        assert weight.dtype == other[name].dtype and weight.device == other[name].device, name
        assert weight.is_meta or torch.equal(weight, other[name]), name


def test_half_precision_into_float32(checkpoint: Path, converted: list, tmp_path: Path) -> None:
    half = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    converted.clear()
    whole = Blip2ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert converted == [torch.float32] * in_files(tmp_path)
    assert whole.language_model.lm_head.weight is whole.language_model.model.decoder.embed_tokens.weight
    for name, weight in half.state_dict().items():
        assert torch.equal(whole.state_dict()[name], weight.float()), name


def test_without_mapping(checkpoint: Path, converted: list) -> None:
    """If asked for, `transformers` reads whole files."""
    ours = Blip2ForConditionalGeneration.from_pretrained(checkpoint)
    read = Blip2ForConditionalGeneration.from_pretrained(checkpoint, disable_mmap=True, dtype=torch.bfloat16)
    assert torch.equal(read.query_tokens, ours.query_tokens.bfloat16()) and not converted


# -- memory ----------------------------------------------------------------------------------------------------------


def status(field: str) -> int:
    """MiB, as Linux counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(f"{field}:"))


def most_memory(run) -> int:
    """MiB beyond those before."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak memory of a process can be measured on Linux only")
    before = status("VmRSS")
    result = run()
    del result
    return status("VmHWM") - before


def test_memory_of_what_is_read(tmp_path: Path) -> None:
    """32 MiB, of a file of 64; through the mapping most of the file is in memory too."""
    save_file({"matrix": torch.ones(16, 2**20)}, tmp_path / "file")
    with stored_tensors([tmp_path / "file"]) as found:
        stored = found["matrix"]
        assert most_memory(lambda: stored.to(dtype=torch.bfloat16)) < 40
        assert most_memory(lambda: stored._stored[...].to(torch.bfloat16)) > 50
