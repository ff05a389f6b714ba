"""Threads that share a lock: the throughput's limits, and where the curve bends."""

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from deitfast.bench.threads import PREDICTED, bend, loader_scaling, throughput
from deitfast.bench.timing import TimingOptions
from deitfast.bench.workbench import Workbench
from pipelines.loaders.codecs import turbo
from pipelines.storage.dataset import Dataset
from tests.helpers.small_runs import CPU, tiny_recipe


def simulated(locked: Callable[[], float], free: Callable[[], float], threads: int, views: int = 40_000) -> float:
    """Views/s of threads that compute, wait for the lock in order of arrival, hold it, and begin again."""
    arrivals, lock = sorted(free() for _ in range(threads)), 0.0
    for _ in range(views):
        lock = max(arrivals.pop(0), lock) + locked()
        arrivals.append(lock + free())
        arrivals.sort()
    return views / lock


@pytest.mark.parametrize("threads", [1, 2, 8, 20])
def test_the_rate_is_that_of_threads_simulated_one_by_one(threads: int) -> None:
    rng = random.Random(0)
    found = simulated(lambda: rng.expovariate(1 / 4e-6), lambda: rng.expovariate(1 / 60e-6), threads)
    assert throughput(4e-6, 60e-6, threads) == pytest.approx(found, rel=0.03)
    steady = simulated(lambda: 4e-6, lambda: 60e-6, threads)
    assert throughput(4e-6, 60e-6, threads) <= steady * 1.001  # what varies less waits less


def test_the_curve_bends_where_a_fifth_of_the_cores_waits() -> None:
    at = bend(5e-6, 75e-6)
    one = throughput(5e-6, 75e-6, 1)
    assert throughput(5e-6, 75e-6, at) < 0.8 * at * one <= 0.8 * at / (at - 1) * throughput(5e-6, 75e-6, at - 1) / 0.8
    assert throughput(5e-6, 75e-6, 64) == pytest.approx(1 / 5e-6, rel=0.01)
    assert bend(1e-9, 75e-6) == 1024


@pytest.mark.skipif(bool(turbo.unavailable()), reason=turbo.unavailable() or "works here")
def test_the_cpu_loader_is_measured_with_and_without_its_codec(tiny_dataset: Path) -> None:
    crops = ["augment.crop=resized", "augment.repeats=1", "train.batch=8", "augment.mix_group=4", "loader.name=cpu"]
    with closing(Dataset.open(tiny_dataset)) as data, closing(Workbench(data, tiny_recipe(*crops), CPU)) as bench:
        found = loader_scaling(bench, TimingOptions(0.02, rounds=1))
        assert found is not None
        assert [*found.predicted] == list(PREDICTED)
        assert found.python.cpu_seconds > 0
        assert found.measured[0].name == "1 thread"
        with closing(bench.changed(["loader.name=reference"])) as other:
            assert loader_scaling(other, TimingOptions(0.02, rounds=1)) is None
