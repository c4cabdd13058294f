"""What the command refuses, and what it leaves behind when something goes wrong: nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import conversion.verify
import conversion.writing
import tiny_checkpoints
import tiny_original
from conversion.convert import main
from conversion.job import Request, prepare
from tiny_tokenizers import tiny_bert_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "conversion" / "convert.py"


class Evil:
    def __reduce__(self):
        return os.system, ("echo was run",)


def refused(capsys, *arguments: object) -> str:
    """The one line that is said."""
    assert main([str(argument) for argument in arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("convert: ") and said.count("\n") == 1
    return said


def changed(original, stage: str, to: Path, **options: object) -> list[str]:
    """The usual command with other values; None leaves an option out."""
    command = original.command(stage, to)
    for option, value in options.items():
        name = "--" + option.replace("_", "-")
        if name in command:
            del command[command.index(name) : command.index(name) + 2]
        if value is not None:
            command += [name, str(value)]
    return command


# -- nothing is left ---------------------------------------------------------------------------------------------------


def test_dry_run_writes_nothing(original, tmp_path, capsys):
    assert main(original.command("opt", tmp_path / "deep" / "opt", "--dry-run")) == 0
    assert os.listdir(tmp_path) == []
    said = capsys.readouterr().out
    for line in (
        "opt.pth: stage 2 of the original (generation, opt)",
        "opt_tower.pth: vision tower",
        "/opt: language model",
        "opt.pth also holds optimizer, config, epoch: not converted",
        "this package, 672.0 kB in one file",
        "vision tower              28          65,508  262.0 kB  float32",
        "13 dropped (last block, whose output BLIP-2 does not use): blocks.*.attn.proj.bias",
        "2 made otherwise than by renaming (merged, zeros for the keys between): vision_model.encoder.layers.*",
        "dry run: nothing was written",
    ):
        assert line in said


def test_existing_target_stays(original, tmp_path, capsys):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("mine")
    assert "exists already; nothing is written over it" in refused(capsys, *original.command("itm", tmp_path / "ours"))
    assert os.listdir(tmp_path / "ours") == ["mine.txt"]


def test_too_little_space(original, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(conversion.writing.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    said = refused(capsys, *original.command("itm", tmp_path / "ours"))
    assert "of disk space, but there are 1.0 MB free" in said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["disk full", "terminated", "bug"])
def test_stopped_while_writing(original, tmp_path, capsys, monkeypatch, what):
    write = conversion.writing._write_tensor
    written = []

    def stop(file, planned, tensor):
        written.append(planned.name)
        if len(written) == 20:
            if what == "disk full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if what == "terminated":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise KeyError("bug")
        write(file, planned, tensor)

    monkeypatch.setattr(conversion.writing, "_write_tensor", stop)
    command = original.command("itm", tmp_path / "ours")
    if what == "disk full":
        assert "No space left on device" in refused(capsys, *command)
    else:
        with pytest.raises(KeyError if what == "bug" else SystemExit):
            main(command)
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_unequal_result_is_removed(original, tmp_path, capsys, monkeypatch):
    """A layer that ends up in another's place is found by running both models."""
    import conversion.job as job

    apply = job.apply
    names = [f"qformer.encoder.layer.{n}.output_query.dense.weight" for n in (1, 2)]

    def swapped(step, get):
        if step.target in names:
            other = names[1 - names.index(step.target)]
            step = next(s for s in planned.inward.steps if s.target == other)
        return apply(step, get)

    command = original.command("itm", tmp_path / "ours")
    options = {name: str(original / file) for name, file in (("tower", "itm_tower.pth"), ("config", "itm.json"))}
    planned = prepare(Request(str(original / "itm.pth"), tmp_path / "ours", **options))
    monkeypatch.setattr(job, "apply", swapped)
    assert main(command) == 1
    said = capsys.readouterr()
    assert "what was made is not equal to its source; it was removed" in said.err
    assert "NOT EQUAL: first at Q-Former, queries, layer 1" in said.out
    assert os.listdir(tmp_path) == []


def test_verification_can_be_left_out(original, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion.verify, "verify", lambda *sides: pytest.fail("was run"))
    assert main(original.command("itm", tmp_path / "ours", "--no-verify")) == 0


