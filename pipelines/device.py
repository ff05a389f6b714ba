"""A GPU's memory: copies to it, and errors when it is full."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipelines.errors import DeitfastError

OOM_MESSAGES = (
    "out of memory",
    "cudaErrorMemoryAllocation",
    "std::bad_alloc",
    "CUDA allocation failed",  # DALI's CUDABadAlloc, in both its forms
    "bytes on device",
)
"""What libraries other than torch say when a GPU has no memory left."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Start copying a tensor to `device` and return the copy; on CUDA from page-locked memory, without waiting."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@contextmanager
def explain_oom(buffer: str, remedy: str) -> Iterator[None]:
    """Turn running out of GPU memory inside the block into a DeitfastError that names the buffer.

    Args:
        buffer: what the block allocates on the GPU; ends the sentence "out of GPU memory for ...".
        remedy: what to lower.

    Raises:
        DeitfastError: the device has no memory left. Everything else passes.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # C++'s bad_alloc, of which DALI's is one, may come as MemoryError
        if not out_of_memory(error):
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        found = next(
            (line for line in lines if any(words in line for words in OOM_MESSAGES)), lines[0] if lines else ""
        )
        raise DeitfastError(f"out of GPU memory for {buffer}", found=found, remedy=remedy) from error


def out_of_memory(error: Exception) -> bool:
    """Return whether an exception of torch, DALI or CUDA says that the device has no memory left."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(words in str(error) for words in OOM_MESSAGES)
