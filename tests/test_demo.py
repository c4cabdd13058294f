"""`make demo` runs on the public API, offline, and says that its weights are random."""

import importlib.util
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load_demo():
    specification = importlib.util.spec_from_file_location("demo_under_test", EXAMPLES / "demo.py")
    demo = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(demo)
    return demo


def test_demo(capsys, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    demo = load_demo()
    outputs = []
    for _ in range(2):
        assert demo.main() == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]  # seeded
    text = outputs[0]
    assert "RANDOM" in text.splitlines()[0]
    for name in ("astronaut (512x512)", "chelsea (451x300)"):
        assert name in text
    captions = [line for line in text.splitlines() if "caption:" in line]
    assert len(captions) == 2 and captions[0] != captions[1]
    assert text.count("ITC cosine") == text.count("ITM probability") == 4
    sys.modules.pop("random_checkpoint", None)


def test_makefile_runs_it() -> None:
    assert "examples/demo.py" in (EXAMPLES.parent / "Makefile").read_text()
