"""The tables of the documentation are those that benchmarks/report.py makes of the result files."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from benchmark_scripts import BENCHMARKS, script, write

ROOT = Path(__file__).resolve().parent.parent
SETTING = {"benchmark": "augmentation", "device": "a machine", "threads": 1, "dtype": "float32", "repeats": 9}
CASE = {"photo": "12 MP", "width": 4000, "exact": False, "time_ratio": 3.01, "mean_grey_levels": 0.27}
CASE["images_per_second"] = {"ours": 13.7, "theirs": 4.9}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("report", monkeypatch)


def augmentation(report: ModuleType, folder: Path) -> str:
    marks = "<!-- benchmarks:augmentation -->old<!-- /benchmarks:augmentation -->"
    return report.filled(marks, report.Results(folder), "here")


def test_documents_are_what_the_results_say(report: ModuleType, capsys: pytest.CaptureFixture) -> None:
    report.main(["--check"])
    assert capsys.readouterr().out == "nothing to change\n"


def test_every_table_is_in_a_document(report: ModuleType) -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in report.DOCUMENTS)
    assert [name for name in report.TABLES if f"<!-- benchmarks:{name} -->" not in text] == []


def test_a_changed_number_is_noticed(report: ModuleType, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    begin = text.index("x in time", text.index("<!-- benchmarks:numbers -->"))
    copy = tmp_path / "README.md"
    copy.write_text(text[: begin - 1] + "99" + text[begin:], encoding="utf-8")
    with pytest.raises(SystemExit):
        report.main(["--check", str(copy)])
    report.main([str(copy)])
    assert copy.read_text(encoding="utf-8") == text


def test_the_newest_result_of_each_case_counts(report: ModuleType, tmp_path: Path) -> None:
    small = CASE | {"photo": "0.3 MP", "width": 640}
    write(tmp_path / "2026-01-01-augmentation-cpu.jsonl", SETTING, CASE | {"time_ratio": 1.11}, small)
    new = CASE | {"time_ratio": 2.5, "time_ratio_range": [2.25, 2.75]}
    write(tmp_path / "2026-01-02-augmentation-cpu.jsonl", SETTING | {"repeats": 3}, CASE | {"time_ratio": 2.22}, new)
    lines = augmentation(report, tmp_path).splitlines()
    assert lines[3:] == [
        "| 12 MP | default | 2.50 (2.25 to 2.75) | 13.7 / 4.9 | 0.27 | 2026-01-02 |",
        "| 0.3 MP | default | 3.01 | 13.7 / 4.9 | 0.27 | 2026-01-01 |",
        "",
        "2026-01-01: a machine, 1 thread, 9 rounds.",
        "2026-01-02: a machine, 1 thread, 3 rounds.",
        "<!-- /benchmarks:augmentation -->",
    ]


def test_devices_and_precisions_are_kept_apart(report: ModuleType, tmp_path: Path) -> None:
    write(tmp_path / "2026-01-01-augmentation-cpu.jsonl", SETTING, CASE)
    half = SETTING | {"dtype": "bfloat16"}
    write(tmp_path / "2026-01-02-augmentation-cuda.jsonl", SETTING | {"device": "a GPU"}, CASE, half, CASE)
    text = augmentation(report, tmp_path)
    assert text.count("| photo |") == 2
    assert [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| 12 MP")] == [
        "2026-01-01",
        "2026-01-02",
        "2026-01-02, bfloat16",
    ]
    assert "2026-01-02: a GPU" in text


def test_nothing_measured_is_said(report: ModuleType, tmp_path: Path) -> None:
    assert "\n(not measured)\n" in augmentation(report, tmp_path)


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [
        ("2026-01-01-augmentation-cpu.jsonl", [SETTING | {"small": True}, CASE], "quick check"),
        ("2026-01-01-augmentation-cpu.jsonl", [CASE], "must begin with"),
        ("augmentation.jsonl", [SETTING, CASE], "DATE-NAME-DEVICE"),
    ],
)
def test_files_that_are_no_results(report: ModuleType, tmp_path: Path, name: str, records: list, message: str) -> None:
    write(tmp_path / name, *records)
    with pytest.raises(ValueError, match=message):
        report.Results(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- benchmarks:loading -->", "no other half"),
        ("<!-- benchmarks:loading --><!-- /benchmarks:numbers -->", "no other half"),
        ("<!-- benchmarks:speed --><!-- /benchmarks:speed -->", "must be one of"),
        ("a text", "was found"),
    ],
)
def test_marks_that_are_wrong(report: ModuleType, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.filled(text, report.Results(tmp_path), "here")


def test_numbers_have_as_many_digits_as_were_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    short = script("benchmark_cells", monkeypatch).short
    assert [short(value) for value in (5.501, 3.2, 14.03, 0.05718, 531.6, 1090.9, 0, 0.0, 743, None)] == [
        *("5.50", "3.2", "14.0", "0.0572", "532", "1091", "0", "0", "743", "–")
    ]


def test_run_knows_every_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    run = script("run", monkeypatch)
    own = {"run", "report"}
    scripts = {path.stem for path in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")}
    assert scripts - own == {each.script for each in run.BENCHMARKS}
    for device in ("cpu", "cuda"):
        assert {each.script for each in run.chosen(device, None, quick=True)} == {
            each.script for each in run.chosen(device, None, quick=False)
        }


def test_run_appends_what_succeeded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With scripts that print what they are told to."""
    run = script("run", monkeypatch)
    for name, end in (("good", ""), ("bad", "raise SystemExit(3)"), ("empty", "")):
        case = "" if name == "empty" else f"print({json.dumps(json.dumps(CASE))})\n"
        (tmp_path / f"{name}.py").write_text(f"print({json.dumps(json.dumps(SETTING))})\n{case}{end}\n")
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "BENCHMARKS", tuple(run.Benchmark(name, "cpu") for name in ("good", "bad", "empty")))
    results = tmp_path / "results"
    with pytest.raises(SystemExit):
        run.main(["--output-dir", str(results)])
    run.main(["--output-dir", str(results), "--only", "good"])
    run.main(["--output-dir", str(results), "--only", "good", "--quick"])
    (file,) = results.iterdir()
    assert file.name.endswith("-good-cpu.jsonl")
    assert [json.loads(line) for line in file.read_text().splitlines()] == [SETTING, CASE] * 2
