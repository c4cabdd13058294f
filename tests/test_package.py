"""The package as a whole: lazy public names, what importing it costs, its declared dependencies."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import blip2_hf

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = {"pipeline", "stage1_processor", "stage1_tokenizer", "stage2_processor"}
CLASSES = sorted(set(blip2_hf.__all__) - {"__version__", *FUNCTIONS})
# Needed by few users, slow to import; whoever uses them imports them inside a function.
OPTIONAL = ("datasets", "evaluate", "peft")
# `transformers.Trainer` and its arguments import what they find of them.
TRAINER = ("Blip2Trainer", "Blip2TrainingArguments")

# Runs the statements one after the other in a fresh interpreter; prints for each the modules it added.
PROBE = """
import json, sys
import importlib, typing
added, seen = [], set(sys.modules)
for statement in json.loads(sys.argv[1]):
    exec(statement)
    added.append(sorted(set(sys.modules) - seen))
    seen = set(sys.modules)
print(json.dumps(added))
"""


def modules_added_by(*statements: str) -> list[set[str]]:
    """For each statement, the modules that running it (after those before it) adds to `sys.modules`."""
    folders = [str(Path(blip2_hf.__file__).parent.parent), os.environ.get("PYTHONPATH")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    command = [sys.executable, "-c", PROBE, json.dumps(statements)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return [set(names) for names in json.loads(done.stdout.splitlines()[-1])]


def test_import_is_lazy() -> None:
    (added,) = modules_added_by("import blip2_hf")
    assert added == {"blip2_hf"}


def test_the_probe_sees_imports() -> None:
    first, second = modules_added_by("import colorsys", "from wave import open")
    assert "colorsys" in first and "wave" in second and "colorsys" not in second


def test_public_names_pull_in_no_optional_library() -> None:
    names = [name for name in blip2_hf.__all__ if name not in TRAINER]
    added = modules_added_by(*(f"from blip2_hf import {name}" for name in names))
    pulled_in = {
        name: sorted(modules.intersection(OPTIONAL))
        for name, modules in zip(names, added, strict=True)
        if modules.intersection(OPTIONAL)
    }
    assert not pulled_in


def test_models_load_nothing_but_their_base_classes() -> None:
    """No processors, tokenizers or other model classes; and the garbage collector rests meanwhile, as it was before."""
    count = "sum(generation['collections'] for generation in gc.get_stats())"
    bases, *added = modules_added_by(
        "from transformers import GenerationMixin, PreTrainedModel; import gc",
        f"gc.collect(); before = {count}; from blip2_hf import Blip2ForConditionalGeneration; assert {count} == before",
        "assert gc.isenabled() and not gc.get_freeze_count(); gc.disable()",
        "from blip2_hf import Blip2ForImageTextRetrieval, Blip2QFormerModel; assert not gc.isenabled()",
    )
    modules = set.union(*added)
    assert "transformers.modeling_utils" in bases and "blip2_hf.modeling.retrieval" in modules
    assert {name for name in modules if not name.startswith("blip2_hf")} == set()
    assert not [name for name in modules if name.endswith("_processing") or name == "blip2_hf.processing"]


@pytest.mark.parametrize("name", ["Blip2Config", "Blip2VisionConfig", "Blip2QFormerConfig"])
def test_configs_do_not_load_models(name: str) -> None:
    (added,) = modules_added_by(f"from blip2_hf import {name}")
    assert not any(module.startswith(("blip2_hf.modeling", "transformers.modeling_utils")) for module in added)


@pytest.mark.parametrize("name", blip2_hf.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(blip2_hf, name)
    assert value is getattr(blip2_hf, name)
    if name in CLASSES:
        assert isinstance(value, type) and value.__name__ == name


def test_names_are_listed_once_everywhere() -> None:
    assert dir(blip2_hf) == sorted(blip2_hf.__all__)
    assert len(set(blip2_hf.__all__)) == len(blip2_hf.__all__)
    assert set(blip2_hf.__all__) == {*blip2_hf._MODULE_OF, "__version__"}
    assert names_for_type_checkers() == blip2_hf._MODULE_OF


def names_for_type_checkers() -> dict[str, str]:
    """{name: module} of the imports under `if TYPE_CHECKING` in the package's `__init__.py`."""
    tree = ast.parse(Path(blip2_hf.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Blip3Config'"):
        blip2_hf.Blip3Config  # noqa: B018
    assert not hasattr(blip2_hf, "__wrapped__")
    with pytest.raises(ImportError, match="Blip3Config"):
        from blip2_hf import Blip3Config  # noqa: F401


def test_version_is_that_of_the_installed_package() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", blip2_hf.__version__)
    try:
        installed = importlib.metadata.version("blip2_hf")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the source folder, not installed")
    assert installed == blip2_hf.__version__


def test_every_dependency_is_pinned() -> None:
    project = read_toml(ROOT / "pyproject.toml")["project"]
    declared = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    pins = re.findall(r"^([\w.-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    missing = {normalised(requirement) for requirement in declared} - {normalised(pin) for pin in pins}
    assert not missing


def normalised(requirement: str) -> str:
    """The canonical name of the package in a requirement such as `Import_Linter>=2.5`."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def read_toml(path: Path) -> dict:
    tomllib = pytest.importorskip("tomllib", reason="part of Python since 3.11")
    return tomllib.loads(path.read_text(encoding="utf-8"))
