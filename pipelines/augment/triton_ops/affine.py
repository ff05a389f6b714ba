"""The geometric operations as kernels, equal to `ops_affine` and so to Pillow's pixel for pixel.

Coordinates and weights are float64 in Pillow's order of operations, for the reasons given there, and must be compiled
without fused multiply-adds. Differences of pixels are taken as integers, where they are exact: a shear or translation
costs 6 float64 operations for a channel of a pixel, a rotation 38, and 4 and 16 conversions. On GPUs with few float64
units (all but the data center's) expect these to be the slowest kernels, though only a sixth of the images is in them.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Triton's language looks like Python, and its functions' annotations are not meant for their own callers.

import triton
import triton.language as tl

from pipelines.augment.torch_ops.affine import FILL
from pipelines.augment.triton_ops.rows import (
    OPERATION,
    ROTATE,
    SHEAR_X,
    SHEAR_Y,
    TRANSLATE_X,
    TRANSLATE_Y,
    argument_of,
    drawn_at,
    stored,
    target_of,
)

FILLS = tl.constexpr(FILL[0] | FILL[1] << 8 | FILL[2] << 16)


@triton.jit(do_not_specialize=["slot", "rows"])
def apply_affine(
    images,
    work,
    drawn,
    arguments,
    slot,
    rows,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write CHUNK pixels of an image after a slot's operation into the workspace, if that is a geometric one.

    Grid: B x ceil(S^2 / CHUNK) programs. Args: as `kernels_color.make_table`'s.
    """
    CHUNKS: tl.constexpr = (SIZE * SIZE + CHUNK - 1) // CHUNK
    row = tl.program_id(0) // CHUNKS
    begin = tl.program_id(0) % CHUNKS * CHUNK
    operation = drawn_at(drawn, row, OPERATION + slot, SLOTS)
    if (operation == ROTATE) | ((operation >= SHEAR_X) & (operation <= TRANSLATE_Y)):
        applied = drawn_at(drawn, row, OPERATION + SLOTS + slot, SLOTS)
        source, first, step = stored(images, work, drawn, row, applied, rows, SIZE, SLOTS)
        target = target_of(work, row, applied, rows, SIZE)
        argument = argument_of(arguments, row, slot, 0, SLOTS)
        sine = argument_of(arguments, row, slot, 1, SLOTS)
        for start in range(0, CHUNK, BLOCK):
            at = begin + start + tl.arange(0, BLOCK)
            inside = at < SIZE * SIZE
            y = at // SIZE
            x = at % SIZE
            if operation == ROTATE:
                red, green, blue = _rotated(source, first, step, y, x, argument, sine, inside, SIZE)
            else:
                red, green, blue = _moved(source, first, step, y, x, operation, argument, inside, SIZE)
            tl.store(target + at * 3, red.to(tl.uint8), mask=inside)
            tl.store(target + at * 3 + 1, green.to(tl.uint8), mask=inside)
            tl.store(target + at * 3 + 2, blue.to(tl.uint8), mask=inside)


@triton.jit
def _moved(source, first, step, y, x, operation, argument, inside, SIZE: tl.constexpr):
    """Return red, green and blue, int32 [BLOCK], of an image sheared or translated along x or y."""
    vertical = (operation == SHEAR_Y) | (operation == TRANSLATE_Y)
    along = tl.where(vertical, y, x).to(tl.float64) + 0.5
    across = tl.where(vertical, x, y).to(tl.float64) + 0.5
    point = along + argument * tl.where(operation < TRANSLATE_X, across, SIZE)
    within = (point >= 0) & (point < SIZE)
    before = tl.floor(point - 0.5)
    fraction = point - 0.5 - before
    low = before.to(tl.int32)
    a = _offset(vertical, low - 1, first, step, y, x, SIZE)
    b = _offset(vertical, low, first, step, y, x, SIZE)
    c = _offset(vertical, low + 1, first, step, y, x, SIZE)
    d = _offset(vertical, low + 2, first, step, y, x, SIZE)
    wanted = inside & within
    red = _finished(_line(source, a, b, c, d, fraction, wanted), within, 0)
    green = _finished(_line(source + 1, a, b, c, d, fraction, wanted), within, 1)
    blue = _finished(_line(source + 2, a, b, c, d, fraction, wanted), within, 2)
    return red, green, blue


