"""Saves a run while it trains on: a snapshot now, the file in a thread, and nothing that is not finite, ever."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deitfast.weights import checkpoint


class Checkpointer:
    """A run's checkpoint: written beside the training, and the one before kept until the new one is proved.

    A checkpoint is proved when a later step's loss was finite: weights can be finite and still past saving.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        """Keep the checkpoint at `path`; only one rank `writes`, and all call everything alike."""
        self.path, self.previous = path, path.with_name("checkpoint_previous.pt")
        self.saved = time.monotonic()
        """When the last snapshot was taken."""
        self.at: tuple[int, int] | None = None
        """Epoch and steps of the last snapshot of this process."""
        self._proved = True
        self._buffers: dict[tuple[str, ...], Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "deitfast-checkpoint") if writes else None
        self._writing: dict[str, Future[None]] = {}

    def save(self, state: dict[str, Any]) -> None:
        """Take a snapshot and begin to write it; waits where the one before is not written yet.

        Raises:
            DeitfastError: the checkpoint before could not be written.
        """
        self._wait_for("checkpoint")
        if self._thread:
            snapshot, copied = self._snapshot({"checkpoint": state})
            write = partial(self._write, snapshot["checkpoint"], keep=not self._proved)
            self._writing["checkpoint"] = self._thread.submit(_behind, copied, write)
        self.saved, self.at, self._proved = time.monotonic(), (state["epoch"], state["steps"]), False

    def save_best(self, path: Path, epoch: int, top1: float, model: nn.Module, *, averaged: bool) -> None:
        """Take a snapshot of the best weights so far and begin to write it to `path`; waits for the best before.

        Arguments are those of `checkpoint.save_best`.

        Raises:
            DeitfastError: the best before could not be written.
        """
        self._wait_for("best")
        if self._thread:
            snapshot, copied = self._snapshot({"best": model.state_dict()})
            write = partial(checkpoint.save_best, path, epoch, top1, snapshot["best"], averaged=averaged)
            self._writing["best"] = self._thread.submit(_behind, copied, write)

    def prove(self, epoch: int, steps: int) -> None:
        """Note that the loss is finite after so many `steps` of `epoch`: what was saved before is good."""
        if self.at is not None and (epoch, steps) > self.at:
            self._proved = True

    def best(self) -> Path | None:
        """Return the checkpoint to go back to: the last that is proved, else the last; None: there is none.

        Every rank must call it once all of them are sure that nothing is being written.
        """
        if not self._proved and self.previous.exists():
            return self.previous
        return self.path if self.path.exists() else None

    def wait(self) -> None:
        """Wait until what was begun is written.

        Raises:
            DeitfastError: it could not be.
        """
        for kind in list(self._writing):
            self._wait_for(kind)

    def close(self) -> None:
        """Write what was begun, and end the thread. Raises as `wait`."""
        try:
            self.wait()
        finally:
            if self._thread:
                self._thread.shutdown()

    def _wait_for(self, kind: str) -> None:
        if writing := self._writing.pop(kind, None):
            writing.result()

    def _write(self, state: dict[str, Any], *, keep: bool) -> None:
        """Write a checkpoint; of those before, leave the last one that is proved."""
        if self.path.exists() and not (keep and self.previous.exists()):
            self.previous.unlink(missing_ok=True)
            self.previous.hardlink_to(self.path)
        checkpoint.save(self.path, state)

    def _snapshot(self, state: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
        """Return `state` with its tensors copied to the host, into memory that is used again, and the copies' event."""
        event = None

        def copied(value: Any, name: tuple[str, ...]) -> Any:
            nonlocal event
            if isinstance(value, dict):
                return {key: copied(inner, (*name, str(key))) for key, inner in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(copied(inner, (*name, str(number))) for number, inner in enumerate(value))
            if not isinstance(value, Tensor):
                return value
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(value, non_blocking=True)
            event = event or (torch.cuda.Event() if value.is_cuda else None)
            return buffer

        snapshot = copied(state, ())
        if event:
            event.record()
        return snapshot, event


def _behind(copied: torch.cuda.Event | None, write: Callable[[], None]) -> None:
    """Write a snapshot once it is in the host's memory."""
    if copied:
        copied.synchronize()
    write()


@torch.no_grad()
def all_finite(state: dict[str, Any]) -> bool:
    """Return whether every floating-point tensor of a tree is finite: one pass over them."""
    tensors: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                collect(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                collect(inner)
        elif isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            tensors.append(value)

    collect(state)
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)

    def finite(group: list[Tensor], order: float) -> bool:
        norms = torch.stack(torch._foreach_norm(group, order))  # pyright: ignore
        return bool(torch.isfinite(norms.float()).all())

    # squares overflow where their roots do not, but are 13 times as fast on a CPU
    return all(finite(group, 2) or finite(group, torch.inf) for group in groups.values())
