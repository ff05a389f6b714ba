"""The thread that makes batches ahead: how many, what it hands on, how it ends."""

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pipelines.batch import Batch
from pipelines.loaders import prefetch
from pipelines.loaders.batch_plan import CHUNK
from pipelines.loaders.codecs.pillow import PillowCodec
from pipelines.loaders.prefetch import QUEUED, prefetched
from pipelines.rng.view_params import COLUMNS, ViewParams
from pipelines.storage.reader import Reader
from tests.helpers.loader_contract import BATCH, RESIZED, open_eval

CPU = torch.device("cpu")


def one_batch() -> Batch:
    empty = torch.zeros(1)
    return Batch(empty, empty, empty, ViewParams(np.zeros((1, sum(COLUMNS.values())), np.int32)))


def test_prefetching_stays_within_its_bound() -> None:
    made = []

    def source(stop: threading.Event) -> Iterator[Batch]:
        for step in range(20):
            made.append(step)
            yield one_batch()

    batches = prefetched(source, 3, CPU)
    for taken in range(1, 6):
        next(batches)
        time.sleep(0.05)
        assert len(made) == taken + 3


def test_prefetching_hands_on_what_came_before_an_exception() -> None:
    def source(stop: threading.Event) -> Iterator[Batch]:
        yield one_batch()
        yield one_batch()
        raise ValueError("third")

    batches = prefetched(source, 4, CPU)
    assert [next(batches).images.item() for _ in range(2)] == [0, 0]
    with pytest.raises(ValueError, match="third"):
        next(batches)


def test_threads_are_at_the_next_batch_while_one_waits_for_its_slowest_image(
    photos: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls, further = PillowCodec.decode, itertools.count(), threading.Event()

    def slow_at_first(codec: PillowCodec, data: np.ndarray, *window: int) -> np.ndarray:
        number = next(calls)
        if number == 0:
            assert further.wait(20), "the other thread stopped at the end of the batch"
        if number > BATCH - CHUNK:  # more than the first thread leaves of the first batch
            further.set()
        return decode(codec, data, *window)

    monkeypatch.setattr(PillowCodec, "decode", slow_at_first)
    assert sum(batch.valid.sum() for batch in open_eval("reference", photos, RESIZED).epoch(0)) == photos.num_samples


def test_the_source_is_closed_in_its_own_thread() -> None:
    ended = []

    def source(stop: threading.Event) -> Iterator[Batch]:
        try:
            while True:
                yield one_batch()
        finally:
            ended.append(threading.current_thread().name)

    before = threading.active_count()
    batches = prefetched(source, 2, CPU)
    next(batches)
    del batches
    assert ended == ["deitfast-prefetch"]
    assert threading.active_count() == before


@dataclass
class Gpu:
    """Done with so many batches."""

    done: int = 0
    received: int = 0


@dataclass
class Mark:
    """Stands for an event that was recorded on the consumer's stream when it received a batch."""

    gpu: Gpu
    before: int

    def query(self) -> bool:
        return self.gpu.done >= self.before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU that only goes on when told to."""
    gpu = Gpu()
    receive = prefetch.Transfer.receive

    def marked(transfer: prefetch.Transfer, item: prefetch.InFlight) -> Batch:
        transfer._received.append(Mark(gpu, gpu.received))  # type: ignore[arg-type]
        gpu.received += 1
        return receive(transfer, item)

    monkeypatch.setattr(prefetch.Transfer, "receive", marked)
    return gpu


def test_no_batch_is_begun_for_a_host_that_is_far_ahead_of_its_gpu(gpu: Gpu) -> None:
    made: list[int] = []

    def source(stop: threading.Event) -> Iterator[Batch]:
        for _ in range(20):
            made.append(gpu.received - gpu.done)
            yield one_batch()

    batches = prefetched(source, 1, CPU)
    for step in range(20):
        if step > QUEUED:
            time.sleep(0.01)
            assert len(made) == step  # the next one is not begun
            gpu.done += 1
        next(batches)
    gpu.done = gpu.received
    assert next(batches, None) is None
    assert max(made) == QUEUED


def test_breaking_off_does_not_wait_for_the_gpu(gpu: Gpu) -> None:
    batches = prefetched(lambda stop: iter([one_batch()] * 20), 1, CPU)
    for _ in range(QUEUED + 1):
        next(batches)
    before = threading.active_count()
    del batches
    assert threading.active_count() == before - 1
