"""Processes: this one's place among those that torchrun started, its cores, and workers of its own.

`in_order` runs a function over tasks in several processes and gives the results back in the tasks' order.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from pipelines.errors import DeitfastError

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 4
"""Tasks per worker that may be under way or waiting for an earlier one; bounds memory."""
_work: Callable[[Any], Any]
"""A worker process's function, sent to it once."""


def usable_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank() -> int:
    """Return this process's number among all that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the processes that torchrun started on all nodes; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return this process's number among those that torchrun started on this node; 0 without it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the processes that torchrun started on this node; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Generator[Result, None, None]:
    """Yield work(task) for each task, in order, computed by `workers` processes (1: this one).

    Close the iterator (or exhaust it) to end the workers. They also end when this process dies, however it dies.

    Args:
        work: picklable; should import little, as each worker imports it again.
        tasks: picklable; read a little ahead of the results.
        workers: number of processes, at least 1.

    Raises:
        DeitfastError: a worker died. What `work` raises is raised here.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    resource_tracker.ensure_running()  # it unblocks SIGINT when it starts
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (work,))
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            pending.append(_submit(pool, task))
            if len(pending) >= AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DeitfastError(
            "a worker process died",
            found="it was killed (out of memory?) or crashed",
            remedy="run the same command again, with fewer workers if memory is short; it goes on where it stopped",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, task: Any) -> Future:
    """Hand a task to the pool; a process that it starts for it never sees Ctrl-C, which is this process's to handle."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_run, task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(task: Any) -> Any:
    return _work(task)
