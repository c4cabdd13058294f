"""The repository's own rules: formatter, linter, import layers, small files, no paths of a developer."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
MAX_LINES = 450
TEXT = {".cff", ".cfg", ".json", ".jsonl", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
TEXT_NAMES = {"Makefile", "LICENSE", "run", ".gitignore"}
SKIPPED_FOLDERS = {"__pycache__", "build", "dist"}
# Put together from parts, so that this file does not contain what it looks for.
MACHINE_PATH = re.compile(
    r"(?<![\w.~}-])/(?:" + "|".join(["work", "root", "home", "Users", "opt", "mnt", "tmp"]) + r")/[A-Za-z]"
)


def repository_files() -> list[Path]:
    """Tracked files and new ones that git does not ignore; without git, what lies in the visible folders."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        found = [ROOT / name for name in names.split("\0") if name]
    else:
        found = [path for path in ROOT.rglob("*") if not is_by_product(path.relative_to(ROOT))]
    return sorted(path for path in found if path.is_file())


def is_by_product(path: Path) -> bool:
    return any(
        part in SKIPPED_FOLDERS or part.endswith(".egg-info") or (part.startswith(".") and part != ".ci")
        for part in path.parts[:-1]
    )


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command[-3:])}\n{done.stdout}\n{done.stderr}"


def test_ruff_check() -> None:
    run(sys.executable, "-m", "ruff", "check", "--no-cache", ".")


def test_ruff_format() -> None:
    run(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", ".")


def test_import_layers() -> None:
    # not the script `lint-imports`: where that lies depends on the installation
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    )
    run(sys.executable, "-c", code, str(SOURCE))


def test_every_module_has_a_layer() -> None:
    tomllib = pytest.importorskip("tomllib", reason="part of Python since 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    layers = set(re.findall(r"[\w.]+", " ".join(contract["layers"])))
    modules = {module_name(path) for path in SOURCE.rglob("*.py") if path.name != "__init__.py"}
    without = {name for name in modules if not any(f"{name}.".startswith(f"{layer}.") for layer in layers)}
    assert not without, "add them to the layers in pyproject.toml"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def test_files_are_small() -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in repository_files()
        if path.suffix == ".py"
    }
    assert lines, "no Python file was found"
    assert not {name: count for name, count in lines.items() if count > MAX_LINES}


def test_no_path_of_a_developer_machine() -> None:
    texts = [path for path in repository_files() if path.suffix in TEXT or path.name in TEXT_NAMES]
    assert Path(__file__).resolve() in texts
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not found


@pytest.mark.parametrize("folder", ["work", "root", "home", "Users", "tmp"])
def test_machine_paths_are_recognised(folder: str) -> None:
    path = f"/{folder}" + "/me/model"
    for line in (path, f"see {path}", f'open("{path}")', f"`{path}`", f"--model={path}", f"file://{path}"):
        assert MACHINE_PATH.search(line), line
    for line in (f"example.org{path}", f"~{path}", f"data{path}", f"$HOME{path}"):
        assert not MACHINE_PATH.search(line), line
