"""The two streams of a GPU that batches go through, the loader's and the step's; on a CPU, where all is in order, none.

A batch is made, copied and augmented on the loader's side stream. The step's stream waits for a mark behind that, and
the batch's memory, which the side stream allocated, is not handed out again before the step's stream is done with it.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place in a stream's queue."""

    def query(self) -> bool:
        """Return whether the device has done everything before it."""
        ...


class Streams(Protocol):
    """What the thread that makes batches and the one that takes them need of a device's streams."""

    def making(self) -> AbstractContextManager[object]:
        """Return the context in which batches are made: what is enqueued in it goes to the side stream."""
        ...

    def mark_made(self) -> Mark:
        """Return a mark behind everything that was enqueued on the side stream."""
        ...

    def mark_taken(self) -> Mark:
        """Return a mark behind everything that was enqueued on the taking thread's current stream."""
        ...

    def hand_over(self, made: Mark, tensors: Iterable[Tensor]) -> None:
        """Have the taking thread's current stream wait for `made`, and keep the tensors' memory until it is done."""
        ...


class CudaStreams:
    """A GPU's."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, side_stream(device)

    def making(self) -> AbstractContextManager[object]:
        """See `Streams`."""
        return torch.cuda.stream(self._side)

    def mark_made(self) -> torch.cuda.Event:
        """See `Streams`."""
        return _recorded(self._side)

    def mark_taken(self) -> torch.cuda.Event:
        """See `Streams`."""
        return _recorded(torch.cuda.current_stream(self._device))

    def hand_over(self, made: Mark, tensors: Iterable[Tensor]) -> None:
        """See `Streams`."""
        taking = torch.cuda.current_stream(self._device)
        taking.wait_event(made)  # pyright: ignore[reportArgumentType]
        for tensor in tensors:
            tensor.record_stream(taking)


class NoStreams:
    """A CPU's: what is called is done."""

    def making(self) -> AbstractContextManager[object]:
        """See `Streams`."""
        return nullcontext()

    def mark_made(self) -> "Done":
        """See `Streams`."""
        return Done()

    def mark_taken(self) -> "Done":
        """See `Streams`."""
        return Done()

    def hand_over(self, made: Mark, tensors: Iterable[Tensor]) -> None:
        """See `Streams`."""


class Done:
    """A mark on a CPU."""

    def query(self) -> bool:
        """See `Mark`."""
        return True


def streams_of(device: torch.device) -> Streams:
    """Return a device's streams."""
    return CudaStreams(device) if device.type == "cuda" else NoStreams()


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream that batches are made on: torch's allocator caches memory by stream.

    Its priority is the usual one; a run's step goes before it (`deitfast.runtime.device.step_stream`).
    """
    return torch.cuda.Stream(device)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event
