"""Where a stream stands: collected from consumed batches, stored with a checkpoint, given back to the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StreamPositions:
    """The newest position of each worker of this process's loader.

    A loader prefetches, so only batches that were trained on tell how far a run has come: every example of a
    stream carries its "stream_position", and the training loop hands those of each batch to `observe`.
    Each process keeps its own and stores it with its checkpoint; give it to `load_state_dict` of the stream,
    before the loader is iterated.
    """

    def __init__(self) -> None:
        self._head: dict[str, int] | None = None
        self._workers: dict[int, Any] = {}
        self._last_worker = 0

    def observe(self, positions: Sequence[dict]) -> None:
        """Take note of a consumed batch.

        Args:
            positions: the "stream_position" of its examples, in order.

        Raises:
            ValueError: positions of another number of workers or processes than before.
        """
        for position in positions:
            head = {key: position[key] for key in ("workers", "process", "processes", "pass")}
            if head != self._head:
                self._begin(head)
            self._workers[position["worker"]] = position["at"]
            self._last_worker = position["worker"]

    def _begin(self, head: dict[str, int]) -> None:
        if self._head is not None and {**self._head, "pass": 0} != {**head, "pass": 0}:
            raise ValueError(f"`positions` belong to {head}, those before to {self._head}")
        self._head = head
        self._workers = {}  # a new pass: where the one before ended is of no interest

    def state_dict(self) -> dict:
        """The positions as JSON types; empty before the first batch."""
        if self._head is None:
            return {}
        # Batches come from the workers in turn, so the next one is due from the worker after the last.
        following = (self._last_worker + 1) % self._head["workers"]
        workers = {str(worker): at for worker, at in sorted(self._workers.items())}
        return {**self._head, "next_worker": following, "positions": workers}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict()`; the stream itself needs it too.

        Raises:
            ValueError: not a `state_dict()`.
        """
        if not state:
            self._head, self._workers, self._last_worker = None, {}, 0
            return
        check_stream_state(state)
        self._head = {key: state[key] for key in ("workers", "process", "processes", "pass")}
        self._workers = {int(worker): at for worker, at in state["positions"].items()}
        self._last_worker = (state["next_worker"] - 1) % state["workers"]


def check_stream_state(state: dict) -> None:
    """A ValueError unless `state` has the fields of `StreamPositions.state_dict()`."""
    wanted = {"workers", "process", "processes", "pass", "next_worker", "positions"}
    if not isinstance(state, dict) or wanted - set(state):
        raise ValueError(
            f"`state` must be what StreamPositions.state_dict() gave, with {sorted(wanted)}, got {state!r:.200}"
        )
