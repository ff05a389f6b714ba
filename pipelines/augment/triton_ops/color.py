"""The color operations as kernels, equal to `torch_ops.color` and so to Pillow's pixel for pixel.

What changes each channel's values alone (all but Color and Sharpness) is a table of 256 values, made once for an image
and looked up by its pixels' next reader. A table that follows another is made of it. The kernels must be compiled
without fused multiply-adds: Pillow rounds twice.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Triton's language looks like Python, and its functions' annotations are not meant for their own callers.

import triton
import triton.language as tl

from pipelines.augment.torch_ops.color import LUMA
from pipelines.augment.triton_ops.records import (
    AUTOCONTRAST,
    BRIGHTNESS,
    CHANNEL,
    COLOR,
    CONTRAST,
    EQUALIZE,
    INVERT,
    OPERATION,
    POSTERIZE,
    SOLARIZE,
    TABLE,
    WORDS,
    argument_of,
    byte_of,
    look_up,
    packed,
    read,
    read_rgb,
    source_of,
    table_of,
    target_of,
    window,
    write,
)

RED, GREEN, BLUE = (tl.constexpr(weight) for weight in LUMA)


@triton.jit
def make_table(images, work, tables, records, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Make the table of one channel of an image, or that of all three, of the table that they have so far if any.

    Grid: a program for each record.

    Args:
        images: uint8 [B, 3, S, S], mirrored already.
        work: uint8 [W, 3, S, S].
        tables: uint8 [B, 3, 256].
        records: int32 [n, WORDS], see `plan.RECORD`.
    """
    record = records + tl.program_id(0) * WORDS
    row = tl.load(record)
    operation = tl.load(record + OPERATION)
    channel = tl.load(record + CHANNEL)
    chained = tl.load(record + TABLE) != 0
    argument = argument_of(record, 0)
    pixels = source_of(images, work, record, SIZE)
    levels = tl.arange(0, 256)
    if operation == AUTOCONTRAST:
        values = _stretched(levels, pixels, tables, row, channel, chained, SIZE, BLOCK)
    elif operation == EQUALIZE:
        values = _equalized(levels, pixels, tables, row, channel, chained, SIZE, BLOCK)
    elif operation == CONTRAST:
        values = _blended(_mean_gray(pixels, tables, row, chained, SIZE, BLOCK), levels, argument)
    elif operation == BRIGHTNESS:
        values = _blended(levels * 0, levels, argument)
    elif operation == INVERT:
        values = 255 - levels
    elif operation == POSTERIZE:
        values = levels & (255 << (8 - argument.to(tl.int32)))
    elif operation == SOLARIZE:
        values = tl.where(levels < argument.to(tl.int32), levels, 255 - levels)
    else:  # SolarizeAdd
        values = tl.where(levels < 128, levels + argument.to(tl.int32), levels)
    own = packed(values)
    words = tables.to(tl.pointer_type(tl.int32), bitcast=True) + row * 192 + tl.arange(0, 64)
    for plane in tl.static_range(3):
        if (channel < 0) | (channel == plane):
            made = own
            if chained:
                before = look_up(table_of(tables, row, plane), levels)
                made = packed(look_up(own, before))
            tl.store(words + plane * 64, made)


