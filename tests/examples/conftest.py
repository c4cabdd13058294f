"""The scripts of examples/shapes as modules."""

from __future__ import annotations

import importlib
import sys

import pytest

from example_scripts import EXAMPLES

FOLDER = EXAMPLES / "shapes"
MODULES = [path.stem for path in FOLDER.glob("*.py")]


@pytest.fixture
def script(monkeypatch):
    """Imports a script as if it had been started in its folder; all are forgotten again."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)
