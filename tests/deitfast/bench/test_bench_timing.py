"""How the bench measures: rounds, what was made ahead, pauses, processor time."""

import os
import time

import pytest

from deitfast.bench.timing import HOST, BenchCase, Stall, TimingOptions, measure, processor_seconds


class Ticks:
    """A clock that stands still unless told to go on."""

    now = 0.0

    def mark(self) -> float:
        return self.now

    def wait(self) -> None:
        pass

    def seconds(self, began: float, ended: float) -> float:
        return ended - began


def test_rates_and_waiting_follow_the_clock() -> None:
    clock = Ticks()

    def call() -> Stall:
        began, clock.now = clock.now, clock.now + 0.25
        stall, clock.now = Stall(began, clock.now), clock.now + 0.75
        return stall

    work = BenchCase("work", "", "device", 10, call, on_device=True)
    (found,) = measure([work], clock, TimingOptions(1e-3, rounds=3))  # pyright: ignore[reportArgumentType]
    assert found.rates == (10.0,) * 3
    assert found.waiting == 0.25


def test_what_was_made_beforehand_goes_unmeasured_and_workers_finish_their_turns() -> None:
    calls: list[str] = []
    works = [
        BenchCase("one", "", None, 1, lambda: calls.append("one"), prefetched=3),
        BenchCase("four", "", None, 1, lambda: (calls.append("four"), time.sleep(0.01)), worker_batches=4),
    ]
    one, four = measure(works, HOST, TimingOptions(1e-3, rounds=1))
    assert four.samples[0].images == 16
    assert calls.count("one") >= one.samples[0].images + 2 * 3 + 1


def test_processor_time_of_other_processes_counts() -> None:
    before = processor_seconds([os.getpid()])
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    assert processor_seconds([os.getpid()]) - before == pytest.approx(0.4, abs=0.05)


class Overlapping(Ticks):
    """A device that works through its steps while the host goes on, and a loader that makes three batches ahead."""

    AHEAD, BATCH, STEP = 3, 60.0, 47.0

    def __init__(self) -> None:
        self.device = 0.0
        """When the device will have done what it was given."""
        self.made, self.taken = [0.0], [0.0] * self.AHEAD

    def take(self) -> None:
        self.made.append(max(self.made[-1], self.taken[-self.AHEAD]) + self.BATCH)
        self.now = max(self.now, self.made[-1])
        self.taken.append(self.now)

    def step(self) -> None:
        self.device = max(self.device, self.now) + self.STEP

    def train(self) -> None:
        self.take()
        self.step()

    def mark(self) -> float:
        return max(self.device, self.now)

    def wait(self) -> None:
        self.now = self.mark()


@pytest.mark.parametrize("batch", [40.0, 60.0])
def test_what_a_loader_made_while_others_were_measured_does_not_count(batch: float) -> None:
    clock = Overlapping()
    clock.BATCH = batch
    works = [
        BenchCase("step", "", None, 1, clock.step, on_device=True),
        BenchCase("both", "", None, 1, clock.train, prefetched=clock.AHEAD, drop_prefetched=clock.take, on_device=True),
    ]
    alone, both = measure(works, clock, TimingOptions(1e-6, rounds=5))  # pyright: ignore[reportArgumentType]
    assert alone.rates == pytest.approx([1 / clock.STEP] * 5)
    assert both.rates == pytest.approx([1 / max(clock.STEP, batch)] * 5)
