"""Checkpoints and photos for the tests of this folder, and a way to run the command in this process."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from blip2_hf.cli import main
from tiny_checkpoints import checkpoint, photos  # noqa: F401


@dataclass(frozen=True)
class Done:
    """What a command printed, line by line, and its exit code."""

    code: int
    out: list[str]
    err: list[str]


@pytest.fixture
def blip2(capsys, monkeypatch) -> Callable[..., Done]:
    """Runs `blip2` with arguments, and text as standard input."""

    def run(*arguments: str, stdin: str = "") -> Done:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        printed = capsys.readouterr()
        return Done(code, printed.out.splitlines(), printed.err.splitlines())

    return run


@pytest.fixture
def broken(tmp_path) -> str:
    """Path of a file that is not an image."""
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff nothing")
    return str(path)
