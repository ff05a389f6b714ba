"""The last pass: finish the operations, normalize, erase, mix, cast, and write pixels or patches.

Equal to the reference bit for bit: two roundings where it has two, the noise of `draws.erase_noise`.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Triton's language looks like Python, and its functions' annotations are not meant for their own callers.

import triton
import triton.language as tl

from pipelines.augment.triton_ops.color import filtered
from pipelines.augment.triton_ops.records import DRAWN, ROW, WORDS, read_rgb, source_of
from pipelines.rng import philox
from pipelines.rng.distributions import CELLS, REST_BITS
from pipelines.rng.packed_spec import UNIT
from pipelines.rng.view_params import SLICES

SAMPLE, VIEW, ERASE, LAM, BOX = (
    tl.constexpr(SLICES[name].start) for name in ("sample", "view", "erase", "lam", "cutmix_bbox")
)
"""Words of a row's drawn parameters."""
NOISE = tl.constexpr(philox.NOISE)
LAST_CELL = tl.constexpr(CELLS - 1)
REST = tl.constexpr(REST_BITS)
REST_MASK = tl.constexpr((1 << REST_BITS) - 1)
UNITS = tl.constexpr(1 / UNIT)
"""A power of two: multiplying by it is exact, where Triton's float32 division need not be."""


@triton.jit(do_not_specialize=["seed"])
def write_pixels(
    images, work, tables, rows, out, scales, normal, seed, SIZE: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr
):
    """Write BLOCK pixels of one row of a training batch, or of two that are each other's partners.

    Grid: U x ceil(S^2 / BLOCK) programs, for U units.

    Args:
        images: uint8 [B, 3, S, S], mirrored already.
        work: uint8 [W, 3, S, S].
        tables: uint8 [B, 3, 256].
        rows: int32 [B, ROW], see `plan`.
        out: [B, S, S, 3] where PATCH is 0, else [B, (S/p)^2, 3 p p] in the order of `cut_patches`.
        scales: float32 [2, 3], mean in pixel values and what a pixel's distance from it is multiplied by.
        normal: int32 [4097], `distributions.normal_table()`.
        seed: of erasing's noise.
    """
    BLOCKS: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    WHOLE: tl.constexpr = SIZE * SIZE % BLOCK == 0
    unit = rows + tl.program_id(0) // BLOCKS * ROW + DRAWN + WORDS
    at = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE * SIZE
    row = tl.load(unit)
    partner = tl.load(unit + 1)
    # both images are asked for before either is worked on
    drawn1 = rows + row * ROW
    drawn2 = rows + partner * ROW
    pixels1 = source_of(images, work, drawn1 + DRAWN, SIZE)
    pixels2 = source_of(images, work, drawn2 + DRAWN, SIZE)
    read1 = read_rgb(pixels1, at, inside, SIZE, WHOLE)
    read2 = read_rgb(pixels2, at, inside, SIZE, WHOLE)
    rgb1 = _ready(read1, pixels1, tables, drawn1, scales, normal, seed, at, SIZE)
    if tl.load(unit + 3) == 0:  # not mixed
        _store_rgb(out, row, at, rgb1, inside, SIZE, PATCH, WHOLE)
    else:
        rgb2 = _ready(read2, pixels2, tables, drawn2, scales, normal, seed, at, SIZE)
        _store_rgb(out, row, at, _mixed(rgb1, rgb2, drawn1, at, SIZE), inside, SIZE, PATCH, WHOLE)
        if tl.load(unit + 2) != 0:  # the partner's row is mixed with this one
            _store_rgb(out, partner, at, _mixed(rgb2, rgb1, drawn2, at, SIZE), inside, SIZE, PATCH, WHOLE)


@triton.jit
def write_normalized(images, out, scales, SIZE: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr):
    """Write BLOCK pixels of one row that is only normalized. Grid: B x ceil(S^2 / BLOCK) programs."""
    BLOCKS: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    WHOLE: tl.constexpr = SIZE * SIZE % BLOCK == 0
    row = tl.program_id(0) // BLOCKS
    at = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE * SIZE
    rgb = read_rgb(images + row.to(tl.int64) * (SIZE * SIZE * 3), at, inside, SIZE, WHOLE)
    _store_rgb(out, row, at, _normalized(rgb, scales), inside, SIZE, PATCH, WHOLE)


