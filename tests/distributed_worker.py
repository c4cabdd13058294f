"""Several processes on this machine (gloo, CPU) that run one function together, for tests of distributed behaviour."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once, by the server that the processes are forked from.
PRELOADED = ["pytest", "distributed_objectives", "distributed_rows"]


def run(
    function: Callable[..., Any], processes: int, *args: Any, timeout: float = 90.0, group_timeout: float = 20.0
) -> list[Any]:
    """`function(*args)` in each of `processes` processes of one group; what each returned (anything `torch.save`
    takes), in order.

    `function` must be found by name in a module on `sys.path`. A collective that waits longer than `group_timeout`
    seconds fails in its process; processes that are not done after `timeout` seconds are killed.

    Raises:
        AssertionError: if a process failed (with all tracebacks), or was killed.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{index}.pt") for index in range(processes)]
        port = _free_port()
        workers = [
            context.Process(target=_work, args=(function, args, index, processes, port, group_timeout, files[index]))
            for index in range(processes)
        ]
        for worker in workers:
            worker.start()
        end = time.monotonic() + timeout
        for worker in workers:
            worker.join(max(0.0, end - time.monotonic()))
        hanging = [index for index, worker in enumerate(workers) if worker.is_alive()]
        for worker in workers:
            worker.kill()
            worker.join()
        assert not hanging, f"processes {hanging} of {processes} were not done after {timeout} s"
        results = [torch.load(file, weights_only=False) if file.exists() else (None, "it died") for file in files]
    failures = [f"process {index}: {error}" for index, (_, error) in enumerate(results) if error]
    assert not failures, "\n".join(failures)
    return [value for value, _ in results]


def outcomes(cases: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each case returned, or its traceback as a `Failure`: one group of processes serves many cases."""
    results = {}
    for name, case in cases.items():
        try:
            results[name] = case()
        except Exception:
            results[name] = Failure(traceback.format_exc())
    return results


class Failure(str):
    """The traceback of a case."""


def _context() -> multiprocessing.context.BaseContext:
    """Processes come from a server that has everything imported, which saves seconds for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # not passed on by the server's start
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _work(
    function: Callable, args: tuple, index: int, processes: int, port: int, group_timeout: float, file: Path
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(index)
    warnings.simplefilter("error", FutureWarning)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(processes)}
    value, error = None, ""
    try:
        dist.init_process_group("gloo", rank=index, world_size=processes, timeout=timedelta(seconds=group_timeout))
        value = function(*args)
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        error = traceback.format_exc()
    torch.save((value, error), file)
    os._exit(0)  # threads of a broken group must not keep the process
