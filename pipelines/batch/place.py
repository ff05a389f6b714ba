"""Placing crops in a batch: gathered, mirrored and separated into color planes, in one pass.

Decoders cut crops in an order of their own, as interleaved pixels. What follows reads planes: there, neighboring
pixels of one color are neighboring bytes, so that a GPU loads and stores many at once.
"""

import logging
import os
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from subprocess import CalledProcessError

import torch
from torch import Tensor

log = logging.getLogger(__name__)

INSTALL = {
    "no triton": "install Triton: it comes with PyTorch's CUDA builds for Linux",
    "no compiler": "install a C compiler (Debian, Ubuntu: apt install gcc), which Triton needs at its first launch",
    "no headers": "install Python's headers (Debian, Ubuntu: apt install python3-dev), which Triton compiles against",
}
"""What to do about each known reason why Triton kernels do not start."""


def place_crops(crops: Tensor, moves: Tensor, out: Tensor, *, kernel: bool) -> None:
    """Copy crops into the rows of a batch, as planes, mirrored where asked. Nothing waits for the device.

    Args:
        crops: uint8 [N, S, S, 3], contiguous.
        moves: int32 [M, 4], on the same device: index of the crop, row of the batch, 1 to mirror left to right, 0.
        out: uint8 [B, 3, S, S], contiguous; rows that no move names stay as they are.
        kernel: by a Triton kernel (see `kernels_missing`) instead of torch; the bytes are the same.
    """
    if not len(moves):
        return
    if not kernel:
        crop, row, mirror, _ = moves.long().unbind(1)
        chosen = crops.index_select(0, crop)
        chosen = torch.where(mirror.view(-1, 1, 1, 1) == 1, chosen.flip(2), chosen)
        out.index_copy_(0, row, chosen.permute(0, 3, 1, 2))
        return
    from pipelines.batch import place_kernel  # Triton is only there where PyTorch has it

    size = crops.shape[1]
    words = size % 4 == 0
    block = min(place_kernel.BLOCK, max(4, 1 << (size * size - 1).bit_length()))
    if words:
        crops, out = crops.flatten().view(torch.int32), out.flatten().view(torch.int32)
    with torch.cuda.device_of(crops):
        grid = (len(moves) * -(-size * size // block),)
        shape = {"SIZE": size, "WORDS": words, "BLOCK": block, "num_warps": place_kernel.WARPS}
        place_kernel.place_kernel[grid](crops, moves, out, **shape)


def kernels_missing(device: torch.device) -> str:
    """Return why Triton kernels cannot run on a device, and what to install; empty if they can.

    On CUDA one is compiled and run, once in a process: Triton is often there without the C compiler and the Python
    headers that its first launch needs.
    """
    if find_spec("triton") is None:
        return f"no Triton; {INSTALL['no triton']}"
    if os.environ.get("TRITON_INTERPRET") == "1":  # Triton's own variable: its interpreter runs kernels on any device
        return ""
    return _launch_error(device) if device.type == "cuda" else f"kernels need a CUDA device, this is {device}"


@cache
def _launch_error(device: torch.device) -> str:
    """Place one crop by the kernel; return what went wrong in one line, or nothing."""
    try:
        crop = torch.zeros((1, 4, 4, 3), dtype=torch.uint8, device=device)
        moves = torch.zeros((1, 4), dtype=torch.int32, device=device)
        place_crops(crop, moves, crop.new_empty((1, 3, 4, 4)), kernel=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # what a compiler that is missing or fails raises differs between Triton's versions
        reason = explain_launch_error(error)
        log.warning("Triton kernels cannot run, batched torch takes their place with the same results: %s", reason)
        return reason
    return ""


def explain_launch_error(error: Exception) -> str:
    """Return in one line what a Triton kernel lacked at its first launch, and what to install."""
    if "Failed to find C compiler" in str(error):
        return f"Triton found no C compiler; {INSTALL['no compiler']}"
    if isinstance(error, CalledProcessError) and not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"Triton found no Python.h; {INSTALL['no headers']}"
    return f"a Triton kernel failed to start: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
