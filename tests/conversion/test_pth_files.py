"""Reading `.pth` files: the original's layout, old and new formats, and what is refused."""

from __future__ import annotations

import collections
import os
from pathlib import Path

import pytest
import torch

from conversion.pth_files import open_pth

WEIGHTS = {"query_tokens": torch.arange(6.0).reshape(1, 2, 3), "temp": torch.tensor(0.07)}


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def saved(folder: Path, content: object, **options: object) -> Path:
    path = folder / "model.pth"
    torch.save(content, path, **options)
    return path


def test_layout_of_the_original(tmp_path):
    content = {
        "model": WEIGHTS,
        "optimizer": {"state": {}},
        "config": {"run": {"lr": 1e-4}},
        "scaler": None,
        "epoch": 9,
    }
    file = open_pth(saved(tmp_path, content))
    assert file.mapped
    assert file.beside == ("optimizer", "config", "scaler", "epoch")
    assert file.tensors.keys() == WEIGHTS.keys()
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in WEIGHTS.items())


def test_state_dict_alone(tmp_path):
    file = open_pth(saved(tmp_path, collections.OrderedDict(WEIGHTS)))
    assert file.beside == () and list(file.tensors) == list(WEIGHTS)


def test_mapped_tensors_are_not_read(tmp_path):
    """A mapping shows what is in the file at the time of reading, a copy would not."""
    path = saved(tmp_path, {"model": {"a": torch.zeros(1 << 16)}})
    tensor = open_pth(path).tensors["a"]
    content = path.read_bytes()
    start = content.index(b"\0" * (1 << 18))
    with open(path, "r+b") as file:
        file.seek(start + (1 << 17))
        file.write(torch.full((1 << 15,), 2.0).numpy().tobytes())
    assert tensor[-1] == 2.0


def test_old_format_is_read_as_a_whole(tmp_path):
    path = saved(tmp_path, {"model": WEIGHTS}, _use_new_zipfile_serialization=False)
    file = open_pth(path)
    assert not file.mapped
    assert torch.equal(file.tensors["query_tokens"], WEIGHTS["query_tokens"])


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("beside", [True, False], ids=["beside the weights", "among the weights"])
def test_code_is_refused_by_name_and_not_run(tmp_path, new_format, beside):
    witness = tmp_path / "was-run"
    evil = Evil(f"touch {witness}")
    content = {"model": WEIGHTS, "config": evil} if beside else {"model": {**WEIGHTS, "evil": evil}}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=new_format)
    with pytest.raises(
        ValueError, match=rf"model\.pth is refused: its pickle asks for {os.name}\.system, only tensors"
    ):
        open_pth(path)
    assert not witness.exists()
    torch.load(path, weights_only=False)  # the control: it would have been run
    assert witness.exists()


class Builtin:
    """Calls a function that needs no import."""

    def __reduce__(self):
        return eval, ("print('was run')",)


def test_builtins_are_refused_without_advice_to_allow_them(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"its pickle asks for eval, only tensors and plain data are read$"):
        open_pth(saved(tmp_path, {"model": WEIGHTS, "config": Builtin()}))
    assert capsys.readouterr().out == ""


def test_whole_modules_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is refused: its pickle asks for torch\.nn\.modules\.linear\.Linear"):
        open_pth(saved(tmp_path, {"model": torch.nn.Linear(1, 1)}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "must hold a state dict, got list"),
        ({}, "holds no tensors"),
        ({"model": {}}, "holds no tensors"),
        ({"model": WEIGHTS, "ema": WEIGHTS, "step": 3}, "holds ema, step beside the weights; expected at most optim"),
        ({"state_dict": WEIGHTS}, "tensors by their names only, got dict as 'state_dict'"),
        ({"model": {**WEIGHTS, "epoch": 3}}, "tensors by their names only, got int as 'epoch'"),
        ({3: torch.ones(1)}, "tensors by their names only, got Tensor as 3"),
        ({"a": torch.eye(3).to_sparse()}, "plain real tensors only, 'a' is torch.sparse_coo"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "plain real tensors only, 'a' is .*complex64"),
        ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "plain real tensors only, 'a' is .*float8_e4m3fn"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_other_layouts_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        open_pth(saved(tmp_path, content))


@pytest.mark.parametrize("kept", [0, 100, -200], ids=["empty", "beginning", "almost whole"])
def test_cut_off_files(tmp_path, kept):
    path = saved(tmp_path, {"model": {"a": torch.ones(1000)}})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.pth is (damaged|refused)"):
        open_pth(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        open_pth(tmp_path / "none.pth")
