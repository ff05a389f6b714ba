"""The last pass: normalize, erase, mix, cast, and write what the model reads, as pixels or in patches.

Equal to the reference bit for bit: two roundings where it has two, the noise of `draws.erase_noise`.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Triton's language looks like Python, and its functions' annotations are not meant for their own callers.

import triton
import triton.language as tl

from pipelines.augment.triton_ops.rows import (
    BOX,
    ERASE,
    LAM,
    MIX_INDEX,
    OPERATION,
    SAMPLE,
    VIEW,
    drawn_at,
    stored,
)
from pipelines.rng import philox
from pipelines.rng.distributions import CELLS, REST_BITS
from pipelines.rng.packed_spec import UNIT

NOISE = tl.constexpr(philox.NOISE)
LAST_CELL = tl.constexpr(CELLS - 1)
REST = tl.constexpr(REST_BITS)
REST_MASK = tl.constexpr((1 << REST_BITS) - 1)
ONE = tl.constexpr(UNIT)
UNITS = tl.constexpr(1 / UNIT)
"""A power of two: multiplying by it is exact, where Triton's float32 division need not be."""


@triton.jit(do_not_specialize=["rows", "seed"])
def write_input(
    images,
    work,
    drawn,
    out,
    mean,
    scale,
    normal,
    seed,
    rows,
    SIZE: tl.constexpr,
    PATCH: tl.constexpr,
    SLOTS: tl.constexpr,
    TRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write BLOCK pixels of one row of the model's input.

    Grid: B x ceil(S^2 / BLOCK) programs. Args: `out` [B, S, S, 3] where PATCH is 0, else [B, (S/p)^2, 3 p p] in the
    order of `cut_patches`; `mean`, `scale` float32 [3] in pixel values; `normal` int32 [4097], `fixed.normal_table()`;
    `seed` of the noise; the others as `kernels_color.make_table`'s. Without TRAIN `drawn` is not read.
    """
    BLOCKS: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // BLOCKS
    at = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE * SIZE
    if PATCH:
        within = at % (PATCH * PATCH)
        patch = at // (PATCH * PATCH)
        y = patch // (SIZE // PATCH) * PATCH + within // PATCH
        x = patch % (SIZE // PATCH) * PATCH + within % PATCH
        target = out + row.to(tl.int64) * (SIZE * SIZE * 3) + patch * (3 * PATCH * PATCH) + within
        step: tl.constexpr = PATCH * PATCH
    else:
        y = at // SIZE
        x = at % SIZE
        target = out + row.to(tl.int64) * (SIZE * SIZE * 3) + at * 3
        step: tl.constexpr = 1
    if TRAIN:
        red, green, blue = _mixed(images, work, drawn, mean, scale, normal, seed, row, rows, y, x, inside, SIZE, SLOTS)
    else:
        pixels = images + row.to(tl.int64) * (SIZE * SIZE * 3) + (y * SIZE + x) * 3
        red, green, blue = _normalized(pixels, mean, scale, inside)
    tl.store(target, red.to(out.dtype.element_ty), mask=inside)
    tl.store(target + step, green.to(out.dtype.element_ty), mask=inside)
    tl.store(target + 2 * step, blue.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _mixed(
    images, work, drawn, mean, scale, normal, seed, row, rows, y, x, inside, SIZE: tl.constexpr, SLOTS: tl.constexpr
):
    """Return red, green and blue, float32 [BLOCK], of a row mixed with its partner as `chain.mix` does."""
    lam = drawn_at(drawn, row, LAM, SLOTS)
    top = drawn_at(drawn, row, BOX, SLOTS)
    left = drawn_at(drawn, row, BOX + 1, SLOTS)
    height = drawn_at(drawn, row, BOX + 2, SLOTS)
    width = drawn_at(drawn, row, BOX + 3, SLOTS)
    boxed = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    theirs = tl.where(height > 0, boxed.to(tl.float32), 1.0 - lam.to(tl.float32) * UNITS)
    ours = 1.0 - theirs
    # what has no weight is not read: CutMix reads every pixel of one image or the other
    red, green, blue = _erased(
        images, work, drawn, mean, scale, normal, seed, row, rows, y, x, inside & (ours > 0), SIZE, SLOTS
    )
    if (lam < ONE) | (height > 0):
        partner = drawn_at(drawn, row, MIX_INDEX, SLOTS)
        red2, green2, blue2 = _erased(
            images, work, drawn, mean, scale, normal, seed, partner, rows, y, x, inside & (theirs > 0), SIZE, SLOTS
        )
        red = red * ours + red2 * theirs
        green = green * ours + green2 * theirs
        blue = blue * ours + blue2 * theirs
    return red, green, blue


@triton.jit
def _erased(
    images, work, drawn, mean, scale, normal, seed, row, rows, y, x, wanted, SIZE: tl.constexpr, SLOTS: tl.constexpr
):
    """Return red, green and blue, float32 [BLOCK], of a row after all its operations, normalized and erased."""
    applied = drawn_at(drawn, row, OPERATION + 2 * SLOTS, SLOTS)
    source, first, step = stored(images, work, drawn, row, applied, rows, SIZE, SLOTS)
    red, green, blue = _normalized(source + (y * SIZE + first + step * x) * 3, mean, scale, wanted)
    height = drawn_at(drawn, row, ERASE + 2, SLOTS)
    if height > 0:
        top = drawn_at(drawn, row, ERASE, SLOTS)
        left = drawn_at(drawn, row, ERASE + 1, SLOTS)
        width = drawn_at(drawn, row, ERASE + 3, SLOTS)
        boxed = wanted & (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
        if tl.max(boxed.to(tl.int32), 0) > 0:
            pixel = y * SIZE + x
            sample = pixel * 0 + drawn_at(drawn, row, SAMPLE, SLOTS)
            view = pixel * 0 + drawn_at(drawn, row, VIEW, SLOTS)
            word1, word2, word3, _ = tl.philox(seed, sample, view, pixel * 0 + NOISE, pixel)
            red = tl.where(boxed, _normal(word1, normal), red)
            green = tl.where(boxed, _normal(word2, normal), green)
            blue = tl.where(boxed, _normal(word3, normal), blue)
    return red, green, blue


@triton.jit
def _normalized(pixels, mean, scale, wanted):
    """Return (pixel - mean) scale of three channels, float32 [BLOCK], as `chain.normalize` does."""
    red = tl.load(pixels, mask=wanted, other=0).to(tl.float32) - tl.load(mean)
    green = tl.load(pixels + 1, mask=wanted, other=0).to(tl.float32) - tl.load(mean + 1)
    blue = tl.load(pixels + 2, mask=wanted, other=0).to(tl.float32) - tl.load(mean + 2)
    return red * tl.load(scale), green * tl.load(scale + 1), blue * tl.load(scale + 2)


@triton.jit
def _normal(word, table):
    """Return a standard normal number, float32, from 32-bit words, as `fixed.normal` does in Q16."""
    cell = (word >> REST) & LAST_CELL
    low = tl.load(table + cell)
    rise = (tl.load(table + cell + 1) - low).to(tl.int64)
    distance = low + ((rise * (word & REST_MASK)) >> REST).to(tl.int32)
    return tl.where(word >> 31 != 0, -distance, distance).to(tl.float32) * UNITS
