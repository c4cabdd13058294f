"""The command as a whole: start-up, help, exit codes, nothing but our lines."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from transformers.utils import logging

import blip2_hf
from blip2_hf.cli import main
from blip2_hf.cli.common import CommandError
from blip2_hf.cli.main import build_parser

COMMANDS = ("caption", "ask", "chat", "match")  # those about images that are named
ALL = (*COMMANDS, "index", "search", "eval")
HEAVY = ("torch", "transformers", "numpy", "PIL", "huggingface_hub")

PROBE = """
import sys
from blip2_hf.cli import main
from blip2_hf.cli.common import CommandError
try:
    main(sys.argv[1:])
except SystemExit as exit:
    print("exit", exit.code)
print("heavy", [name for name in sys.modules if name in {heavy!r}])
"""


def shell(*command: str, **options) -> subprocess.CompletedProcess:
    folders = [str(Path(blip2_hf.__file__).parent.parent), os.environ.get("PYTHONPATH")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, **options)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["caption", "--help"], ["caption"], ["eval", "captioning", "--help"]]
)
def test_arguments_are_parsed_without_heavy_imports(arguments) -> None:
    done = shell(sys.executable, "-c", PROBE.format(heavy=HEAVY), *arguments)
    assert done.returncode == 0, done.stderr
    assert "heavy []" in done.stdout
    assert f"exit {2 if arguments == ['caption'] else 0}" in done.stdout


def test_as_a_module(photos, checkpoint) -> None:
    command = [sys.executable, "-m", "blip2_hf.cli"]
    done = shell(*command, "caption", photos["chelsea"], "--model", checkpoint("t5"), "--max-new-tokens", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    done = shell(*command, "caption", "missing.png")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "blip2: cannot load image 'missing.png': no such file\n"


def test_help_names_every_command(blip2) -> None:
    done = blip2("--help")
    assert done.code == 0 and not done.err
    assert all(any(line.strip().startswith(command) for line in done.out) for command in ALL)
    assert any("exit codes" in line for line in done.out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(blip2, command) -> None:
    done = blip2(command, "--help")
    assert done.code == 0
    text = "\n".join(done.out)
    for option in ("--model", "--device", "--dtype", "--json", "IMAGE", "example"):
        assert option in text


@pytest.mark.parametrize(
    "command", [("index",), ("search",), *(("eval", t) for t in ("captioning", "vqa", "retrieval"))]
)
def test_help_of_the_commands_about_sets(blip2, command) -> None:
    done = blip2(*command, "--help")
    assert done.code == 0
    text = "\n".join(done.out)
    for option in ("--model", "--device", "--dtype", "--json", "example"):
        assert option in text


def test_version(blip2) -> None:
    assert blip2("--version").out == [f"blip2_hf {blip2_hf.__version__}"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["caption"],
        ["paint", "a.png"],
        ["ask", "a.png"],
        ["eval"],
        ["eval", "painting"],
        ["eval", "captioning"],
        ["index", "photos"],
        ["search"],
        ["match", "a.png"],
        ["caption", "a.png", "--dtype", "int3"],
        ["caption", "a.png", "--num-beams", "0"],
        ["caption", "a.png", "--batch-size", "x"],
        ["caption", "a.png", "--min-new-tokens", "-1"],
        ["ask", "a.png", "what?", "--prompt", "Question:"],
    ],
)
def test_wrong_arguments(blip2, arguments) -> None:
    done = blip2(*arguments)
    assert done.code == 2 and not done.out
    assert "error:" in done.err[-1]


REST = {"caption": [], "ask": ["what?"], "chat": [], "match": ["a cat"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_unreadable_image(blip2, command, broken) -> None:
    """It is found before a model is loaded."""
    done = blip2(command, broken, *REST[command], "--model", "nobody/nothing")
    assert (done.code, done.out) == (2, [])
    assert len(done.err) == 1 and "broken.jpg" in done.err[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_models_that_cannot_be_loaded(blip2, command, photos, checkpoint, tmp_path) -> None:
    image, rest = photos["chelsea"], REST[command]
    other = checkpoint("opt") if command == "match" else checkpoint("retrieval")
    (tmp_path / "config.json").write_text("{}")
    for model in ("nobody/nothing", str(tmp_path), "no such folder", other):
        done = blip2(command, image, *rest, "--model", model)
        assert (done.code, done.out) == (1, [])
        assert len(done.err) == 1 and done.err[0].startswith(f"blip2: cannot load model {model!r}: ")


DEFAULTS = {
    ("caption", "PHOTO"): ("blip2-tiny-opt", "blip2-opt-2.7b"),
    ("ask", "PHOTO", "what?"): ("blip2-tiny-opt-vqa", "blip2-opt-2.7b"),
    ("chat", "PHOTO"): ("blip2-tiny-opt", "blip2-opt-2.7b"),
    ("match", "PHOTO", "a cat"): ("blip2-tiny-itm", "blip2-itm-vit-g"),
    ("index", "PHOTO", "-o", "photos.index"): ("blip2-tiny-itm", "blip2-itm-vit-g"),
}


@pytest.mark.parametrize("arguments", DEFAULTS)
def test_without_a_model_a_shipped_one_works_and_says_so(
    blip2, photos, checkpoint, tmp_path, monkeypatch, arguments
) -> None:
    """Here with other weights in the package's place."""
    model, released = DEFAULTS[arguments]
    (tmp_path / model).symlink_to(checkpoint("retrieval" if model.endswith("itm") else "opt"))
    monkeypatch.setattr("blip2_hf.checkpoints._SHIPPED_FOLDER", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    arguments = [photos["chelsea"] if argument == "PHOTO" else argument for argument in arguments]
    done = blip2(*arguments, stdin="what?")
    note = f"no --model given: using {model}, which only knows drawn shapes; for photos: --model {released} "
    assert done.code == 0 and done.out
    assert len(done.err) == 1 and done.err[0].startswith(f"blip2: {note}")
    asked_for = blip2(*arguments, "--model", model, stdin="what?")
    assert (asked_for.code, asked_for.err) == (0, [])


@pytest.mark.parametrize(
    ("task", "model", "released"),
    [
        ("captioning", "blip2-tiny-opt", "blip2-opt-2.7b-coco"),
        ("vqa", "blip2-tiny-opt-vqa", "blip2-flan-t5-xl"),
        ("retrieval", "blip2-tiny-itm", "blip2-itm-vit-g-coco"),
    ],
)
def test_default_models_of_evaluation(task, model, released) -> None:
    files = ["--questions" if task == "vqa" else "--annotations", "a.json", "--images", "images"]
    args = build_parser().parse_args(["eval", task, *files])
    assert (args.model, args.released) == (model, released)
    args = build_parser().parse_args(["eval", task, *files, "--model", "mine"])
    assert (args.model, args.released) == ("mine", None)


def test_a_device_that_is_not_there(blip2, photos, checkpoint) -> None:
    for command, kind in (("caption", "opt"), ("match", "retrieval")):
        done = blip2(command, photos["chelsea"], *REST[command], "--model", checkpoint(kind), "--device", "cuda:77")
        assert (done.code, done.out) == (1, []) and len(done.err) == 1


def test_verbose_shows_the_traceback(photos) -> None:
    with pytest.raises(CommandError, match="nobody/nothing") as raised:
        main(["caption", photos["chelsea"], "--model", "nobody/nothing", "--verbose"])
    assert isinstance(raised.value.__cause__, OSError)


def test_settings_of_the_libraries_are_put_back(blip2, photos, checkpoint) -> None:
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters))
    assert blip2("caption", photos["chelsea"], "--model", checkpoint("opt")).code == 0
    assert blip2("caption", photos["chelsea"], "--model", "nobody/nothing").code == 1
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters)) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_device_and_dtype(blip2, photos, checkpoint, dtype) -> None:
    for command, kind in (("caption", "opt"), ("ask", "t5"), ("match", "retrieval")):
        done = blip2(
            *(command, photos["chelsea"], *REST[command], "--model", checkpoint(kind)),
            *("--device", "cpu", "--dtype", dtype, "--json"),
        )
        assert (done.code, done.err) == (0, []), command
        assert json.loads(done.out[0])["image"] == photos["chelsea"]


def test_interruption(monkeypatch, photos) -> None:
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("blip2_hf.cli.caption.load_pipeline", interrupt)
    assert main(["caption", photos["chelsea"]]) == 130


@pytest.mark.slow
def test_a_reader_that_goes_away(photos, checkpoint) -> None:
    images = " ".join([photos["chelsea"]] * 3)
    command = f"{sys.executable} -m blip2_hf.cli caption {images} --batch-size 1 --model {checkpoint('opt')} | true"
    done = shell("bash", "-c", command)
    assert done.stderr == ""
