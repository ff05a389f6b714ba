"""Where a run runs: device, ranks, precision. Decided once, at the start, and never looked up again."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from deitfast.config.recipe import TrainSpec
from pipelines.errors import UserError

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

    @property
    def is_main_process(self) -> bool:
        """Whether this rank writes files and draws progress."""
        return self.rank == 0

    def with_precision(self, train: TrainSpec) -> "Runtime":
        """Return the same place with the precision and compilation of another recipe."""
        return replace(self, amp=choose_amp(train.amp, self.device), compile=choose_compile(train.compile, self.device))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def broadcast_from_rank0(self, value: T) -> T:
        """Return rank 0's value on every rank; every rank must ask, and waits until rank 0 does."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

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

    Args:
        train: its `amp` and `compile` are decided here for the device.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: the device is not there.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    try:
        yield Runtime(chosen, rank, world, choose_amp(train.amp, chosen), choose_compile(train.compile, chosen))
    finally:
        if world > 1:
            dist.destroy_process_group()


def choose_device(device: str, local_rank: int) -> torch.device:
    """Return the device of that name; auto: this rank's GPU where there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device} is no device", expected="auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch sees no CUDA device", remedy="run `deitfast doctor`, or use cpu")
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", local_rank)
    if chosen.type == "cuda" and chosen.index >= torch.cuda.device_count():
        raise UserError(f"there is no {chosen}", found=f"{torch.cuda.device_count()} CUDA devices")
    return chosen


def choose_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype for `train.amp` on a device."""
    if amp == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if amp == "auto" and device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.11
        fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        return torch.bfloat16 if fast else None  # elsewhere bf16 is emulated, slower than float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def choose_compile(compile_: str, device: torch.device) -> bool:
    """Return whether `train.compile` means torch.compile on a device."""
    return compile_ in ("on", "graphs") or (compile_ == "auto" and device.type == "cuda")