@triton.jit
def _rotated(source, first, step, y, x, cosine, sine, inside, SIZE: tl.constexpr):
    """Return red, green and blue, int32 [BLOCK], of an image turned about its center."""
    half = tl.full((), SIZE, tl.float64) / 2
    shift_x = cosine * -half + sine * -half + half
    shift_y = -sine * -half + cosine * -half + half
    center_x = x.to(tl.float64) + 0.5
    center_y = y.to(tl.float64) + 0.5
    point_x = cosine * center_x + sine * center_y + shift_x
    point_y = -sine * center_x + cosine * center_y + shift_y
    within = (point_x >= 0) & (point_x < SIZE) & (point_y >= 0) & (point_y < SIZE)
    wanted = inside & within
    red = _finished(_turned(source, first, step, point_y, point_x, wanted, SIZE), within, 0)
    green = _finished(_turned(source + 1, first, step, point_y, point_x, wanted, SIZE), within, 1)
    blue = _finished(_turned(source + 2, first, step, point_y, point_x, wanted, SIZE), within, 2)
    return red, green, blue


@triton.jit
def _turned(channel, first, step, point_y, point_x, wanted, SIZE: tl.constexpr):
    """Interpolate a channel in both directions, first along x: float64 [BLOCK]."""
    left = tl.floor(point_x - 0.5)
    above = tl.floor(point_y - 0.5)
    fraction = point_x - 0.5 - left
    column, row = left.to(tl.int32), above.to(tl.int32)
    a = (first + step * _held(column - 1, SIZE)) * 3
    b = (first + step * _held(column, SIZE)) * 3
    c = (first + step * _held(column + 1, SIZE)) * 3
    d = (first + step * _held(column + 2, SIZE)) * 3
    line1 = _line(channel + _held(row - 1, SIZE) * (SIZE * 3), a, b, c, d, fraction, wanted)
    line2 = _line(channel + _held(row, SIZE) * (SIZE * 3), a, b, c, d, fraction, wanted)
    line3 = _line(channel + _held(row + 1, SIZE) * (SIZE * 3), a, b, c, d, fraction, wanted)
    line4 = _line(channel + _held(row + 2, SIZE) * (SIZE * 3), a, b, c, d, fraction, wanted)
    linear = line3 - line1
    square = (line1 - line2) * 2 + line3 - line4
    cube = line2 - line1 - line3 + line4
    return _polynomial(line2, linear, square, cube, point_y - 0.5 - above)


@triton.jit
def _line(channel, a, b, c, d, fraction, wanted):
    """Interpolate between the second and third of four pixels, given by their offsets: float64 [BLOCK]."""
    v1 = tl.load(channel + a, mask=wanted, other=0).to(tl.int32)
    v2 = tl.load(channel + b, mask=wanted, other=0).to(tl.int32)
    v3 = tl.load(channel + c, mask=wanted, other=0).to(tl.int32)
    v4 = tl.load(channel + d, mask=wanted, other=0).to(tl.int32)
    linear = (v3 - v1).to(tl.float64)
    square = ((v1 - v2) * 2 + v3 - v4).to(tl.float64)
    cube = (v2 - v1 - v3 + v4).to(tl.float64)
    return _polynomial(v2.to(tl.float64), linear, square, cube, fraction)


@triton.jit
def _polynomial(constant, linear, square, cube, fraction):
    return ((cube * fraction + square) * fraction + linear) * fraction + constant


@triton.jit
def _offset(vertical, tap, first, step, y, x, SIZE: tl.constexpr):
    """Return a tap's offset in bytes: in row y at column `tap`, or in column x at row `tap`."""
    held = _held(tap, SIZE)
    return (tl.where(vertical, held, y) * SIZE + first + step * tl.where(vertical, x, held)) * 3


@triton.jit
def _held(tap, SIZE: tl.constexpr):
    return tl.minimum(tl.maximum(tap, 0), SIZE - 1)


@triton.jit
def _finished(values, within, channel: tl.constexpr):
    """Truncate float64 values and clip them; the fill color where the source point is not in the image."""
    clipped = tl.minimum(tl.maximum(values.to(tl.int32), 0), 255)
    return tl.where(within, clipped, (FILLS >> (8 * channel)) & 255)
