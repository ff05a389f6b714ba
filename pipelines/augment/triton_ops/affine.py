"""The geometric operations as kernels, equal to `torch_ops.affine` and so to Pillow's pixel for pixel.

Coordinates and weights are float64 in Pillow's order of operations, for the reasons given there, and must be compiled
without fused multiply-adds. Differences of pixels are taken as integers, where they are exact. Integers become float64
and back by an addition (`_double`, `_floor`): a data center's GPU adds four times as fast as it converts.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Triton's language looks like Python, and its functions' annotations are not meant for their own callers.

import triton
import triton.language as tl

from pipelines.augment.torch_ops.affine import FILL
from pipelines.augment.triton_ops.records import (
    OPERATION,
    SHEAR_X,
    SHEAR_Y,
    TABLE,
    TRANSLATE_Y,
    WORDS,
    argument_of,
    byte_of,
    look_up,
    source_of,
    table_of,
    target_of,
    window,
    write,
)

FILLS = tl.constexpr(FILL[0] | FILL[1] << 8 | FILL[2] << 16)
BIAS = tl.constexpr(1.5 * 2**52)
"""Between 2^52 and 2^53 neighboring float64 numbers are 1 apart: the lower bits of BIAS + n are those of an integer n,
and adding BIAS to any number rounds it to an integer."""
BIAS_BITS = tl.constexpr(0x4338000000000000)


@triton.jit
def apply_move(images, work, tables, records, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Write CHUNK pixels of an image after a shear or translation into the workspace.

    Grid: n x ceil(S^2 / CHUNK) programs. Args: as `color.make_table`'s; `tables` are read.
    """
    CHUNKS: tl.constexpr = (SIZE * SIZE + CHUNK - 1) // CHUNK
    record = records + tl.program_id(0) // CHUNKS * WORDS
    begin = tl.program_id(0) % CHUNKS * CHUNK
    operation = tl.load(record + OPERATION)
    pixels = source_of(images, work, record, SIZE)
    target = target_of(work, record, SIZE)
    for start in range(0, CHUNK, BLOCK):
        at = begin + start + tl.arange(0, BLOCK)
        if operation == TRANSLATE_Y:
            _move_y(pixels, target, tables, record, at, SIZE, CHUNK, True)
        elif operation == SHEAR_Y:
            _move_y(pixels, target, tables, record, at, SIZE, CHUNK, False)
        else:
            _move_x(pixels, target, tables, record, at, SIZE, CHUNK)


