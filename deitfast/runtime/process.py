"""One process's place in the run, and the process group around it."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from deitfast.config.recipe import TrainSpec
from deitfast.runtime.device import choose_amp, choose_compile, choose_device, emulated, step_stream
from deitfast.runtime.ranks import RankWatch, failures_named
from pipelines import workers

log = logging.getLogger("deitfast")
T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """One process's place in the run."""

    device: torch.device
    """What this rank computes on."""
    rank: int
    """0 .. world - 1; rank 0 writes the run's folder."""
    world: int
    """Number of processes."""
    amp: torch.dtype | None
    """Autocast dtype; None: float32 throughout."""
    compile: bool
    """Whether the model goes through torch.compile."""
    control: dist.ProcessGroup | None = None
    """gloo group of all ranks for decisions, which never waits for a GPU; None: the default group, or one process."""

    @property
    def is_main_process(self) -> bool:
        """Whether this rank writes files and draws progress."""
        return self.rank == 0

    @property
    def several_machines(self) -> bool:
        """Whether the ranks run under more than one torchrun, and so may not see the same files."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world)) < self.world

    def with_precision(self, train: TrainSpec) -> "Runtime":
        """Return the same place with the precision and compilation of another recipe."""
        return replace(self, amp=choose_amp(train.amp, self.device), compile=choose_compile(train.compile, self.device))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier(self.control)

    def broadcast_from_rank0(self, value: T) -> T:
        """Return rank 0's value on every rank; every rank must call it, and waits until rank 0 does."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.control, device=torch.device("cpu"))
        return box[0]

    def max_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Return the largest of all ranks' values, each by itself; NaN counts as infinite. Every rank must call it."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Return the sums of every rank's values. Every rank must call it."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        if how == dist.ReduceOp.MAX:
            tensor.nan_to_num_(nan=torch.inf)
        dist.all_reduce(tensor, op=how, group=self.control)
        return tensor.tolist()

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which models run forward."""
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    @property
    def input_dtype(self) -> torch.dtype:
        """Dtype of the model's input."""
        return self.amp or torch.float32

    @property
    def precision(self) -> str:
        """Name of that dtype: bfloat16, float16 or float32."""
        return str(self.input_dtype).removeprefix("torch.")


@contextmanager
def start(train: TrainSpec, device: str = "auto") -> Iterator[Runtime]:
    """Join the process group that torchrun describes, if any, and leave it at the end.

    An error on one rank ends all of them within a minute, and is told once: see `RankWatch`.

    Args:
        train: its `amp` and `compile` are decided here for the device.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: the device is not there.
        RankFailedError: another rank failed, or was lost.
    """
    rank, world = workers.rank(), workers.world_size()
    chosen = choose_device(device, workers.local_rank())
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    amp, compiled = choose_amp(train.amp, chosen), choose_compile(train.compile, chosen)
    if emulated(amp, chosen):
        log.warning("train.amp=%s: this CPU computes it slower than float32 (train.amp=off)", train.amp)
    if world == 1:
        with step_stream(chosen):
            yield Runtime(chosen, rank, world, amp, compiled)
        return
    store, rank, world = next(rendezvous("env://", rank, world))
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    # the watch, not this, ends a rank that waits in vain: evaluation and compiling may take long
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=30))
    watch = RankWatch(PrefixStore("deitfast", store), rank, world)
    with step_stream(chosen), watch, failures_named(watch):
        yield Runtime(chosen, rank, world, amp, compiled, cast(dist.ProcessGroup, dist.new_group(backend="gloo")))
        dist.destroy_process_group()
