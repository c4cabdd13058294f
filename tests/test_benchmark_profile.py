"""The profile of the benchmarks' cases, and what a GPU's limits are asked for."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from benchmark_scripts import script, write

SETTING = {"benchmark": "profile", "device": "a machine", "threads": 1, "best_gflops": 50.2}
CASE = {
    "case": "stage1",
    "seconds": 9.453,
    "groups": {"matmul": 0.807, "attention": 0.05, "index": 0.004, "dispatch": 0.139},
    "operators": [["mm", 0.6, 326], ["addmm", 0.207, 139], ["copy", 0.001, 2]],
    "matmul_gflops": 43.4,
}


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("profile_groups", monkeypatch)


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("profile_cases", monkeypatch)


def test_linear_layers_of_onednn_are_products(cases: ModuleType) -> None:
    """The profiler does not know how many operations they are."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch was built without oneDNN")
    states, weight = torch.randn(16, 128, 512), torch.randn(1024, 512)
    summary = cases.summary(
        cases.profiled(lambda: torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], ""), 3, "cpu"), 3
    )
    assert summary["operators"][0][::2] == ["linear_pointwise", 1]
    seconds = summary["groups"]["matmul"] * summary["profiled_seconds"]
    assert summary["matmul_gflops"] * seconds == pytest.approx(2 * states.numel() * 1024 / 1e9, rel=0.1)


def test_operators_are_put_into_groups(cases: ModuleType) -> None:
    """Of a step of a network that is known: matrix products of so many operations, everything else somewhere."""
    torch.manual_seed(0)
    first, second = nn.Linear(64, 256), nn.Linear(256, 64)
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()])
    states = torch.randn(8, 4, 32, 64)

    def run() -> None:
        mixed = nn.functional.scaled_dot_product_attention(states, states, states)
        with record_function("image: decode"):
            sorted(range(200_000), key=lambda number: -number)
        second(nn.functional.gelu(first(mixed))).log_softmax(dim=-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    run()
    summary = cases.summary(cases.profiled(run, 2, "cpu"), 2)
    shares = summary["groups"]
    assert {"matmul", "attention", "softmax", "norms", "optimiser", "images", "dispatch"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(1, abs=0.002)
    assert len(summary["operators"]) == 5
    assert {tuple(each[::2]) for each in summary["operators"]} & {("addmm", 2), ("image: decode", 1)}
    # Two forward products and three backward (none for the input of the first), 2 operations each.
    products = 5 * 2 * states.numel() * 256
    taken = shares["matmul"] * summary["profiled_seconds"]
    assert summary["matmul_gflops"] == pytest.approx(products / taken / 1e9, rel=0.02)


@pytest.mark.parametrize(
    ("name", "callers", "calls", "group"),
    [
        ("aten::addmm", ["aten::linear"], False, "matmul"),
        ("aten::bmm", ["aten::matmul"], False, "matmul"),
        ("aten::bmm", ["aten::matmul", "aten::_scaled_dot_product_attention_math"], False, "attention"),
        ("aten::add_", [], False, "norms"),
        ("aten::add_", ["aten::_foreach_add_", "Optimizer.step#AdamW.step"], False, "optimiser"),
        ("aten::linear", [], True, "dispatch"),
        ("aten::view", [], False, "dispatch"),
        ("autograd::engine::evaluate_function: ViewBackward0", [], False, "dispatch"),
        ("aten::_cdist_forward", [], False, "other"),
        ("image: resize", [], True, "images"),
    ],
)
def test_group_of_an_operator(groups: ModuleType, name: str, callers: list[str], calls: bool, group: str) -> None:
    assert groups.group_of(name, callers, calls) == group


def test_every_group_and_case_has_a_name(cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    table = script("profile_table", monkeypatch)
    assert list(table.PROFILED) == list(cases.CASES)
    assert tuple(table.GROUPS) == script("profile_groups", monkeypatch).GROUPS


def test_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "2026-01-01-profile-cpu.jsonl", SETTING, CASE, CASE | {"case": "photo", "matmul_gflops": None})
    report = script("report", monkeypatch)
    marks = "<!-- benchmarks:profile --><!-- /benchmarks:profile -->"
    lines = report.filled(marks, report.Results(tmp_path), "here").splitlines()
    where = "matrix products 81 %, Python and dispatch 14 %, attention 5 %"
    operators = "`mm` 60 %, `addmm` 21 %"
    assert lines[3:5] == [
        f"| stage-1 step, B = 8 | 9.45 | {where} | {operators} | 43 of 50 | 2026-01-01 |",
        f"| 4 photos of 12 MP, default | 9.45 | {where} | {operators} | – | 2026-01-01 |",
    ]


# -- limits ------------------------------------------------------------------------------------------------------------


def test_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = script("limits", monkeypatch)
    for most in (16, 40, 4096):
        for memory in (0, 15, 16, 31, 100, 1023, 5000):
            tried: list[int] = []

            def holds(batch: int, memory: int = memory, tried: list[int] = tried) -> bool:
                tried.append(batch)
                return batch <= memory

            assert limits.largest_batch(holds, 16, most) == min(memory, most) // 16 * 16
            assert len(tried) == len(set(tried)) <= 18


def test_only_a_want_of_memory_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = script("limits", monkeypatch)

    def run(error: Exception) -> None:
        raise error

    assert limits.fits(lambda: None)
    assert not limits.fits(lambda: run(torch.OutOfMemoryError("CUDA out of memory")))
    assert not limits.fits(lambda: run(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling …")))
    with pytest.raises(RuntimeError, match="shapes"):
        limits.fits(lambda: run(RuntimeError("shapes cannot be multiplied")))


@pytest.mark.parametrize(
    ("device", "dtype", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "float16", 756e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H200", "float32", None),
        ("another", "bfloat16", None),
    ],
)
def test_peak_of_a_device(monkeypatch: pytest.MonkeyPatch, device: str, dtype: str, peak: float | None) -> None:
    limits = script("limits", monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    args = argparse.Namespace(device="cuda", dtype=dtype, peak_tflops=None)
    assert limits.peak_flops(args) == peak
    assert limits.peak_flops(argparse.Namespace(**{**vars(args), "peak_tflops": 100.0})) == 100e12