@triton.jit
def _store_rgb(out, row, at, rgb, inside, SIZE: tl.constexpr, PATCH: tl.constexpr, WHOLE: tl.constexpr):
    """Write a row's pixels, 3 x float32 [BLOCK] at offsets `at` into a plane, as they are laid out in `out`."""
    red, green, blue = rgb
    target = out + row.to(tl.int64) * (SIZE * SIZE * 3)
    if PATCH:
        y = at // SIZE
        x = at % SIZE
        patch = y // PATCH * (SIZE // PATCH) + x // PATCH
        place = patch * (3 * PATCH * PATCH) + y % PATCH * PATCH + x % PATCH
        if PATCH % 4 == 0:
            place = tl.max_contiguous(tl.multiple_of(place, [4]), [4])
        _store(target + place, red, inside, WHOLE)
        _store(target + place + PATCH * PATCH, green, inside, WHOLE)
        _store(target + place + 2 * PATCH * PATCH, blue, inside, WHOLE)
    elif WHOLE and at.shape[0] % 4 == 0 and out.dtype.element_ty.primitive_bitwidth == 16:
        # four pixels of three channels are twelve numbers in three words of eight bytes
        words = target.to(tl.pointer_type(tl.int64), bitcast=True) + _first_of_four(at) // 4 * 3
        r0, r1, r2, r3 = _bits_of_four(red, out)
        g0, g1, g2, g3 = _bits_of_four(green, out)
        b0, b1, b2, b3 = _bits_of_four(blue, out)
        tl.store(words, r0 | g0 << 16 | b0 << 32 | r1 << 48)
        tl.store(words + 1, g1 | b1 << 16 | r2 << 32 | g2 << 48)
        tl.store(words + 2, b2 | r3 << 16 | g3 << 32 | b3 << 48)
    else:
        _store(target + at * 3, red, inside, WHOLE)
        _store(target + at * 3 + 1, green, inside, WHOLE)
        _store(target + at * 3 + 2, blue, inside, WHOLE)


@triton.jit
def _first_of_four(values):
    """Return every fourth value, [BLOCK / 4]."""
    even, _ = tl.split(tl.reshape(values, (values.shape[0] // 4, 2, 2)))
    first, _ = tl.split(even)
    return first


@triton.jit
def _bits_of_four(values, out):
    """Return the bits of float32 values in the 16-bit type of `out`, int64 [BLOCK / 4] for each place among four."""
    bits = values.to(out.dtype.element_ty).to(tl.uint16, bitcast=True).to(tl.int64)
    even, odd = tl.split(tl.reshape(bits, (values.shape[0] // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _store(pointers, values, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, values.to(pointers.dtype.element_ty))
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def _ready(rgb, pixels, tables, drawn, scales, normal, seed, at, SIZE: tl.constexpr):
    """Return a row's pixels, 3 x float32 [BLOCK], after all its operations, normalized and erased.

    Args: `rgb` as it was read from `pixels`, where the row's image lies before the last operations.
    """
    red, green, blue = _normalized(filtered(rgb, pixels, tables, drawn + DRAWN, at, SIZE), scales)
    if tl.load(drawn + ERASE + 2) > 0:
        boxed = _in_box(drawn + ERASE, at, SIZE)
        if tl.max(boxed.to(tl.int32), 0) > 0:
            sample = at * 0 + tl.load(drawn + SAMPLE)
            view = at * 0 + tl.load(drawn + VIEW)
            word1, word2, word3, _ = tl.philox(seed, sample, view, at * 0 + NOISE, at)
            red = tl.where(boxed, _normal(word1, normal), red)
            green = tl.where(boxed, _normal(word2, normal), green)
            blue = tl.where(boxed, _normal(word3, normal), blue)
    return red, green, blue


@triton.jit
def _mixed(own, other, drawn, at, SIZE: tl.constexpr):
    """Return a row's pixels mixed with its partner's as `chain.mix` does, 3 x float32 [BLOCK]."""
    lam = tl.load(drawn + LAM).to(tl.float32) * UNITS
    theirs = tl.where(tl.load(drawn + BOX + 2) > 0, _in_box(drawn + BOX, at, SIZE).to(tl.float32), 1.0 - lam)
    ours = 1.0 - theirs
    return own[0] * ours + other[0] * theirs, own[1] * ours + other[1] * theirs, own[2] * ours + other[2] * theirs


@triton.jit
def _in_box(box, at, SIZE: tl.constexpr):
    """Return whether pixels are in a box of top, left, height and width."""
    y = at // SIZE - tl.load(box)
    x = at % SIZE - tl.load(box + 1)
    return (y >= 0) & (y < tl.load(box + 2)) & (x >= 0) & (x < tl.load(box + 3))


@triton.jit
def _normalized(rgb, scales):
    """Return (pixel - mean) scale of three channels, 3 x float32 [BLOCK], as `chain.normalize` does."""
    red = (rgb[0].to(tl.float32) - tl.load(scales)) * tl.load(scales + 3)
    green = (rgb[1].to(tl.float32) - tl.load(scales + 1)) * tl.load(scales + 4)
    blue = (rgb[2].to(tl.float32) - tl.load(scales + 2)) * tl.load(scales + 5)
    return red, green, blue


@triton.jit
def _normal(word, table):
    """Return a standard normal number, float32, from 32-bit words, as `distributions.normal` does in Q16."""
    cell = (word >> REST) & LAST_CELL
    low = tl.load(table + cell)
    rise = (tl.load(table + cell + 1) - low).to(tl.int64)
    distance = low + ((rise * (word & REST_MASK)) >> REST).to(tl.int32)
    return tl.where(word >> 31 != 0, -distance, distance).to(tl.float32) * UNITS
