"""How time is measured: the wall clock on a CPU, events on CUDA; processor time of threads and workers; rounds."""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deitfast.bench.record import Measured, Measurement, Resource

IDLE_SECONDS = 0.05
"""Time without work in the background that counts as idle."""
IDLE_SHARE = 0.02
"""Share of a core that idle programs use at most; a busy thread on a machine that others keep busy may get a tenth."""
PATIENCE_SECONDS = 10.0
"""Longest wait for that."""
LEAST_WORKER_BATCHES = 4
"""Batches of each worker process in one measurement, at least: what is half done at either end would count in fewer."""


@dataclass(frozen=True)
class Stall:
    """A time in which the step had no batch to work on, between two marks of a clock."""

    start: Any
    end: Any


@dataclass(frozen=True)
class BenchCase:
    """Something to call over and over."""

    name: str
    what: str
    """What is done, in a few words."""
    resource: Resource | None
    images: int
    """Images that one call processes."""
    call: Callable[[], object]
    """May return a `Stall`."""
    threaded: bool = False
    """Whether the loader's threads will share this work."""
    prefetched: int = 0
    """Batches that may have been made in the background: as many calls go unmeasured before a measurement."""
    drop_prefetched: Callable[[], object] | None = None
    """Takes one of the prefetched batches, so that it is not worked off in a measurement; None: as `call` does."""
    worker_batches: int = 1
    """Worker processes that each make whole batches, which arrive together: measured in whole multiples."""
    on_device: bool = False
    """Whether the device's clock decides."""
    worker_pids: Callable[[], list[int]] = list
    """Worker processes whose processor time counts."""


class Clock:
    """Marks in time and the seconds between them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None

    def mark(self) -> Any:
        """Return now: on CUDA, an event behind everything that was started so far."""
        if self._cuda is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._cuda))
        return event

    def wait(self) -> None:
        """Wait until the device has done everything that was started."""
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks, the later of which was waited for."""
        return end - start if self._cuda is None else start.elapsed_time(end) / 1000


@dataclass(frozen=True)
class TimingOptions:
    """How long and how often to measure, and whom to tell."""

    seconds: float
    """Least time of one measurement, roughly."""
    rounds: int
    """Measurements of each case."""
    on_planned: Callable[[int], None] = lambda count: None
    """Called with the number of measurements to come."""
    on_measured: Callable[[str, float], None] = lambda name, rate: None
    """Called after each measurement with the case's name and images/s."""


HOST = Clock(torch.device("cpu"))
"""The wall clock, for work that is the host's whatever the device."""


def measure(cases: Sequence[BenchCase], clock: Clock, timing: TimingOptions) -> list[Measured]:
    """Measure cases round by round, one after another, so that a machine that slows down slows them all alike.

    Each is warmed up first. Before each measurement, what was prefetched while other cases were measured is used up:
    otherwise a loader of four fifths of the step's rate would pass for as fast over the first twelve steps. A single
    case goes on without a break between its measurements.
    """
    timing.on_planned(timing.rounds * len(cases))
    counts = [_warm_up(case, _clock(case, clock), timing.seconds) for case in cases]
    samples: list[list[Measurement]] = [[] for _ in cases]
    for _ in range(timing.rounds):
        for case, count, found in zip(cases, counts, samples, strict=True):
            if len(cases) > 1:
                wait_idle(case.worker_pids)
            if case.drop_prefetched and (len(cases) > 1 or not found):
                _repeat(case.drop_prefetched, case.prefetched)
            if len(cases) > 1:
                _repeat(case.call, case.prefetched)
            found.append(_sample(case, _clock(case, clock), count))
            timing.on_measured(case.name, found[-1].images / found[-1].seconds)
    return [
        Measured(case.name, case.what, case.resource, case.threaded, tuple(found))
        for case, found in zip(cases, samples, strict=True)
    ]


def wait_idle(worker_pids: Callable[[], list[int]] = list) -> None:
    """Wait until this process and its workers are idle: prefetching must not count against the next case."""
    last = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < last:
        before = processor_seconds(worker_pids())
        time.sleep(IDLE_SECONDS)
        if processor_seconds(worker_pids()) - before < IDLE_SHARE * IDLE_SECONDS:
            return


def processor_seconds(pids: Sequence[int] = ()) -> float:
    """Return the processor time of this process and of others, user and system, in seconds."""
    return time.process_time() + sum(map(_processor_seconds_of, pids))


def _processor_seconds_of(pid: int) -> float:
    """As /proc says, in steps of 10 ms; see proc(5)."""
    text = Path(f"/proc/{pid}/stat").read_text()
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _clock(case: BenchCase, clock: Clock) -> Clock:
    return clock if case.on_device else HOST


def _warm_up(case: BenchCase, clock: Clock, seconds: float) -> int:
    """Call until compilers, caches and queues are past their start; return the calls of one measurement."""
    for _ in range(case.prefetched + 1):
        case.call()
    clock.wait()
    durations: list[float] = []
    while sum(durations) < seconds:
        start = time.perf_counter()
        case.call()
        clock.wait()
        durations.append(time.perf_counter() - start)
    calls = math.ceil(seconds / max(statistics.mean(durations), 1e-9))
    if case.worker_batches == 1:
        return calls
    return max(LEAST_WORKER_BATCHES, math.ceil(calls / case.worker_batches)) * case.worker_batches


def _repeat(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


def _sample(case: BenchCase, clock: Clock, count: int) -> Measurement:
    """Measure without waiting for the device first: while it finished earlier calls, the loader would get ahead."""
    stalls: list[Stall] = []
    cpu, start = processor_seconds(case.worker_pids()), clock.mark()
    for _ in range(count):
        found = case.call()
        if isinstance(found, Stall):
            stalls.append(found)
    end = clock.mark()
    cpu = processor_seconds(case.worker_pids()) - cpu  # before the wait, in which CUDA keeps a core busy with nothing
    clock.wait()
    waited = sum(clock.seconds(stall.start, stall.end) for stall in stalls)
    return Measurement(count * case.images, clock.seconds(start, end), cpu, waited)
