"""The thread that makes batches ahead: how many, what it hands on, how it ends."""

import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.batch import Batch
from pipelines.loaders.batch_plan import CHUNK
from pipelines.loaders.codecs.pillow import PillowCodec
from pipelines.loaders.prefetch import QUEUED, prefetched
from pipelines.rng.view_params import COLUMNS, ViewParams
from pipelines.storage.reader import Reader
from tests.helpers.loader_contract import BATCH, RESIZED, open_eval

CPU = torch.device("cpu")


def as_it_is(batch: Batch) -> Batch:
    return batch


def one_batch() -> Batch:
    empty = torch.zeros(1)
    return Batch(empty, empty, empty, ViewParams(np.zeros((1, sum(COLUMNS.values())), np.int32)))


def test_prefetching_stays_within_its_bound() -> None:
    made = []

    def source(stop: threading.Event) -> Iterator[Batch]:
        for step in range(20):
            made.append(step)
            yield one_batch()

    batches = prefetched(source, 3, CPU, as_it_is)
    for taken in range(1, 6):
        next(batches)
        time.sleep(0.05)
        assert len(made) == taken + 3


def test_prefetching_hands_on_what_came_before_an_exception() -> None:
    def source(stop: threading.Event) -> Iterator[Batch]:
        yield one_batch()
        yield one_batch()
        raise ValueError("third")

    batches = prefetched(source, 4, CPU, as_it_is)
    assert [next(batches).images.item() for _ in range(2)] == [0, 0]
    with pytest.raises(ValueError, match="third"):
        next(batches)


@pytest.mark.parametrize(("cores", "making"), [(1, 1), (2, 1), (15, 1), (16, 2)])
def test_batches_are_made_by_few_of_torchs_threads_and_no_other_thread_is_left_with_as_few(
    cores: int, making: int
) -> None:
    found: list[int] = []

    def source(stop: threading.Event) -> Iterator[Batch]:
        yield one_batch()

    def then(batch: Batch) -> Batch:
        found.append(torch.get_num_threads())
        return batch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(cores)
        for _ in prefetched(source, 1, CPU, then):
            later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            later.start()
            later.join()
        assert (found, torch.get_num_threads()) == ([making, cores], cores)
    finally:
        torch.set_num_threads(before)


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
    batches = prefetched(source, 2, CPU, as_it_is)
    next(batches)
    del batches
    assert ended == ["deitfast-prefetch"]
    assert threading.active_count() == before


@dataclass
class Gpu:
    """Done with so many batches; on its streams, an event behind a batch is one more to be done."""

    done: int = 0
    received: int = 0
    enqueued: list[tuple[str, Any]] = field(default_factory=list)
    """What was enqueued on both streams, in the order of the calls: (stream, what)."""
    current: threading.local = field(default_factory=threading.local)
    """A thread's current stream."""

    def put(self, what: Any) -> None:
        """Enqueue something on the thread's current stream."""
        self.enqueued.append((getattr(self.current, "stream", "step"), what))

    @contextmanager
    def making(self) -> Iterator[None]:
        self.current.stream = "side"
        yield
        self.current.stream = "step"

    def mark_made(self) -> object:
        mark = object()
        self.put(("mark", mark))
        return mark

    def mark_taken(self) -> "Mark":
        self.received += 1
        return Mark(self, self.received - 1)

    def hand_over(self, made: object, tensors: Iterable[torch.Tensor]) -> None:
        self.put(("wait", made))
        for tensor in tensors:
            self.put(("keep", tensor.data_ptr()))


@dataclass
class Mark:
    """Stands for an event that was recorded on the consumer's stream when it received a batch."""

    gpu: Gpu
    before: int

    def query(self) -> bool:
        return self.gpu.done >= self.before


def test_no_batch_is_begun_for_a_host_that_is_far_ahead_of_its_gpu() -> None:
    made: list[int] = []
    gpu = Gpu()

    def source(stop: threading.Event) -> Iterator[Batch]:
        for _ in range(20):
            made.append(gpu.received - gpu.done)
            yield one_batch()

    batches = prefetched(source, 1, CPU, as_it_is, gpu)
    for step in range(20):
        if step > QUEUED:
            time.sleep(0.01)
            assert len(made) == step  # the next one is not begun
            gpu.done += 1
        next(batches)
    gpu.done = gpu.received
    assert next(batches, None) is None
    assert max(made) == QUEUED


def test_breaking_off_does_not_wait_for_the_gpu() -> None:
    batches = prefetched(lambda stop: iter([one_batch()] * 20), 1, CPU, as_it_is, Gpu())
    for _ in range(QUEUED + 1):
        next(batches)
    before = threading.active_count()
    del batches
    assert threading.active_count() == before - 1


@dataclass(frozen=True)
class Augmented:
    """What `then` makes of a batch: two tensors of its own, and something that is none."""

    pixels: torch.Tensor
    valid: torch.Tensor
    params: ViewParams


def test_what_is_made_of_a_batch_is_enqueued_beside_the_step_which_waits_for_it_and_keeps_its_memory() -> None:
    """On one stream: a batch, what is made of it, a mark. On the step's: the wait for that mark, then what uses it."""
    gpu, threads = Gpu(), set()

    def augment(batch: Batch) -> Augmented:
        threads.add(threading.current_thread().name)
        gpu.put("augment")
        return Augmented(batch.images + 1, batch.valid.clone(), batch.params)

    def source(stop: threading.Event) -> Iterator[Batch]:
        for _ in range(3):
            gpu.put("copy")
            yield one_batch()

    kept = []
    for made in prefetched(source, 1, CPU, augment, gpu):
        assert made.pixels.item() == 1
        gpu.put("step")
        kept.append({made.pixels.data_ptr(), made.valid.data_ptr()})
        gpu.done = gpu.received
    assert threads == {"deitfast-prefetch"}
    side, step = ([what for stream, what in gpu.enqueued if stream == name] for name in ("side", "step"))
    marks = [what for what in side if what[0] == "mark"]
    assert side == [what for mark in marks for what in ("copy", "augment", mark)]
    assert len(marks) == 3
    for number, (_, mark) in enumerate(marks):
        wait, *keeping, used = step[4 * number : 4 * number + 4]
        assert (wait, used) == (("wait", mark), "step")
        assert {address for _, address in keeping} == kept[number]
        enqueued = gpu.enqueued.index
        assert enqueued(("side", ("mark", mark))) < enqueued(("step", wait))


def test_an_error_of_what_is_made_of_a_batch_reaches_the_consumer() -> None:
    def fails(batch: Batch) -> Batch:
        raise ValueError("no kernels")

    with pytest.raises(ValueError, match="no kernels"):
        next(prefetched(lambda stop: iter([one_batch()]), 1, CPU, fails))
