"""Rows of several processes: values and gradients are those of indexing the whole batch in one process."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

import distributed_rows
from blip2_hf.distributed import (
    Rows,
    fetch_rows,
    gather_numbers,
    gather_rows,
    gather_rows_with_gradient,
    part_sizes,
    process_index,
    world_size,
)
from distributed_worker import Failure, outcomes, run


@pytest.mark.parametrize("processes", [2, 3])
def test_rows_of_several_processes(processes: int) -> None:
    for index, results in enumerate(run(distributed_rows.check_rows, processes)):
        assert len(results) >= 22
        for name, result in results.items():
            assert not isinstance(result, Failure), f"process {index}, {name}: {result}"


def test_one_process_needs_no_group() -> None:
    assert not dist.is_initialized()
    assert (world_size(), process_index()) == (1, 0)
    rows, layout = torch.randn(4, 3, requires_grad=True), Rows((4,))
    assert gather_rows_with_gradient(rows, layout) is rows
    assert torch.equal(gather_rows(rows, layout), rows)
    assert not gather_rows(rows, layout).requires_grad
    assert gather_numbers(torch.tensor([3, 4])).tolist() == [[3, 4]]
    wanted = torch.tensor([3, 0, 3])
    fetched = fetch_rows(rows, wanted, layout)
    assert torch.equal(fetched, rows[wanted])
    fetched.sum().backward()
    assert rows.grad[:, 0].tolist() == [1.0, 0.0, 0.0, 2.0]


def test_layout() -> None:
    layout = Rows((5, 0, 3), index=2)
    assert (layout.total, layout.start) == (8, 5)
    assert layout.numbers(torch.device("cpu")).tolist() == [5, 6, 7]
    assert Rows((5, 0, 3), index=1).numbers(torch.device("cpu")).tolist() == []


@pytest.mark.parametrize(("rows", "most", "sizes"), [(7, 3, [3, 2, 2]), (6, 3, [3, 3]), (1, 8, [1]), (3, 1, [1, 1, 1])])
def test_parts_of_one_process(rows: int, most: int, sizes: list[int]) -> None:
    assert part_sizes(rows, most, torch.device("cpu")) == sizes


def _one_waits() -> None:
    if process_index() == 0:
        gather_numbers(torch.tensor([1]))  # the other process does not come


def _one_sleeps() -> None:
    if process_index() == 0:
        time.sleep(60)


def _one_fails() -> int:
    if process_index() == 1:
        raise ArithmeticError("wrong")
    return 5


def _a_case_fails() -> dict[str, object]:
    return outcomes({"bad": _one_fails, "good": world_size})


@pytest.mark.parametrize(
    ("function", "expected"), [(_one_waits, "Traceback"), (_one_sleeps, "were not done"), (_one_fails, "wrong")]
)
def test_a_deadlock_or_an_error_fails_the_test(function, expected: str) -> None:
    with pytest.raises(AssertionError, match=expected):
        run(function, 2, timeout=3.0, group_timeout=1.0)


def test_a_failing_case_is_reported() -> None:
    first, second = run(_a_case_fails, 2)
    assert first == {"bad": 5, "good": 2}
    assert isinstance(second["bad"], Failure) and "ArithmeticError: wrong" in second["bad"]
    assert second["good"] == 2
