"""How far the cpu loader scales with threads: arithmetic on the time in which a thread holds Python's lock.

The model: each thread's views take `free` seconds in compiled code, any number of threads at once, and `locked` seconds
in Python, one thread at a time. That is a closed queueing network of one server (the lock) and a delay. Its throughput
follows exactly by mean value analysis (Reiser and Lavenberg, JACM 1980), for times of exponential distribution: real
ones vary less, so threads wait for the lock less than predicted. Every thread has a core of its own.
"""

from contextlib import ExitStack, closing
from dataclasses import replace

import numpy as np

from deitfast.bench.record import LoaderScaling
from deitfast.bench.timing import HOST, BenchCase, TimingOptions, measure
from deitfast.bench.workbench import Workbench, endless
from pipelines.errors import pluralize
from pipelines.loaders.codecs.turbo import TurboCodec
from pipelines.loaders.host import TurboLoader

MEASURED = (1, 2)
"""Threads that are measured, as far as there are cores."""
PREDICTED = (1, 2, 4, 8, 16, 32, 64)
BEND = 0.8
"""The curve bends at the first number of threads that reach less than this share of as many times one thread."""


class NoCodec(TurboCodec):
    """Renders nothing: what is left of the loader is Python."""

    def render(self, images: np.ndarray, crops: np.ndarray, out: np.ndarray, *, check: bool) -> np.ndarray:
        """Say that all is done; see `TurboCodec`."""
        return np.zeros(len(images), np.int32)


def throughput(locked: float, free: float, threads: int) -> float:
    """Return views/s of that many threads, from the seconds that one needs for a view with and without the lock."""
    waiting = rate = 0.0  # mean number of threads at the lock
    for count in range(1, threads + 1):
        at_lock = locked * (1 + waiting)
        rate = count / (free + at_lock)
        waiting = rate * at_lock
    return rate


def bend(locked: float, free: float) -> int:
    """Return the first number of threads at which the lock costs a fifth of what as many cores could do."""
    one, threads = throughput(locked, free, 1), 1
    while throughput(locked, free, threads) >= BEND * threads * one and threads < 1024:
        threads += 1
    return threads


def loader_scaling(bench: Workbench, timing: TimingOptions) -> LoaderScaling | None:
    """Measure the loader on few threads and without its codec, and predict more; None where another loader is used."""
    loader = bench.loader
    if not isinstance(loader, TurboLoader):
        return None
    counts = [count for count in MEASURED if count <= bench.cores]
    with ExitStack() as stack:

        def case(name: str, threads: int, codec: type[TurboCodec] | None = None) -> BenchCase:
            plan = replace(loader.plan, spec=replace(loader.plan.spec, workers=threads))
            batches = stack.enter_context(closing(endless(TurboLoader(loader.name, plan, codec or loader.new_codec))))
            views, prefetched = bench.recipe.train.batch, plan.spec.prefetch + 1
            return BenchCase(name, "the loader alone", None, views, lambda: next(batches), prefetched=prefetched)

        cases = [case("Python alone", 1, NoCodec), *(case(pluralize(count, "thread"), count) for count in counts)]
        without, *measured = measure(cases, HOST, timing)
    locked = without.cpu_seconds
    free = max(measured[0].cpu_seconds - locked, 0.0)
    rates = {threads: throughput(locked, free, threads) for threads in PREDICTED}
    return LoaderScaling(without, tuple(measured), free, rates, bend(locked, free))
