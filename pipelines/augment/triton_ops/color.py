"""The color operations as kernels, equal to `ops_color` and so to Pillow's pixel for pixel.

What changes each channel's values alone (all but Color and Sharpness) is a table of 256 values, made once for an image
and looked up for its pixels. The kernels must be compiled without fused multiply-adds: Pillow rounds twice.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Triton's language looks like Python, and its functions' annotations are not meant for their own callers.

import triton
import triton.language as tl

from pipelines.augment.torch_ops.color import LUMA
from pipelines.augment.triton_ops.rows import (
    AUTOCONTRAST,
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    EQUALIZE,
    INVERT,
    OPERATION,
    POSTERIZE,
    SHARPNESS,
    SOLARIZE,
    SOLARIZE_ADD,
    argument_of,
    drawn_at,
    stored,
    target_of,
)

RED, GREEN, BLUE = (tl.constexpr(share) for share in LUMA)


@triton.jit(do_not_specialize=["slot", "rows"])
def make_table(
    images, work, drawn, arguments, tables, slot, rows, SIZE: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the 256 values of one channel of one image for a slot's operation, if that is a table.

    Grid: 3 B programs. Args: `images` uint8 [B, S, S, 3]; `work` uint8 [2, B, S, S, 3]; `drawn` int32 [B, words];
    `arguments` the same as float64; `tables` uint8 [B, 3, 256].
    """
    row = tl.program_id(0) // 3
    channel = tl.program_id(0) % 3
    operation = drawn_at(drawn, row, OPERATION + slot, SLOTS)
    if _is_table(operation):
        applied = drawn_at(drawn, row, OPERATION + SLOTS + slot, SLOTS)
        pixels, _, _ = stored(images, work, drawn, row, applied, rows, SIZE, SLOTS)
        argument = argument_of(arguments, row, slot, 0, SLOTS)
        levels = tl.arange(0, 256)
        if operation == AUTOCONTRAST:
            values = _stretched(levels, pixels + channel, SIZE, BLOCK)
        elif operation == EQUALIZE:
            values = _equalized(levels, pixels + channel, SIZE, BLOCK)
        elif operation == CONTRAST:
            values = _blended(_mean_gray(pixels, SIZE, BLOCK), levels, argument)
        elif operation == BRIGHTNESS:
            values = _blended(levels * 0, levels, argument)
        elif operation == INVERT:
            values = 255 - levels
        elif operation == POSTERIZE:
            values = levels & (255 << (8 - argument.to(tl.int32)))
        elif operation == SOLARIZE:
            values = tl.where(levels < argument.to(tl.int32), levels, 255 - levels)
        else:  # SOLARIZE_ADD
            values = tl.where(levels < 128, levels + argument.to(tl.int32), levels)
        tl.store(tables + (row * 3 + channel) * 256 + levels, values.to(tl.uint8))


