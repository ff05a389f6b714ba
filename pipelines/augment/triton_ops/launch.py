"""Augmentation on a GPU in Triton: the launches.

A batch goes through up to four launches for each slot of operations that any of its rows uses (tables, filters that
another operation follows, rotations, shears and translations), each over just the images that need it, and one at the
end: finish, normalize, erase, mix, cast and lay out. What lies between the passes is uint8, in planes. The host plans
the passes (`plan`) and does not wait.

The results are the reference's (`chain` with `kernels="off"`) bit for bit. Under TRITON_INTERPRET=1, set before this
module is imported, the kernels run in Triton's interpreter on the CPU.
"""
# pyright: reportArgumentType=false
# A constexpr parameter takes the plain value, which Triton's annotations do not say.

import torch
import triton
from torch import Tensor

from pipelines.augment.torch_ops.erase import normal_table
from pipelines.augment.triton_ops.affine import apply_move, apply_rotate
from pipelines.augment.triton_ops.color import apply_filter, make_table
from pipelines.augment.triton_ops.pixels import write_normalized, write_pixels
from pipelines.augment.triton_ops.plan import IMAGES_AT_ONCE, Sent

TABLES, FILTERS, ROTATIONS, MOVES, LAST = (8192, 16), (1024, 8), (512, 8), (512, 4), (512, 4)
"""Pixels that a program of each kernel works on at once, and its warps: 16 pixels a thread for a table, whose program
waits for all of a plane; 4 for the others, which load and store them as a word, but 2 where float64 coordinates in both
directions fill the registers."""
BLOCKS_AT_MOST = 8
"""Blocks that a program of filters or geometry works on, one after the other."""
EXACT = {"enable_fp_fusion": False}
"""How every kernel is compiled: a fused multiply-add rounds once where Pillow rounds twice."""


def write_batch(
    images: Tensor, sent: Sent | None, scales: Tensor, *, seed: int, patch: int, dtype: torch.dtype
) -> Tensor:
    """Return augmented pixels [B, 3, S, S], channels-last, or with `patch` patches [B, (S/p)^2, 3 p p].

    Args:
        images: uint8 [B, 3, S, S], contiguous, mirrored already; stay as they are.
        sent: what `plan.send` returned; None normalizes and does nothing else.
        scales: float32 [2, 3]: mean in pixel values, and what a pixel's distance from it is multiplied by.
        seed: of erasing's noise.
        patch: side of the patches, in the order of `cut_patches`; 0 for pixels.
        dtype: of the result.
    """
    rows, size = len(images), images.shape[2]
    shape = (rows, (size // patch) ** 2, 3 * patch * patch) if patch else (rows, size, size, 3)
    out = torch.empty(shape, dtype=dtype, device=images.device)
    last = at_once(size, LAST)
    programs = triton.cdiv(size * size, last["BLOCK"])
    layout = {"SIZE": size, "PATCH": patch, **last, **EXACT}
    with torch.cuda.device_of(images):
        if sent is None:
            write_normalized[rows * programs,](images, out, scales, **layout)
        else:
            work = images.new_empty((-(-sent.images // IMAGES_AT_ONCE) * IMAGES_AT_ONCE, *images.shape[1:]))
            tables = images.new_empty((rows, 3, 256))
            _operate(images, work, tables, sent)
            normal = normal_table(images.device)
            given = images, work, tables, sent.rows, out, scales, normal, seed
            write_pixels[sent.units * programs,](*given, **layout)
    return out if patch else out.permute(0, 3, 1, 2)


def _operate(images: Tensor, work: Tensor, tables: Tensor, sent: Sent) -> None:
    """Put the images through their operations, slot by slot, as far as the last pass does not do it."""
    size = images.shape[2]
    for slot in sent.slots:
        for kernel, records, most in zip(
            (make_table, apply_filter, apply_rotate, apply_move), slot, (TABLES, FILTERS, ROTATIONS, MOVES), strict=True
        ):
            if not len(records):
                continue
            shape = {"SIZE": size, **at_once(size, most), **EXACT}
            programs = 1
            if kernel is not make_table:
                shape["CHUNK"] = chunk(size, shape["BLOCK"])
                programs = triton.cdiv(size * size, shape["CHUNK"])
            kernel[len(records) * programs,](images, work, tables, records, **shape)


def at_once(size: int, most: tuple[int, int]) -> dict[str, int]:
    """Return the block and the warps that a kernel is compiled for."""
    return {"BLOCK": min(triton.next_power_of_2(size * size), most[0]), "num_warps": most[1]}


def chunk(size: int, block: int) -> int:
    """Return the pixels that a program works on in all: blocks, as many for every program."""
    blocks = triton.cdiv(size * size, block)
    return block * max(count for count in range(1, BLOCKS_AT_MOST + 1) if blocks % count == 0)
