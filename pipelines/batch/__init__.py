"""Batch, and the contract of every loader."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar, overload

import torch
from torch import Tensor

from pipelines.rng.view_params import ViewParams

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One rank's batch: crops as they were decoded, and the parameters of the augmentation still to be applied."""

    images: Tensor
    """uint8 [B, S, S, 3], RGB, cropped and resized; on the loader's device. In memory interleaved, or planes."""
    labels: Tensor
    """int64 [B], on the loader's device."""
    valid: Tensor
    """bool [B], on the loader's device; False where evaluation padded the last batch, for an image that was skipped
    because it cannot be read, and for the row that would be mixed with it."""
    params: ViewParams
    """What was drawn for each row, on the host."""
    skipped: int = 0
    """Rows whose image cannot be read (with `loader.skip_bad`)."""
    flipped: bool = False
    """Whether rows are mirrored already where `params.flip` says so; else augmentation does it."""

    def crops(self) -> Tensor:
        """Return the images as they were cropped, not mirrored."""
        if not self.flipped:
            return self.images
        flip = torch.from_numpy(self.params.flip == 1).to(self.images.device)
        return torch.where(flip.view(-1, 1, 1, 1), self.images.flip(2), self.images)


class Loader(Protocol):
    """Batches as a pure function of (seed, epoch, rank, world, step).

    Every loader gives each index once an epoch (or repeated as asked), disjoint shards to ranks, the same batch at
    the same (epoch, step) however it was started, and leaves no thread or file behind when an iteration is broken off.
    """

    name: str
    """The name under which `pipelines.loaders.factory` opened it."""
    steps_per_epoch: int
    """Batches in one epoch."""

    @overload
    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]: ...

    @overload
    def epoch(self, epoch: int, start_step: int = 0, *, then: Callable[[Batch], T]) -> Iterator[T]: ...

    def epoch(
        self, epoch: int, start_step: int = 0, *, then: Callable[[Batch], T] | None = None
    ) -> Iterator[Batch | T]:
        """Yield the batches of `epoch` from `start_step` on. A yielded batch stays valid while its caller holds it.

        `then` is called with each batch where batches are made: in another thread, and on CUDA on another stream than
        the caller's. What it returns, a dataclass with tensors among its fields, is yielded instead.

        Raises:
            DeitfastError: a sample's bytes are damaged; the message names it. With `skip_bad` its rows are black
                and not valid instead.
        """
        ...

    def close(self) -> None:
        """Release threads and memory. May be called twice."""
        ...