@triton.jit
def apply_filter(images, work, tables, records, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Write CHUNK pixels of an image after Color or Sharpness into the workspace.

    Grid: n x ceil(S^2 / CHUNK) programs. Args: as `make_table`'s; `tables` are read.
    """
    WHOLE: tl.constexpr = SIZE * SIZE % CHUNK == 0
    CHUNKS: tl.constexpr = (SIZE * SIZE + CHUNK - 1) // CHUNK
    record = records + tl.program_id(0) // CHUNKS * WORDS
    begin = tl.program_id(0) % CHUNKS * CHUNK
    pixels = source_of(images, work, record, SIZE)
    target = target_of(work, record, SIZE)
    for start in range(0, CHUNK, BLOCK):
        at = begin + start + tl.arange(0, BLOCK)
        inside = at < SIZE * SIZE
        rgb = read_rgb(pixels, at, inside, SIZE, WHOLE)
        red, green, blue = filtered(rgb, pixels, tables, record, at, SIZE)
        write(target, at, red, inside, WHOLE)
        write(target + SIZE * SIZE, at, green, inside, WHOLE)
        write(target + 2 * SIZE * SIZE, at, blue, inside, WHOLE)


@triton.jit
def filtered(rgb, pixels, tables, record, at, SIZE: tl.constexpr):
    """Return pixels, 3 x int32 [BLOCK], after a record's table, if any, and its Color or Sharpness, if it is one.

    Args: `rgb` as it was read from `pixels`, at the offsets `at` into a plane.
    """
    red, green, blue = rgb
    row = tl.load(record)
    operation = tl.load(record + OPERATION)
    argument = argument_of(record, 0)
    chained = tl.load(record + TABLE) != 0
    if chained:
        red = look_up(table_of(tables, row, 0), red)
        green = look_up(table_of(tables, row, 1), green)
        blue = look_up(table_of(tables, row, 2), blue)
    if operation == COLOR:
        gray = _gray(red, green, blue)
        red = _blended(gray, red, argument)
        green = _blended(gray, green, argument)
        blue = _blended(gray, blue, argument)
    elif operation > 0:  # Sharpness
        red = _sharpened(red, pixels, tables, row, 0, chained, at, argument, SIZE)
        green = _sharpened(green, pixels, tables, row, 1, chained, at, argument, SIZE)
        blue = _sharpened(blue, pixels, tables, row, 2, chained, at, argument, SIZE)
    return red, green, blue


@triton.jit
def _blended(base, values, argument):
    """Return base + argument (values - base) as Blend.c does: float32, rounded twice, clipped, truncated; int32."""
    start = base.to(tl.float32)
    mixed = (values.to(tl.float32) - start) * argument.to(tl.float32) + start
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _gray(red, green, blue):
    """Return gray values as Pillow's convert("L") makes them, from int32 to int32."""
    return (red * RED + green * GREEN + blue * BLUE + 0x8000) >> 16


@triton.jit
def _values(plane, at, table, chained, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return a block of a plane's pixels, int32, after the table if `chained`."""
    values = read(plane, at, at < SIZE * SIZE, SIZE * SIZE % BLOCK == 0)
    if chained:
        values = look_up(table, values)
    return values


@triton.jit
def _stretched(levels, pixels, tables, row, channel, chained, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """AutoContrast's table for a channel, int32 [256]."""
    table = table_of(tables, row, channel)
    plane = pixels + channel * (SIZE * SIZE)
    lowest = tl.full((BLOCK,), 255, tl.int32)
    highest = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, SIZE * SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = _values(plane, at, table, chained, SIZE, BLOCK)
        lowest = tl.minimum(lowest, tl.where(at < SIZE * SIZE, values, 255))
        highest = tl.maximum(highest, tl.where(at < SIZE * SIZE, values, 0))
    low = tl.min(lowest, 0)
    high = tl.max(highest, 0)
    scale = tl.full((), 255, tl.float64) / tl.maximum(high - low, 1).to(tl.float64)
    values = levels.to(tl.float64) * scale + (-low).to(tl.float64) * scale
    return tl.where(high > low, tl.minimum(tl.maximum(values, 0.0), 255.0).to(tl.int32), levels)


@triton.jit
def _equalized(levels, pixels, tables, row, channel, chained, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Equalize's table for a channel, int32 [256]."""
    table = table_of(tables, row, channel)
    plane = pixels + channel * (SIZE * SIZE)
    counts = tl.full((256,), 0, tl.int32)
    for start in range(0, SIZE * SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = _values(plane, at, table, chained, SIZE, BLOCK)
        counts += tl.histogram(values, 256, mask=at < SIZE * SIZE)
    brightest = tl.max(tl.where(counts > 0, levels, 0), 0)
    step = (SIZE * SIZE - tl.sum(tl.where(levels == brightest, counts, 0), 0)) // 255
    below = tl.cumsum(counts, 0) - counts
    flattened = (step // 2 + below) // tl.maximum(step, 1)
    return tl.where(step > 0, tl.minimum(flattened, 255), levels)


@triton.jit
def _mean_gray(pixels, tables, row, chained, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the mean of an image's gray values, rounded to the nearest integer, halves up; float64."""
    reds = table_of(tables, row, 0)
    greens = table_of(tables, row, 1)
    blues = table_of(tables, row, 2)
    total = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, SIZE * SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        red = _values(pixels, at, reds, chained, SIZE, BLOCK)
        green = _values(pixels + SIZE * SIZE, at, greens, chained, SIZE, BLOCK)
        blue = _values(pixels + 2 * SIZE * SIZE, at, blues, chained, SIZE, BLOCK)
        total += tl.where(at < SIZE * SIZE, _gray(red, green, blue), 0)
    return tl.floor(tl.sum(total.to(tl.int64), 0).to(tl.float64) / (SIZE * SIZE) + 0.5)


@triton.jit
def _sharpened(own, pixels, tables, row, channel: tl.constexpr, chained, at, factor, SIZE: tl.constexpr):
    """Return a channel of `torch_ops.color.sharpness`, int32 [BLOCK]; `own` are its values at `at`."""
    y = at // SIZE
    x = at % SIZE
    inner = (y > 0) & (y < SIZE - 1) & (x > 0) & (x < SIZE - 1)
    table = table_of(tables, row, channel)
    left = tl.maximum(x - 1, 0)
    weighted = own * 4
    for below in range(3):  # not unrolled: it would hold too many registers
        line = tl.minimum(tl.maximum(y + below - 1, 0), SIZE - 1)
        four = window(pixels + channel * SIZE * SIZE, line, left, SIZE)
        for right in tl.static_range(3):
            values = byte_of(four, right)
            if chained:
                values = look_up(table, values)
            weighted += values
    smooth = (2 * weighted + 13) // 26  # weighted / 13, rounded
    return tl.where(inner, _blended(smooth, own, factor), own)
