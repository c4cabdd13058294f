"""The global batch of several processes: gathering and exchanging rows with their gradients.

Processes may hold different numbers of rows. Gradients: if each process back-propagates a loss of its own, the
gradient that a row receives is that of the sum of all processes' losses. Without a process group (or with one
process) every function is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

# Renamed in torch 2.13, which warns about the old name. A torch built without distributed has neither.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


@dataclass(frozen=True)
class Rows:
    """How the rows of the global batch are spread over the processes.

    Attributes:
        sizes: number of rows of each process.
        index: number of this process.
    """

    sizes: tuple[int, ...]
    index: int = 0

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def start(self) -> int:
        """Number of this process's first row in the global batch."""
        return sum(self.sizes[: self.index])

    def numbers(self, device: torch.device) -> torch.Tensor:
        """[n] numbers of this process's rows in the global batch."""
        return torch.arange(self.start, self.start + self.sizes[self.index], device=device)


def gather_numbers(numbers: torch.Tensor) -> torch.Tensor:
    """A small integer vector [k] of every process: [W, k]."""
    if world_size() == 1:
        return numbers[None]
    gathered = [torch.empty_like(numbers) for _ in range(world_size())]
    dist.all_gather(gathered, numbers.contiguous())
    return torch.stack(gathered)


def part_sizes(rows: int, most: int, device: torch.device) -> list[int]:
    """Sizes of the parts, of at most `most` rows, in which this process computes its `rows`.

    All processes get the same number of parts, as sharded parameters are gathered once per part, by all processes
    together. So parts are larger than `most` where another process has too few rows for as many.
    """
    all_rows = gather_numbers(torch.tensor([rows], device=device)).flatten().tolist()
    parts = min(-(-max(all_rows) // most), min(all_rows))
    return [rows // parts + (index < rows % parts) for index in range(parts)]


def gather_rows(rows: torch.Tensor, layout: Rows) -> torch.Tensor:
    """[n, …] of every process, one after the other: [N, …], without gradient."""
    return _gather(rows.detach(), layout) if len(layout.sizes) > 1 else rows.detach()


def gather_rows_with_gradient(rows: torch.Tensor, layout: Rows) -> torch.Tensor:
    """As `gather_rows`; the gradients of all processes come back to the process a row is from, summed."""
    return _GatherRows.apply(rows, layout) if len(layout.sizes) > 1 else rows


def fetch_rows(rows: torch.Tensor, wanted: torch.Tensor, layout: Rows) -> torch.Tensor:
    """Rows of other processes by their numbers in the global batch, with gradient.

    Only the rows that are asked for travel (an image's features are large), each once per request. All processes must
    call it together, also those that want none.

    Args:
        rows: [n, …] of this process.
        wanted: [k] numbers in the global batch.
        layout: of the global batch.

    Returns:
        [k, …].
    """
    if len(layout.sizes) == 1:
        return rows[wanted]
    wanted, order = wanted.sort()  # by owner, which is the order in which rows arrive
    ends = torch.tensor(layout.sizes, device=wanted.device).cumsum(0)
    owners = torch.bucketize(wanted, ends, right=True)
    # How many rows each process wants of each other, then which.
    counts = gather_numbers(torch.bincount(owners, minlength=len(layout.sizes)))
    receives = counts[layout.index].tolist()
    sends = counts[:, layout.index].tolist()
    requests = wanted.new_empty(sum(sends))
    dist.all_to_all_single(requests, wanted, output_split_sizes=sends, input_split_sizes=receives)
    return _Exchange.apply(rows[requests - layout.start], sends, receives)[order.argsort()]


def _gather(rows: torch.Tensor, layout: Rows) -> torch.Tensor:
    most = max(layout.sizes)
    padded = nn.functional.pad(rows, [0, 0] * (rows.ndim - 1) + [0, most - rows.shape[0]]).contiguous()
    gathered = [torch.empty_like(padded) for _ in layout.sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, layout.sizes, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, layout: Rows) -> torch.Tensor:
        ctx.layout = layout
        return _gather(rows, layout)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        layout = ctx.layout
        most = max(layout.sizes)
        blocks = gradient.new_zeros(len(layout.sizes), most, *gradient.shape[1:])
        for block, part in zip(blocks, gradient.split(layout.sizes), strict=True):
            block[: part.shape[0]] = part
        own = torch.empty_like(blocks[0])
        _reduce_scatter(own, blocks.flatten(0, 1))
        return own[: layout.sizes[layout.index]], None


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; its gradient is the all-to-all in the other direction."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, sends: list[int], receives: list[int]) -> torch.Tensor:
        ctx.sends, ctx.receives = sends, receives
        received = rows.new_empty(sum(receives), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), output_split_sizes=receives, input_split_sizes=sends)
        return received

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        returned = gradient.new_empty(sum(ctx.sends), *gradient.shape[1:])
        dist.all_to_all_single(
            returned, gradient.contiguous(), output_split_sizes=ctx.sends, input_split_sizes=ctx.receives
        )
        return returned, None, None