def test_script_that_is_killed(original, tmp_path, capsys):
    """As a user runs it, from anywhere and with its own imports; what is left is not the target, and is named."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, SCRIPT, *original.command("itm", Path("ours"))]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.iterdir()) and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".ours.") and left.name.endswith(".unfinished")
    assert main(original.command("itm", tmp_path / "ours", "--no-verify")) == 0  # not disturbed by it
    assert f"note: {left} is left over from a run that was killed" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [left, tmp_path / "ours"]


# -- files -------------------------------------------------------------------------------------------------------------


def test_evil_pickle(original, tmp_path, capsys):
    torch.save({"model": tiny_original.stored("itm"), "config": Evil()}, tmp_path / "evil.pth")
    command = original.command("itm", tmp_path / "ours")
    said = refused(capsys, tmp_path / "evil.pth", *command[1:])
    assert f"evil.pth is refused: its pickle asks for {os.name}.system" in said
    assert os.listdir(tmp_path) == ["evil.pth"]


def test_unexplained_key(original, tmp_path, capsys):
    surplus = {**tiny_original.stored("itm"), "Qformer.bert.pooler.dense.weight": torch.ones(3)}
    torch.save({"model": surplus}, tmp_path / "odd.pth")
    said = refused(capsys, tmp_path / "odd.pth", *original.command("itm", tmp_path / "ours")[1:])
    assert "1 keys of the source are not in the table: Qformer.bert.pooler.dense.weight" in said


def test_what_would_be_lost(original, tmp_path, capsys):
    weights = tiny_original.stored("itm")
    name = "Qformer.cls.predictions.decoder.weight"
    torch.save({"model": {**weights, name: weights[name] + 1}}, tmp_path / "untied.pth")
    said = refused(capsys, tmp_path / "untied.pth", *original.command("itm", tmp_path / "ours")[1:])
    assert f"'{name}' must be equal to" in said and "it would be lost" in said
    assert os.listdir(tmp_path) == ["untied.pth"]


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("itm", {"tower": None}, "`--tower` is needed, .*itm.pth was stored without its frozen tower"),
        ("opt", {"llm": None}, "`--llm` is needed, .*opt.pth was stored without its language model: the opt that it"),
        ("itm", {"config": None}, "no released checkpoint: give the shapes with `--config FILE`"),
        ("itm", {"llm": "facebook/opt-2.7b"}, "`--llm` is not used: .*itm.pth has no language model"),
        ("opt", {"text": "bert-base-uncased"}, "`--text` is not used: .* has a Q-Former that reads no text"),
        ("itm", {"model": "blip2-itm-vit-g"}, "`model` is 'blip2-itm-vit-g', but the tensors are those of no released"),
        ("itm", {"layout": "lavis"}, "`--to` must be a file that ends with .pth with `--layout lavis`, got "),
        ("itm", {"llm": "./none"}, "`--llm` is not used"),
        ("opt", {"llm": "./none"}, "`--llm` must be a file, a folder or a Hub id, but there is no folder './none'"),
        ("itm", {"tower": "none.pth"}, "`--tower` none.pth does not exist"),
        ("itm", {"text": "./none"}, "`--text` must be a folder or a Hub id, but there is no folder './none'"),
        ("t5", {"dtype": "float16"}, "`--dtype` must be bfloat16 or float32 for a T5"),
        ("opt", {"config": "none.json"}, "config.* must be a config.json or a folder with one, got 'none.json'"),
    ],
)
def test_options_that_do_not_go_together(original, tmp_path, capsys, stage, options, message):
    import re

    assert re.search(message, refused(capsys, *changed(original, stage, tmp_path / "ours", **options)))
    assert os.listdir(tmp_path) == []


def test_parts_that_are_mixed_up(original, tmp_path, capsys):
    said = refused(capsys, *changed(original, "opt", tmp_path / "ours", llm=original / "t5"))
    assert "`--llm` " in said and "must be a language model of kind opt, got t5" in said
    said = refused(capsys, *changed(original, "opt", tmp_path / "ours", tower=original / "opt"))
    assert "holds no tower but a language_model" in said
    command = original.command("opt", tmp_path / "ours")
    assert "is no BLIP-2 but a part of one: tower_eva" in refused(capsys, original / "opt_tower.pth", *command[1:])


def test_tokenizer_that_does_not_fit(original, tmp_path, capsys):
    other = tiny_original.save_config(tmp_path / "other.json", "opt", 251)
    said = refused(capsys, *changed(original, "opt", tmp_path / "ours", config=other))
    assert "has the image placeholder as token 250, the config as token 251" in said
    assert os.listdir(tmp_path) == ["other.json"]
    tiny_bert_tokenizer().save_pretrained(tmp_path / "bert")
    said = refused(capsys, *changed(original, "itm", tmp_path / "ours", text=tmp_path / "bert"))
    assert "has [DEC] as token 225, the Q-Former as token 129" in said
    assert sorted(os.listdir(tmp_path)) == ["bert", "other.json"]


def test_options_of_folders(tmp_path, capsys):
    tiny_checkpoints.save_retrieval(tmp_path / "source")
    folder, target = tmp_path / "source", tmp_path / "ours"
    for option in ("--tower", "--text", "--config"):
        assert f"`{option}` is not used" in refused(capsys, folder, "--to", target, option, "x")
    assert "`--to` must be a folder with" in refused(capsys, folder, "--to", tmp_path / "x.pth")
    said = refused(capsys, folder, "--to", target, "--bridge-only")
    assert "`--bridge-only` needs `--layout lavis`" in said
    said = refused(capsys, folder / "model.safetensors", "--to", target)
    assert "must be the folder" in said
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"language_adapter": True}))
    assert "has a LoRA adapter" in refused(capsys, folder, "--to", target)
    (folder / "config.json").unlink()
    assert "has no config.json of BLIP-2" in refused(capsys, folder, "--to", target)


def test_too_large_for_half_precision(original, tmp_path, capsys):
    shutil.copytree(original / "opt", tmp_path / "opt")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "opt" / "model.safetensors")
    weights["model.decoder.final_layer_norm.weight"][3] = 1e5
    save_file(weights, tmp_path / "opt" / "model.safetensors")
    said = refused(capsys, *changed(original, "opt", tmp_path / "ours", llm=tmp_path / "opt", dtype="float16"))
    assert "'language_model.model.decoder.final_layer_norm.weight' holds 100000, which is too large for float16" in said
    assert os.listdir(tmp_path) == ["opt"]


@pytest.mark.parametrize("arguments", [[], ["x"], ["x", "--to", "y", "--dtype", "int8"]])
def test_wrong_arguments(arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_size_of_shards(capsys):
    with pytest.raises(SystemExit):
        main(["x", "--to", "y", "--max-shard-size", "much"])
    assert "argument --max-shard-size: must be a size such as '5GB' or '500MB', got 'much'" in capsys.readouterr().err


def test_upload_is_of_the_finished_folder(original, tmp_path, capsys, monkeypatch):
    import blip2_hf.hub

    seen = []
    monkeypatch.setattr(
        blip2_hf.hub, "push_folder", lambda folder, repo_id: seen.append((repo_id, sorted(os.listdir(folder)))) or "url"
    )
    target = tmp_path / "ours"
    assert main(original.command("itm", target, "--no-verify", "--push-to-hub", "me/blip2")) == 0
    assert seen == [("me/blip2", sorted(os.listdir(target)))]
    assert "me/blip2" in (target / "README.md").read_text()

    def fail(folder, repo_id):
        raise LookupError("no route")  # of a library that is not known here

    monkeypatch.setattr(blip2_hf.hub, "push_folder", fail)
    again = tmp_path / "again"
    said = refused(capsys, *original.command("itm", again, "--no-verify", "--push-to-hub", "me/blip2"))
    assert "again is finished, but was not uploaded to me/blip2: no route" in said
    assert sorted(os.listdir(again)) == sorted(os.listdir(target))
    said = refused(capsys, *original.command("itm", tmp_path / "x", "--push-to-hub", "a b/c"))
    assert "`--push-to-hub` must be a repository's name, got 'a b/c'" in said
    said = refused(capsys, target, "--to", tmp_path / "x.pth", "--layout", "lavis", "--push-to-hub", "me/blip2")
    assert "`--push-to-hub` needs a folder that can be loaded" in said
