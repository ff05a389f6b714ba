"""Batches made ahead of their consumer by one background thread, copied to the device while the step runs."""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache
from queue import SimpleQueue
from threading import Event, Semaphore, Thread

import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.device import explain_oom, to_device

BUFFER = "the batches that the loader makes ahead"
REMEDY = "lower loader.prefetch or train.batch"
QUEUED = 4
"""Most batches that the GPU has not finished, the current one included, while another one is made."""
POLL_SECONDS = 0.001
"""Seconds between two queries of the GPU's progress."""


def prefetched(make: Callable[[Event], Iterator[Batch]], ahead: int, device: torch.device) -> Iterator[Batch]:
    """Yield the batches of `make(stop)` on `device`, produced in a background thread at most `ahead` of the consumer.

    The iterator that `make` returns is created, advanced and closed in that thread alone, so it may hold worker
    threads of its own. On CUDA it runs under a side stream, and the copy to the device overlaps with the step.

    A host that never waits for its GPU would run further and further ahead of it, and the memory of the batches that
    the GPU has not finished would grow without bound. So the producer waits while `QUEUED` of them are unfinished.

    However the iteration ends (exhausted, exception, `close`, `break`, garbage collection, Ctrl-C), `stop` is set and
    the thread joined. It finishes at most the batch that it is making, and less where `make` checks `stop`.

    Args:
        make: starts making batches; its argument is set as soon as no more of them will be consumed.
        ahead: most batches made but not consumed.
        device: where the batches go.

    Raises:
        Exception: whatever `make` or its iterator raised, after the batches before it.
        DeitfastError: there is no GPU memory for the batches.
    """
    transfer = Transfer(device)
    finished: SimpleQueue[InFlight | BaseException | None] = SimpleQueue()
    slots, stop = Semaphore(ahead), Event()
    arguments = (make, transfer, finished, slots, stop)
    thread = Thread(target=_produce, args=arguments, name="deitfast-prefetch", daemon=True)
    thread.start()
    try:
        while (item := finished.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch = transfer.receive(item)
            slots.release()
            del item
            yield batch
            del batch  # the consumer may have dropped it: do not hold a batch more than asked for
    finally:
        stop.set()
        slots.release()
        if not sys.is_finalizing():  # at exit the thread is frozen, and Python 3.13 would wait for it for ever
            thread.join()


def _produce(
    make: Callable[[Event], Iterator[Batch]],
    transfer: "Transfer",
    finished: "SimpleQueue[InFlight | BaseException | None]",
    slots: Semaphore,
    stop: Event,
) -> None:
    try:
        with transfer.context(), explain_oom(BUFFER, REMEDY):
            batches = make(stop)
            try:
                while True:
                    slots.acquire()
                    transfer.wait_for_gpu(stop)
                    if stop.is_set() or (batch := next(batches, None)) is None:
                        break
                    finished.put(transfer.send(batch))
                    del batch
            finally:
                close = getattr(batches, "close", None)
                if close is not None:
                    close()
        finished.put(None)
    except BaseException as error:  # handed to the consumer, which is waiting for it
        finished.put(error)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream that batches are made on: torch's allocator caches memory by stream."""
    return torch.cuda.Stream(device)


class Transfer:
    """Copies batches to a device: on CUDA on a side stream, so that copies overlap with the step; else plainly."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = side_stream(device) if device.type == "cuda" else None
        self._received: deque[torch.cuda.Event] = deque()
        """For each batch received, an event behind everything that was enqueued before it (CUDA)."""

    def context(self) -> AbstractContextManager:
        """Return the context in which the producer works: the side stream on CUDA."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def send(self, batch: Batch) -> "InFlight":
        """Start a batch's copy to the device (producer)."""
        batch = _map_tensors(batch, lambda tensor: to_device(tensor, self.device))
        if self.stream is None:
            return InFlight(batch, None)
        copied = torch.cuda.Event()
        copied.record(self.stream)
        return InFlight(batch, copied)

    def receive(self, item: "InFlight") -> Batch:
        """Return the batch, for use on the consumer's current stream (consumer)."""
        if item.copied is not None:
            consumer = torch.cuda.current_stream(self.device)
            before = torch.cuda.Event()
            before.record(consumer)
            self._received.append(before)
            consumer.wait_event(item.copied)
            _map_tensors(item.batch, lambda tensor: _record_stream(tensor, consumer))
        return item.batch

    def wait_for_gpu(self, stop: Event) -> None:
        """Wait until the GPU has fewer than `QUEUED` unfinished batches, or `stop` is set (producer).

        Polls, as `Event.synchronize` would not notice `stop`: a GPU may wait for other ranks for ever.
        """
        while len(self._received) >= QUEUED:  # an event tells of the batches before its own
            if self._received[0].query():
                self._received.popleft()
            elif stop.wait(POLL_SECONDS):
                return


@dataclass(frozen=True)
class InFlight:
    """A batch on its way to the consumer, and the event at the end of its copy to the device (CUDA)."""

    batch: Batch
    copied: torch.cuda.Event | None


def _record_stream(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    """Keep torch's allocator from reusing the memory before `stream` is done with it."""
    tensor.record_stream(stream)
    return tensor


def _map_tensors(batch: Batch, apply: Callable[[Tensor], Tensor]) -> Batch:
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: apply(value) for name, value in tensors.items() if isinstance(value, Tensor)})
