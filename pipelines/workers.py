"""Runs a function over tasks in several processes and gives the results back in the tasks' order."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from pipelines.errors import DeitfastError

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 4
"""Tasks per worker that may be under way or waiting for an earlier one; bounds memory."""


def usable_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Generator[Result, None, None]:
    """Yield work(task) for each task, in order, computed by `workers` processes (1: this one).

    Close the iterator (or exhaust it) to end the workers. They also end when this process dies, however it dies:
    each holds one end of a pipe and nothing else.

    Args:
        work: picklable; should import little, as each worker imports it anew.
        tasks: picklable; read a little ahead of the results.
        workers: number of processes, at least 1.

    Raises:
        DeitfastError: a worker died. What `work` raises is raised here.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    crew: dict[Connection, SpawnProcess] = {}
    try:
        _start(crew, work, workers)
        yield from _exchange(crew, iter(tasks))
    finally:
        _stop(crew)


def _start(crew: dict[Connection, SpawnProcess], work: Callable, workers: int) -> None:
    """Start the processes deaf to Ctrl-C: this process hears it and stops them."""
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # it unblocks SIGINT when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            crew[ours] = process
            theirs.close()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exchange(crew: dict[Connection, SpawnProcess], tasks: Iterator[Any]) -> Iterator[Any]:
    """Keep every worker busy with one task (so that no two ends ever both wait to send) and sort the results."""
    idle, busy, ready = list(crew), {}, {}
    given, taken, exhausted = 0, 0, False
    while True:
        while idle and not exhausted and given < taken + AHEAD * len(crew):
            try:
                task = next(tasks)
            except StopIteration:
                exhausted = True
                break
            connection = idle.pop()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a dead worker shows in _receive
                connection.send(task)
            busy[connection] = given
            given += 1
        if taken in ready:
            yield ready.pop(taken)
            taken += 1
        elif busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                ready[busy.pop(connection)] = _receive(connection, crew[connection])
                idle.append(connection)
        else:
            return


def _receive(connection: Connection, process: SpawnProcess) -> Any:
    try:
        succeeded, result = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join(timeout=5)
        raise DeitfastError(
            "a worker process died",
            found=f"exit code {process.exitcode}" + (" (killed: out of memory?)" if process.exitcode == -9 else ""),
            remedy="run the same command again, with fewer workers if memory is short; it goes on where it stopped",
        ) from None
    if not succeeded:
        raise result
    return result


def _stop(crew: dict[Connection, SpawnProcess]) -> None:
    for connection, process in crew.items():
        process.terminate()
        connection.close()
    for process in crew.values():
        process.join()
        process.close()


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """A worker's life: tasks in, (succeeded, result or exception) out, until the other end is gone."""
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            task = connection.recv()
            try:
                answer = True, work(task)
            except Exception as error:
                if not isinstance(error, DeitfastError):
                    error.add_note("in a worker process:\n" + traceback.format_exc())
                answer = False, error
            connection.send(answer)
