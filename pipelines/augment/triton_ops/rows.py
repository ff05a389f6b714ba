"""What a kernel's program knows of its image: the drawn row, and where the image's pixels are at the moment.

A batch's row travels as 32 + 6 K words of four bytes, for K slots of operations:

| words | what |
| --- | --- |
| 31 | `ViewParams.table`'s columns |
| K | operation of each slot, by `kernels.CANONICAL`; 0: none |
| K + 1 | how many operations were applied before each slot, and in all |
| 4 K | two float64 arguments for each slot, as `ops.arguments` computes them |

Nothing is copied only to stand in the right place: an image that no operation has touched is read from the loader's
batch, mirrored on the way where it is flipped; after an odd number of operations it lies in the first half of the
workspace, after an even number in the second.
"""

import triton
import triton.language as tl

from pipelines.rng.policies import OPERATIONS
from pipelines.rng.view_params import COLUMNS, SLICES

AUTOCONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR = (
    tl.constexpr(OPERATIONS.index(name))
    for name in ("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color")
)
CONTRAST, BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = (
    tl.constexpr(OPERATIONS.index(name))
    for name in ("Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY")
)

SAMPLE, VIEW, FLIP, ERASE, MIX_INDEX, LAM, BOX = (
    tl.constexpr(SLICES[name].start) for name in ("sample", "view", "flip", "erase", "mix_index", "lam", "cutmix_bbox")
)
"""Columns of the drawn row."""
OPERATION = tl.constexpr(sum(COLUMNS.values()))
"""Column of the first slot's operation."""


def words(slots: int) -> int:
    """Return how many words of four bytes a row has."""
    return 32 + 6 * slots


@triton.jit
def drawn_at(drawn, row, column, SLOTS: tl.constexpr):
    """Return a drawn row's word, int32."""
    return tl.load(drawn + row * (32 + 6 * SLOTS) + column)


@triton.jit
def argument_of(arguments, row, slot, which: tl.constexpr, SLOTS: tl.constexpr):
    """Return an operation's first or second argument, float64; `arguments` is the drawn rows seen as float64."""
    return tl.load(arguments + row * (16 + 3 * SLOTS) + 16 + SLOTS + 2 * slot + which)


@triton.jit
def stored(images, work, drawn, row, applied, rows, SIZE: tl.constexpr, SLOTS: tl.constexpr):
    """Return where an image is after `applied` operations: its first byte, its column 0, and the step to column 1."""
    if applied == 0:
        pixels = images + row.to(tl.int64) * (SIZE * SIZE * 3)
    else:
        pixels = work + (((applied + 1) % 2).to(tl.int64) * rows + row) * (SIZE * SIZE * 3)
    mirrored = (applied == 0) & (drawn_at(drawn, row, FLIP, SLOTS) == 1)
    return pixels, tl.where(mirrored, SIZE - 1, 0), tl.where(mirrored, -1, 1)


@triton.jit
def target_of(work, row, applied, rows, SIZE: tl.constexpr):
    """Return where the operation that follows `applied` others writes an image: its first byte."""
    return work + ((applied % 2).to(tl.int64) * rows + row) * (SIZE * SIZE * 3)
