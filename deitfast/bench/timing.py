"""Time: the wall clock on a CPU, events on CUDA; processor time of threads and workers; rounds of measurements."""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deitfast.bench.record import Lane, Measured, Sample

IDLE_SECONDS = 0.05
"""How long nothing may work ahead before the next stage is measured."""
PATIENCE_SECONDS = 5.0
"""How long to wait for that."""

LEAST_TURNS = 4
"""Of workers that each make a whole batch: in fewer, what was half done at either end would count."""


@dataclass(frozen=True)
class Pause:
    """A time in which the step had nothing to work on, between two marks of a clock."""

    began: Any
    ended: Any


@dataclass(frozen=True)
class Work:
    """Something to call over and over."""

    name: str
    what: str
    """What is done, in a few words."""
    lane: Lane | None
    images: int
    """That one call deals with."""
    call: Callable[[], object]
    """May return a `Pause`."""
    threaded: bool = False
    """Whether the loader's threads will share this work."""
    ahead: int = 0
    """Calls that may have been made beforehand in the background: as many go unmeasured before a measurement."""
    drain: Callable[[], object] | None = None
    """Takes one of what was made beforehand, so that it is not worked off in a measurement; None: as `call` does."""
    at_once: int = 1
    """Calls whose results come at about the same time, from workers that each do one: measured in whole multiples."""
    on_device: bool = False
    """Whether the device's clock decides."""
    processes: Callable[[], list[int]] = list
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

    def seconds(self, began: Any, ended: Any) -> float:
        """Return the seconds between two marks, the later of which was waited for."""
        return ended - began if self._cuda is None else began.elapsed_time(ended) / 1000


@dataclass(frozen=True)
class Pace:
    """How long and how often to measure, and who hears of it."""

    seconds: float
    """Least time of one measurement, roughly."""
    rounds: int
    """Measurements of each stage."""
    planned: Callable[[int], None] = lambda count: None
    """Called with the number of measurements to come."""
    told: Callable[[str, float], None] = lambda name, rate: None
    """Called after each with the stage's name and images/s."""


HOST = Clock(torch.device("cpu"))
"""The wall clock, for work that is the host's whatever the device."""


def measure(works: Sequence[Work], clock: Clock, pace: Pace) -> list[Measured]:
    """Measure works in turns, so that a machine that slows down slows them all alike.

    Each is warmed up first, and what it made ahead while the others had their turn goes before its own begins: a
    loader of four fifths of the step's rate would pass for as fast over the first twelve steps. A single one goes on
    without a break between its measurements.
    """
    pace.planned(pace.rounds * len(works))
    counts = [_warm_up(work, _clock(work, clock), pace.seconds) for work in works]
    samples: list[list[Sample]] = [[] for _ in works]
    for _ in range(pace.rounds):
        for work, count, found in zip(works, counts, samples, strict=True):
            if len(works) > 1:
                settle(work.processes)
            if work.drain and (len(works) > 1 or not found):
                _repeat(work.drain, work.ahead)
            if len(works) > 1:
                _repeat(work.call, work.ahead)
            found.append(_sample(work, _clock(work, clock), count))
            pace.told(work.name, found[-1].images / found[-1].seconds)
    return [
        Measured(work.name, work.what, work.lane, work.threaded, tuple(found))
        for work, found in zip(works, samples, strict=True)
    ]


def settle(processes: Callable[[], list[int]] = list) -> None:
    """Wait until this process and its workers are idle: what works ahead must not count against the next stage."""
    last = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < last:
        before = processor_seconds(processes())
        time.sleep(IDLE_SECONDS)
        if processor_seconds(processes()) - before < IDLE_SECONDS / 5:
            return


def processor_seconds(processes: Sequence[int] = ()) -> float:
    """Return the processor time of this process and of others, user and system, in seconds."""
    return time.process_time() + sum(map(_processor_seconds_of, processes))


def _processor_seconds_of(process: int) -> float:
    """As /proc says, in steps of 10 ms; see proc(5)."""
    text = Path(f"/proc/{process}/stat").read_text()
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _clock(work: Work, clock: Clock) -> Clock:
    return clock if work.on_device else HOST


def _warm_up(work: Work, clock: Clock, seconds: float) -> int:
    """Call until compilers, caches and queues are past their beginning; return the calls of one measurement."""
    for _ in range(work.ahead + 1):
        work.call()
    clock.wait()
    durations: list[float] = []
    while sum(durations) < seconds:
        began = time.perf_counter()
        work.call()
        clock.wait()
        durations.append(time.perf_counter() - began)
    calls = math.ceil(seconds / max(statistics.mean(durations), 1e-9))
    return calls if work.at_once == 1 else max(LEAST_TURNS, math.ceil(calls / work.at_once)) * work.at_once


def _repeat(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


def _sample(work: Work, clock: Clock, count: int) -> Sample:
    """Measure without a wait in front: while the device worked off the calls before, the loader would get ahead."""
    pauses: list[Pause] = []
    spent, began = processor_seconds(work.processes()), clock.mark()
    for _ in range(count):
        found = work.call()
        if isinstance(found, Pause):
            pauses.append(found)
    ended = clock.mark()
    spent = processor_seconds(work.processes()) - spent  # before the wait, in which CUDA keeps a core busy with nothing
    clock.wait()
    waited = sum(clock.seconds(pause.began, pause.ended) for pause in pauses)
    return Sample(count * work.images, clock.seconds(began, ended), spent, waited)
