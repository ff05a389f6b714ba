"""The thread that makes batches ahead: how many, what it hands on, how it ends."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipelines.batch import Batch
from pipelines.loaders.prefetch import prefetched
from pipelines.views import ViewParams

CPU = torch.device("cpu")


def one_batch() -> Batch:
    empty = torch.zeros(1)
    return Batch(empty, empty, empty, ViewParams(np.zeros((1, 25), np.int32)))


def test_prefetching_stays_within_its_bound() -> None:
    made = []

    def source() -> Iterator[Batch]:
        for step in range(20):
            made.append(step)
            yield one_batch()

    batches = prefetched(source, 3, CPU)
    for taken in range(1, 6):
        next(batches)
        time.sleep(0.05)
        assert len(made) == taken + 3


def test_prefetching_hands_on_what_came_before_an_exception() -> None:
    def source() -> Iterator[Batch]:
        yield one_batch()
        yield one_batch()
        raise ValueError("third")

    batches = prefetched(source, 4, CPU)
    assert [next(batches).images.item() for _ in range(2)] == [0, 0]
    with pytest.raises(ValueError, match="third"):
        next(batches)


def test_the_source_is_closed_in_its_own_thread() -> None:
    ended = []

    def source() -> Iterator[Batch]:
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
