"""Batches made ahead of their consumer by one background thread, copied to the device while the step runs."""

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.device import explain_oom, to_device
from pipelines.loaders.batch_plan import BatchPlan
from pipelines.loaders.streams import Mark, Streams, streams_of

T = TypeVar("T")
BUFFER = "the batches that the loader makes ahead"
REMEDY = "lower loader.prefetch or train.batch"
QUEUED = 4
"""Most batches that the GPU has not finished, the current one included, while another one is made."""
POLL_SECONDS = 0.001
"""Seconds between two queries of the GPU's progress."""
CORES_PER_THREAD = 8
"""For each of torch's threads that make batches: on a CPU a DeiT-Ti's step takes 25 times as long as augmentation."""


def torch_threads() -> int:
    """Return with how many of torch's threads batches are made.

    With as many as the step's there would be more than there are cores, and libgomp would have all of them sleep after
    each operation instead of spinning: a DeiT-Ti of 32 px then takes 1.7 times as long on two cores.
    """
    return max(1, torch.get_num_threads() // CORES_PER_THREAD)


class PrefetchingLoader(ABC):
    """What loaders have in common: one thread makes their batches ahead. See `pipelines.batch.Loader`."""

    plan: BatchPlan
    steps_per_epoch: int

    @overload
    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]: ...

    @overload
    def epoch(self, epoch: int, start_step: int = 0, *, then: Callable[[Batch], T]) -> Iterator[T]: ...

    def epoch(self, epoch: int, start_step: int = 0, *, then: Callable[[Batch], Any] | None = None) -> Iterator[Any]:
        """Yield the batches of `epoch` from `start_step` on; see `pipelines.batch.Loader`."""
        return prefetched(
            lambda stop: self._batches(epoch, start_step, stop), self._ahead(), self.plan.device, then or _as_it_is
        )

    def _ahead(self) -> int:
        """Return the most batches that are made and not consumed."""
        return self.plan.spec.prefetch

    @abstractmethod
    def _batches(self, epoch: int, start_step: int, stop: Event) -> Iterator[Batch]:
        """Make the batches, on whatever device; called and consumed in the thread. End early where `stop` is set."""


def _as_it_is(batch: Batch) -> Batch:
    return batch


def prefetched(
    make: Callable[[Event], Iterator[Batch]],
    ahead: int,
    device: torch.device,
    then: Callable[[Batch], T],
    streams: Streams | None = None,
) -> Iterator[T]:
    """Yield what `then` makes of each batch of `make(stop)`, in a background thread, at most `ahead` of the consumer.

    The iterator that `make` returns is created, advanced and closed in that thread alone, so it may hold worker
    threads of its own. On CUDA that, the copy to the device and `then` run under a side stream, beside the step.

    A host that never waits for its GPU would run further and further ahead of it, and the memory of the batches that
    the GPU has not finished would grow without bound. So the producer waits while `QUEUED` of them are unfinished.

    However the iteration ends (exhausted, exception, `close`, `break`, garbage collection, Ctrl-C), `stop` is set and
    the thread joined. It finishes at most the batch that it is making, and less where `make` checks `stop`.

    Args:
        make: starts making batches; its argument is set as soon as no more of them will be consumed.
        ahead: most batches made but not consumed.
        device: where the batches go.
        then: called with each batch, whose copy to the device has begun; returns a dataclass, whose tensors the
            consumer's stream may use.
        streams: the device's; None: as they are.

    Raises:
        Exception: whatever `make`, its iterator or `then` raised, after the batches before it.
        DeitfastError: there is no GPU memory for the batches.
    """
    transfer = Transfer(device, then, streams or streams_of(device))
    finished: SimpleQueue[InFlight | BaseException | None] = SimpleQueue()
    slots, stop = Semaphore(ahead), Event()
    arguments = (make, transfer, finished, slots, stop)
    thread = Thread(target=_produce, args=arguments, name="deitfast-prefetch", daemon=True)
    torch.get_num_threads()  # settles this thread's number, which else is what the last thread has set
    thread.start()
    try:
        while (item := finished.get()) is not None:
            torch.set_num_threads(torch.get_num_threads())  # as it is here, for threads to come
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
    torch.set_num_threads(torch_threads())
    try:
        with transfer.streams.making(), explain_oom(BUFFER, REMEDY):
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


class Transfer:
    """Takes batches to a device in one thread and hands them to the stream of another."""

    def __init__(self, device: torch.device, then: Callable[[Batch], Any], streams: Streams) -> None:
        self.device, self.then, self.streams = device, then, streams
        self._taken: deque[Mark] = deque()
        """For each batch received, a mark behind everything that was enqueued before it."""

    def send(self, batch: Batch) -> "InFlight":
        """Start a batch's copy to the device, and what comes after it (producer)."""
        tensors = {name: to_device(tensor, self.device) for name, tensor in _tensors(batch).items()}
        return InFlight(self.then(replace(batch, **tensors)), self.streams.mark_made())

    def receive(self, item: "InFlight") -> Any:
        """Return what was made of a batch, for use on the consumer's current stream (consumer)."""
        self._taken.append(self.streams.mark_taken())
        self.streams.hand_over(item.made, _tensors(item.content).values())
        return item.content

    def wait_for_gpu(self, stop: Event) -> None:
        """Wait until the GPU has fewer than `QUEUED` unfinished batches, or `stop` is set (producer).

        Polls, as `Event.synchronize` would not notice `stop`: a GPU may wait for other ranks for ever.
        """
        while len(self._taken) >= QUEUED:  # a mark tells of the batches before its own
            if self._taken[0].query():
                self._taken.popleft()
            elif stop.wait(POLL_SECONDS):
                return


@dataclass(frozen=True)
class InFlight:
    """What was made of a batch, on its way to the consumer."""

    content: Any
    made: Mark
    """Behind its copy to the device and what was done there."""


def _tensors(content: Any) -> dict[str, Tensor]:
    """Return the tensors among a dataclass's fields."""
    values = {field.name: getattr(content, field.name) for field in fields(content)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
