"""Augmentation on a GPU in Triton: the launches, and what the host prepares for them.

A batch goes through three launches for each slot of operations that any of its rows uses (tables for the operations
that are one, colors, geometry) and one at the end: normalize, erase, mix, cast and lay out. Every program
reads what to do from the drawn rows on the device. So the host neither groups rows nor waits, an image is read and
written only by the operations it gets, and what lies between the passes is uint8.

The results are the reference's (`chain` with `kernels="off"`) bit for bit. Under TRITON_INTERPRET=1, set before this
module is imported, the kernels run in Triton's interpreter on the CPU.
"""
# pyright: reportArgumentType=false
# A constexpr parameter takes the plain value, which Triton's annotations do not say.

import numpy as np
import torch
import triton
from torch import Tensor

from pipelines.augment.torch_ops import ops
from pipelines.augment.torch_ops.erase import normal_table
from pipelines.augment.triton_ops.affine import apply_affine
from pipelines.augment.triton_ops.color import apply_color, make_table
from pipelines.augment.triton_ops.model_input import write_input
from pipelines.augment.triton_ops.rows import words
from pipelines.device import to_device
from pipelines.rng.policies import OPERATIONS
from pipelines.rng.view_params import ViewParams

TABLES, COLORS, MOVES, LAST = (4096, 16), (1024, 8), (256, 8), (512, 4)
"""Pixels that a program of each kernel works on at once, and its warps: a table is made by one program, which waits for
the whole image; float64 coordinates fill the registers at one pixel a thread; small programs of the last hide more of
each other's waiting."""
CHUNK = 4096
"""Pixels that a program of colors or geometry works on in all: most have nothing to do, so there are few of them."""
EXACT = {"enable_fp_fusion": False}
"""How every kernel is compiled: a fused multiply-add rounds once where Pillow rounds twice."""


def _canonical() -> np.ndarray:
    first = {}
    for index, name in enumerate(OPERATIONS[1:], start=1):
        first.setdefault(ops.TABLE[name].apply, index)
    return np.array([0, *(first[ops.TABLE[name].apply] for name in OPERATIONS[1:])], np.int32)


CANONICAL = _canonical()
"""For each index into OPERATIONS the first that does the same to pixels: flavors differ in their arguments alone."""


def model_input(
    images: Tensor, parameters: Tensor | None, mean: Tensor, scale: Tensor, *, seed: int, patch: int, dtype: torch.dtype
) -> Tensor:
    """Return what the model reads: pixels [B, 3, S, S], channels-last, or with `patch` patches [B, (S/p)^2, 3 p p].

    Args:
        images: uint8 [B, S, S, 3]; stay as they are.
        parameters: what `send` returned; None normalizes and does nothing else.
        mean: float32 [3], in pixel values.
        scale: float32 [3], what a pixel's distance from the mean is multiplied by.
        seed: of erasing's noise.
        patch: side of the patches, in the order of `cut_patches`; 0 for pixels.
        dtype: of the result.
    """
    images = images.contiguous()
    rows, size = images.shape[:2]
    slots = 0 if parameters is None else (parameters.shape[1] - words(0)) // (words(1) - words(0))
    shape = (rows, (size // patch) ** 2, 3 * patch * patch) if patch else (rows, size, size, 3)
    out = torch.empty(shape, dtype=dtype, device=images.device)
    work = images.new_empty((min(slots, 2), *images.shape))
    with torch.cuda.device_of(images):
        if parameters is not None and slots:
            _operate(images, work, parameters, slots)
        drawn, normal = (images, mean) if parameters is None else (parameters, normal_table(images.device))
        last = _at_once(size, LAST)
        layout = {"SIZE": size, "PATCH": patch, "SLOTS": slots, "TRAIN": parameters is not None}
        grid = (rows * triton.cdiv(size * size, last["BLOCK"]),)
        write_input[grid](images, work, drawn, out, mean, scale, normal, seed, rows, **layout, **last, **EXACT)
    return out if patch else out.permute(0, 3, 1, 2)


def _operate(images: Tensor, work: Tensor, parameters: Tensor, slots: int) -> None:
    """Put every image through its operations, slot by slot, from `images` and `work` into `work`."""
    rows, size = images.shape[:2]
    tables, arguments = images.new_empty((rows, 3, 256)), parameters.view(torch.float64)
    chunk = min(triton.next_power_of_2(size * size), CHUNK)
    grid = (rows * triton.cdiv(size * size, chunk),)
    shape = {"SIZE": size, "SLOTS": slots, **EXACT}
    for slot in range(slots):
        given = images, work, parameters, arguments
        make_table[3 * rows,](*given, tables, slot, rows, **shape, **_at_once(size, TABLES))
        apply_color[grid](*given, tables, slot, rows, **shape, CHUNK=chunk, **_at_once(size, COLORS))
        apply_affine[grid](*given, slot, rows, **shape, CHUNK=chunk, **_at_once(size, MOVES))


def _at_once(size: int, most: tuple[int, int]) -> dict[str, int]:
    """Return the block and the warps that a kernel is compiled for."""
    return {"BLOCK": min(triton.next_power_of_2(size * size), most[0]), "num_warps": most[1]}


def send(params: ViewParams, device: torch.device) -> Tensor:
    """Carry a batch's drawn parameters to the device in one copy: int32 [B, 32 + 6 K], see `kernels_rows`.

    K is the number of slots that any row uses.
    """
    operations, magnitudes = ops.used_slots(params)
    arguments = np.zeros((*operations.shape, 2))
    for index in np.unique(operations[operations > 0]):
        of_it = operations == index
        arguments[of_it] = ops.arguments(OPERATIONS[index], magnitudes[of_it])
    applied = np.cumsum(operations > 0, axis=1, dtype=np.int32)
    before = np.concatenate([np.zeros((len(params), 1), np.int32), applied], axis=1)
    seen = arguments.reshape(len(params), -1).view(np.int32)
    return to_device(
        torch.from_numpy(np.concatenate([params.table, CANONICAL[operations], before, seen], axis=1)), device
    )