@triton.jit
def apply_rotate(images, work, tables, records, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Write CHUNK pixels of an image turned about its center; grid and arguments are `apply_move`'s."""
    CHUNKS: tl.constexpr = (SIZE * SIZE + CHUNK - 1) // CHUNK
    record = records + tl.program_id(0) // CHUNKS * WORDS
    begin = tl.program_id(0) % CHUNKS * CHUNK
    pixels = source_of(images, work, record, SIZE)
    target = target_of(work, record, SIZE)
    for start in range(0, CHUNK, BLOCK):
        _rotate(pixels, target, tables, record, begin + start + tl.arange(0, BLOCK), SIZE, CHUNK)


@triton.jit
def _move_x(pixels, target, tables, record, at, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Shear or translate along x: take pixel (x, y) from (x + argument y, y) or (x + argument S, y)."""
    x = at % SIZE
    y = tl.minimum(at // SIZE, SIZE - 1)
    point = _point(x, y, record, tl.load(record + OPERATION) == SHEAR_X, SIZE)
    within = (point >= 0) & (point < SIZE)
    low, before = _floor(point - 0.5)
    fraction = point - 0.5 - before
    first = tl.minimum(tl.maximum(low - 1, 0), tl.maximum(SIZE - 4, 0))
    a = _clamp(low - 1, SIZE) - first
    b = _clamp(low, SIZE) - first
    c = _clamp(low + 1, SIZE) - first
    d = _clamp(low + 2, SIZE) - first
    chained = tl.load(record + TABLE) != 0
    for channel in range(3):
        table = table_of(tables, tl.load(record), channel)
        four = window(pixels + channel * SIZE * SIZE, y, first, SIZE)
        value = _cubic(byte_of(four, a), byte_of(four, b), byte_of(four, c), byte_of(four, d), fraction, table, chained)
        _finish(target, at, value, within, channel, SIZE, CHUNK)


@triton.jit
def _move_y(pixels, target, tables, record, at, SIZE: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """Shear or translate along y. ALIGNED: a line's pixels all come from the same lines, as when translated."""
    x = at % SIZE
    point = _point(at // SIZE, x, record, not ALIGNED, SIZE)
    within = (point >= 0) & (point < SIZE)
    low, before = _floor(point - 0.5)
    fraction = point - 0.5 - before
    chained = tl.load(record + TABLE) != 0
    for channel in range(3):
        table = table_of(tables, tl.load(record), channel)
        plane = pixels + channel * SIZE * SIZE
        a = _line(plane, low - 1, x, SIZE, ALIGNED)
        b = _line(plane, low, x, SIZE, ALIGNED)
        c = _line(plane, low + 1, x, SIZE, ALIGNED)
        d = _line(plane, low + 2, x, SIZE, ALIGNED)
        _finish(target, at, _cubic(a, b, c, d, fraction, table, chained), within, channel, SIZE, CHUNK)


@triton.jit
def _rotate(pixels, target, tables, record, at, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Turn about the center, interpolating first along x; the arguments are cosine and sine."""
    cosine = argument_of(record, 0)
    sine = argument_of(record, 1)
    half = tl.full((), SIZE, tl.float64) / 2
    shift_x = cosine * -half + sine * -half + half
    shift_y = -sine * -half + cosine * -half + half
    center_x = _double(at % SIZE) + 0.5
    center_y = _double(at // SIZE) + 0.5
    point_x = cosine * center_x + sine * center_y + shift_x
    point_y = -sine * center_x + cosine * center_y + shift_y
    within = (point_x >= 0) & (point_x < SIZE) & (point_y >= 0) & (point_y < SIZE)
    left, before_x = _floor(point_x - 0.5)
    above, before_y = _floor(point_y - 0.5)
    fraction_x = point_x - 0.5 - before_x
    fraction_y = point_y - 0.5 - before_y
    first = tl.minimum(tl.maximum(left - 1, 0), tl.maximum(SIZE - 4, 0))
    a = _clamp(left - 1, SIZE) - first
    b = _clamp(left, SIZE) - first
    c = _clamp(left + 1, SIZE) - first
    d = _clamp(left + 2, SIZE) - first
    chained = tl.load(record + TABLE) != 0
    for channel in range(3):
        table = table_of(tables, tl.load(record), channel)
        plane = pixels + channel * SIZE * SIZE
        line1 = _row(plane, above - 1, first, a, b, c, d, fraction_x, table, chained, SIZE)
        line2 = _row(plane, above, first, a, b, c, d, fraction_x, table, chained, SIZE)
        line3 = _row(plane, above + 1, first, a, b, c, d, fraction_x, table, chained, SIZE)
        line4 = _row(plane, above + 2, first, a, b, c, d, fraction_x, table, chained, SIZE)
        linear = line3 - line1
        square = (line1 - line2) * 2 + line3 - line4
        cube = line2 - line1 - line3 + line4
        value = _polynomial(line2, linear, square, cube, fraction_y)
        _finish(target, at, value, within, channel, SIZE, CHUNK)


@triton.jit
def _point(along, across, record, sheared, SIZE: tl.constexpr):
    """Return where a pixel comes from on the axis that it moves along, float64."""
    argument = argument_of(record, 0)
    if sheared:
        point = _double(along) + 0.5 + argument * (_double(across) + 0.5)
    else:
        point = _double(along) + 0.5 + argument * SIZE
    return point


@triton.jit
def _row(plane, row, first, a, b, c, d, fraction, table, chained, SIZE: tl.constexpr):
    """Interpolate along x in a row, clamped to the image: float64 [BLOCK]."""
    four = window(plane, _clamp(row, SIZE), first, SIZE)
    return _cubic(byte_of(four, a), byte_of(four, b), byte_of(four, c), byte_of(four, d), fraction, table, chained)


@triton.jit
def _line(plane, row, x, SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a row's pixels at columns x, the row clamped to the image: int32 [BLOCK]."""
    at = _clamp(row, SIZE) * SIZE + x
    if ALIGNED and SIZE % 4 == 0:
        at = tl.max_contiguous(tl.multiple_of(at, [4]), [4])
    return tl.load(plane + at).to(tl.int32)


@triton.jit
def _cubic(v1, v2, v3, v4, fraction, table, chained):
    """Interpolate between the second and third of four pixels, after the table if `chained`: float64 [BLOCK]."""
    if chained:
        v1 = look_up(table, v1)
        v2 = look_up(table, v2)
        v3 = look_up(table, v3)
        v4 = look_up(table, v4)
    linear = _double(v3 - v1)
    square = _double((v1 - v2) * 2 + v3 - v4)
    cube = _double(v2 - v1 - v3 + v4)
    return _polynomial(_double(v2), linear, square, cube, fraction)


@triton.jit
def _polynomial(constant, linear, square, cube, fraction):
    return ((cube * fraction + square) * fraction + linear) * fraction + constant


@triton.jit
def _clamp(index, SIZE: tl.constexpr):
    """Return an index clamped to the image."""
    return tl.minimum(tl.maximum(index, 0), SIZE - 1)


@triton.jit
def _finish(target, at, values, within, channel, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Write a channel: truncated and clipped, or the fill color where the source point is not in the image."""
    whole, _ = _floor(values)
    clipped = tl.minimum(tl.maximum(whole, 0), 255)
    filled = tl.where(within, clipped, (FILLS >> (8 * channel)) & 255)
    write(target + channel * SIZE * SIZE, at, filled, at < SIZE * SIZE, SIZE * SIZE % CHUNK == 0)


@triton.jit
def _double(values):
    """Return int32 as float64, exactly."""
    return (values.to(tl.int64) + BIAS_BITS).to(tl.float64, bitcast=True) - BIAS


@triton.jit
def _floor(values):
    """Return float64 values of at most 2^31 rounded down, as int32 and as float64."""
    biased = values + BIAS
    nearest = biased - BIAS
    above = nearest > values
    whole = biased.to(tl.int64, bitcast=True).to(tl.int32) - above.to(tl.int32)
    return whole, tl.where(above, nearest - 1, nearest)
