"""Batches made ahead of their consumer by one background thread, and carried to the device beside its work."""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache
from queue import SimpleQueue
from threading import Event, Semaphore, Thread, local

import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.device import explain_oom, to_device

BUFFER = "the batches that the loader makes ahead"
REMEDY = "lower loader.prefetch or train.batch"
QUEUED = 4
"""Batches that a GPU may have before it at most, the one it works on included, when another one is begun."""
GLANCE = 0.001
"""Seconds between two looks at how far the GPU is."""

_PRODUCER = local()


def broken_off() -> Event:
    """Return, to code in the producing thread, what is set as soon as nobody waits for its batches any more."""
    return getattr(_PRODUCER, "stop", None) or Event()


def prefetched(make: Callable[[], Iterator[Batch]], ahead: int, device: torch.device) -> Iterator[Batch]:
    """Yield the batches of `make()` on `device`, produced in a background thread at most `ahead` of the consumer.

    The iterator that `make` returns is created, advanced and closed in that thread alone, so it may hold worker
    threads of its own. On CUDA it runs under a side stream, and the copy to the device overlaps with the step.

    A host that never waits for its GPU would run further and further ahead of it, and so would the memory that the
    GPU is not done with. It is the producer that waits: with at most `QUEUED` received batches before the GPU.

    However the iteration ends (exhausted, exception, `close`, `break`, garbage collection, Ctrl-C), the thread is
    told to stop and joined; it finishes at most the batch that it is working on, and less where that looks at
    `broken_off`.

    Raises:
        Exception: whatever `make` or its iterator raised, in the order of the batches.
        DeitfastError: there is no GPU memory for the batches.
    """
    lane = _Lane(device)
    arrived: SimpleQueue[_Parcel | BaseException | None] = SimpleQueue()
    slots, stop = Semaphore(ahead), Event()
    thread = Thread(target=_produce, args=(make, lane, arrived, slots, stop), name="deitfast-prefetch", daemon=True)
    thread.start()
    try:
        while (parcel := arrived.get()) is not None:
            if isinstance(parcel, BaseException):
                raise parcel
            batch = lane.receive(parcel)
            slots.release()
            del parcel
            yield batch
            del batch  # the consumer may have dropped it: do not hold a batch more than asked for
    finally:
        stop.set()
        slots.release()
        if not sys.is_finalizing():  # else the thread stands still already, and Python 3.13 would wait for it for ever
            thread.join()


def _produce(
    make: Callable[[], Iterator[Batch]],
    lane: "_Lane",
    arrived: "SimpleQueue[_Parcel | BaseException | None]",
    slots: Semaphore,
    stop: Event,
) -> None:
    _PRODUCER.stop = stop
    try:
        with lane.context(), explain_oom(BUFFER, REMEDY):
            batches = make()
            try:
                while True:
                    slots.acquire()
                    lane.catch_up(stop)
                    if stop.is_set() or (batch := next(batches, None)) is None:
                        break
                    arrived.put(lane.send(batch))
                    del batch
            finally:
                close = getattr(batches, "close", None)
                if close is not None:
                    close()
        arrived.put(None)
    except BaseException as error:  # handed to the consumer, which is waiting for it
        arrived.put(error)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream that batches are made on: torch keeps memory by stream, and another's would lie idle."""
    return torch.cuda.Stream(device)


class _Lane:
    """The way to a device. On CUDA: a side stream, so that copies overlap with the step; else a plain copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = side_stream(device) if device.type == "cuda" else None
        self._received: deque[torch.cuda.Event] = deque()
        """For each batch that was received, that the GPU is done with all that was asked of it until then (CUDA)."""

    def context(self) -> AbstractContextManager:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def send(self, batch: Batch) -> "_Parcel":
        batch = _each(batch, lambda tensor: to_device(tensor, self.device))
        if self.stream is None:
            return _Parcel(batch, None)
        done = torch.cuda.Event()
        done.record(self.stream)
        return _Parcel(batch, done)

    def receive(self, parcel: "_Parcel") -> Batch:
        if parcel.done is not None:
            consumer = torch.cuda.current_stream(self.device)
            before = torch.cuda.Event()
            before.record(consumer)
            self._received.append(before)
            consumer.wait_event(parcel.done)
            _each(parcel.batch, lambda tensor: _used_by(tensor, consumer))
        return parcel.batch

    def catch_up(self, stop: Event) -> None:
        """Have the producer wait until the GPU has at most `QUEUED` received batches before it, or `stop` is set.

        Looks instead of `Event.synchronize`: a GPU may wait for other ranks for ever, and `stop` would not be heard.
        """
        while len(self._received) >= QUEUED:  # each speaks of the batches before its own
            if self._received[0].query():
                self._received.popleft()
            elif stop.wait(GLANCE):
                return


@dataclass(frozen=True)
class _Parcel:
    """A batch on its way, and the event that its copy to the device is done with (CUDA)."""

    batch: Batch
    done: torch.cuda.Event | None


def _used_by(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    """Keep the side stream's allocator from handing the memory out again before `stream` is done with it."""
    tensor.record_stream(stream)
    return tensor


def _each(batch: Batch, apply: Callable[[Tensor], Tensor]) -> Batch:
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: apply(value) for name, value in tensors.items() if isinstance(value, Tensor)})
