"""What each of several processes runs to test `blip2_hf.distributed` against indexing in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

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
from distributed_worker import outcomes

SIZES = {2: ((3, 3), (5, 3), (1, 4), (0, 2)), 3: ((2, 2, 2), (4, 0, 1))}
# Which rows each process fetches, as a function of (its number, number of processes, rows of each).
WANTED: dict[str, Callable[[int, int, tuple[int, ...]], list[int]]] = {
    "its own": lambda index, _, sizes: list(range(sum(sizes[:index]), sum(sizes[: index + 1]))),
    "all, backwards": lambda index, _, sizes: list(range(sum(sizes)))[::-1],
    "none": lambda *_: [],
    "some none": lambda index, _, sizes: [] if index else [sum(sizes) - 1, 0],
    "all from the last": lambda index, _, sizes: [sum(sizes) - 1] * (index + 2),
    "duplicates": lambda index, processes, sizes: [(7 * i + index) % sum(sizes) for i in range(3 * sum(sizes))],
    "another number each": lambda index, _, sizes: [(5 * i + 2 * index) % sum(sizes) for i in range(1 + 3 * index)],
}


def check_rows() -> dict[str, object]:
    """Every case in one group of processes."""
    cases = {"numbers": _numbers, "parts": _parts}
    for sizes in SIZES[world_size()]:
        layout = Rows(sizes, process_index())
        cases[f"gather {sizes}"] = partial(_gather, layout)
        cases |= {f"fetch {name} {sizes}": partial(_fetch, layout, wanted) for name, wanted in WANTED.items()}
    layout = Rows(SIZES[world_size()][1], process_index())
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        cases[f"gather {dtype}"] = partial(_gather, layout, dtype=dtype)
        cases[f"fetch {dtype}"] = partial(_fetch, layout, WANTED["duplicates"], dtype=dtype)
    return outcomes(cases)


def _numbers() -> None:
    own = torch.tensor([process_index(), 7])
    assert process_index() == dist.get_rank()
    assert gather_numbers(own).tolist() == [[index, 7] for index in range(world_size())]
    integers = gather_rows(own[: 1 + process_index() % 2], Rows((1, 2, 1)[: world_size()], process_index()))
    assert integers.tolist() == [0, 1, 7, 2][: integers.shape[0]]
    assert integers.dtype == torch.int64


def _parts() -> None:
    """As many on all processes, unless one has too few rows."""
    index, device = process_index(), torch.device("cpu")
    assert part_sizes((5, 3, 4)[index], 2, device) == ([2, 2, 1], [1, 1, 1], [2, 1, 1])[index]
    assert part_sizes((1, 7, 2)[index], 2, device) == ([1], [7], [2])[index]
    assert part_sizes(4, 100, device) == [4]


def _all_rows(layout: Rows, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(layout.total, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def _weights(index: int, like: torch.Tensor) -> torch.Tensor:
    """What process `index` weights its result with: quarters, so that sums are exact in half precision too."""
    return torch.randint(-4, 5, like.shape, generator=torch.Generator().manual_seed(index + 1)).to(like.dtype) / 4


def _check(
    layout: Rows,
    dtype: torch.dtype,
    ours: Callable[[torch.Tensor], torch.Tensor],
    plain: Callable[[int, torch.Tensor], torch.Tensor],
) -> None:
    """Values and gradients of `ours` (own rows -> result) against `plain` (process, all rows -> result) summed over
    all processes in this one."""
    whole = _all_rows(layout, dtype)
    own = whole.detach()[layout.numbers(whole.device)].requires_grad_()
    found, expected = ours(own), plain(layout.index, whole)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    (_weights(layout.index, found) * found).sum().backward()
    results = [plain(index, whole) for index in range(len(layout.sizes))]
    sum((_weights(index, result) * result).sum() for index, result in enumerate(results)).backward()
    assert torch.equal(own.grad, whole.grad[layout.numbers(whole.device)])
    assert sum(result.numel() for result in results) == 0 or whole.grad.any()


def _gather(layout: Rows, dtype: torch.dtype = torch.float32) -> None:
    _check(layout, dtype, lambda own: gather_rows_with_gradient(own, layout), lambda _, whole: whole.clone())
    whole = _all_rows(layout, dtype)
    without = gather_rows(whole[layout.numbers(whole.device)], layout)
    assert torch.equal(without, whole)
    assert not without.requires_grad


def _fetch(
    layout: Rows, wanted: Callable[[int, int, tuple[int, ...]], list[int]], dtype: torch.dtype = torch.float32
) -> None:
    rows = [torch.tensor(wanted(i, len(layout.sizes), layout.sizes)).long() for i in range(len(layout.sizes))]
    _check(
        layout, dtype, lambda own: fetch_rows(own, rows[layout.index], layout), lambda index, whole: whole[rows[index]]
    )