@triton.jit(do_not_specialize=["slot", "rows"])
def apply_color(
    images,
    work,
    drawn,
    arguments,
    tables,
    slot,
    rows,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write CHUNK pixels of an image after a slot's operation into the workspace, if that is one of color.

    Grid: B x ceil(S^2 / CHUNK) programs. Args: as `make_table`'s, whose `tables` of this slot are read.
    """
    CHUNKS: tl.constexpr = (SIZE * SIZE + CHUNK - 1) // CHUNK
    row = tl.program_id(0) // CHUNKS
    begin = tl.program_id(0) % CHUNKS * CHUNK
    operation = drawn_at(drawn, row, OPERATION + slot, SLOTS)
    if _is_table(operation) | (operation == COLOR) | (operation == SHARPNESS):
        applied = drawn_at(drawn, row, OPERATION + SLOTS + slot, SLOTS)
        source, first, step = stored(images, work, drawn, row, applied, rows, SIZE, SLOTS)
        target = target_of(work, row, applied, rows, SIZE)
        argument = argument_of(arguments, row, slot, 0, SLOTS)
        for start in range(0, CHUNK, BLOCK):
            at = begin + start + tl.arange(0, BLOCK)
            inside = at < SIZE * SIZE
            y = at // SIZE
            x = at % SIZE
            pixels = source + (y * SIZE + first + step * x) * 3
            red = tl.load(pixels, mask=inside, other=0).to(tl.int32)
            green = tl.load(pixels + 1, mask=inside, other=0).to(tl.int32)
            blue = tl.load(pixels + 2, mask=inside, other=0).to(tl.int32)
            if operation == COLOR:
                base = _gray(red, green, blue)
                red = _blended(base, red, argument)
                green = _blended(base, green, argument)
                blue = _blended(base, blue, argument)
            elif operation == SHARPNESS:
                inner = inside & (y > 0) & (y < SIZE - 1) & (x > 0) & (x < SIZE - 1)
                red = _sharpened(red, pixels, inner, argument, SIZE)
                green = _sharpened(green, pixels + 1, inner, argument, SIZE)
                blue = _sharpened(blue, pixels + 2, inner, argument, SIZE)
            else:
                red = tl.load(tables + row * 768 + red).to(tl.int32)
                green = tl.load(tables + row * 768 + 256 + green).to(tl.int32)
                blue = tl.load(tables + row * 768 + 512 + blue).to(tl.int32)
            tl.store(target + at * 3, red.to(tl.uint8), mask=inside)
            tl.store(target + at * 3 + 1, green.to(tl.uint8), mask=inside)
            tl.store(target + at * 3 + 2, blue.to(tl.uint8), mask=inside)


@triton.jit
def _is_table(operation):
    """Whether an operation changes each channel's values alone."""
    spread = (operation == AUTOCONTRAST) | (operation == EQUALIZE) | (operation == INVERT)
    bits = (operation == POSTERIZE) | (operation == SOLARIZE) | (operation == SOLARIZE_ADD)
    return spread | bits | (operation == CONTRAST) | (operation == BRIGHTNESS)


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
def _stretched(levels, channel, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """AutoContrast's table for a channel whose first byte is `channel`."""
    lowest = tl.full((BLOCK,), 255, tl.int32)
    highest = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, SIZE * SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        # what lies behind the last pixel counts as the first pixel again
        values = tl.load(channel + tl.where(at < SIZE * SIZE, at, 0) * 3).to(tl.int32)
        lowest = tl.minimum(lowest, values)
        highest = tl.maximum(highest, values)
    low = tl.min(lowest, 0)
    high = tl.max(highest, 0)
    scale = tl.full((), 255, tl.float64) / tl.maximum(high - low, 1).to(tl.float64)
    values = levels.to(tl.float64) * scale + (-low).to(tl.float64) * scale
    return tl.where(high > low, tl.minimum(tl.maximum(values, 0.0), 255.0).to(tl.int32), levels)


@triton.jit
def _equalized(levels, channel, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Equalize's table for a channel whose first byte is `channel`."""
    counts = tl.full((256,), 0, tl.int32)
    for start in range(0, SIZE * SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < SIZE * SIZE
        values = tl.load(channel + at * 3, mask=inside, other=0).to(tl.int32)
        counts += tl.histogram(values, 256, mask=inside)
    brightest = tl.max(tl.where(counts > 0, levels, 0), 0)
    step = (SIZE * SIZE - tl.sum(tl.where(levels == brightest, counts, 0), 0)) // 255
    below = tl.cumsum(counts, 0) - counts
    flattened = (step // 2 + below) // tl.maximum(step, 1)
    return tl.where(step > 0, tl.minimum(flattened, 255), levels)


@triton.jit
def _mean_gray(pixels, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the mean of an image's gray values, rounded to the nearest integer, halves up; float64."""
    total = tl.full((BLOCK,), 0, tl.int64)
    for start in range(0, SIZE * SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < SIZE * SIZE
        red = tl.load(pixels + at * 3, mask=inside, other=0).to(tl.int32)
        green = tl.load(pixels + at * 3 + 1, mask=inside, other=0).to(tl.int32)
        blue = tl.load(pixels + at * 3 + 2, mask=inside, other=0).to(tl.int32)
        total += _gray(red, green, blue).to(tl.int64)
    return tl.floor(tl.sum(total, 0).to(tl.float64) / (SIZE * SIZE) + 0.5)


@triton.jit
def _sharpened(own, channel, inner, factor, SIZE: tl.constexpr):
    """Return a channel of `ops_color.sharpness`, int32 [BLOCK], from its values and where they lie."""
    weighted = own * 4
    for below in tl.static_range(3):
        for right in tl.static_range(3):  # of a mirrored image it is the left: the sum is the same
            at = ((below - 1) * SIZE + right - 1) * 3
            weighted += tl.load(channel + at, mask=inner, other=0).to(tl.int32)
    smooth = (2 * weighted + 13) // 26  # weighted / 13, rounded
    return tl.where(inner, _blended(smooth, own, factor), own)
