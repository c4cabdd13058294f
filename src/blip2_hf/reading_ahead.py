"""Work done ahead in threads, in order and bounded: reading images while a model computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, ahead: int
) -> Iterator[Result]:
    """`function(item)` of each item in the order of the items, worked on while the caller is busy with earlier ones.

    Decoding and resizing with Pillow release Python's global lock, so that threads are enough. An exception of
    `function` is raised when it is the item's turn. Whoever stops before the end closes the iterator: nothing more is
    begun then, and what has been begun is waited for.

    Args:
        function: called in the threads.
        items: gone through in the caller's thread.
        workers: threads; 0: each result is computed when it is asked for.
        ahead: results that are there, or worked on, beyond the one that the caller has: at least 1.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read_ahead")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
