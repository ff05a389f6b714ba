"""What a kernel's program reads of its record (`plan.RECORD`), and of the images and tables that it points to."""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportOptionalSubscript=false
# Triton's language looks like Python, and its functions' annotations are not meant for their own callers.

import triton
import triton.language as tl

from pipelines.augment.triton_ops import plan
from pipelines.rng.policies import OPERATIONS

AUTOCONTRAST, EQUALIZE, INVERT, POSTERIZE, SOLARIZE, COLOR = (
    tl.constexpr(OPERATIONS.index(name))
    for name in ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "Color")
)
CONTRAST, BRIGHTNESS, SHEAR_X, SHEAR_Y, TRANSLATE_Y = (
    tl.constexpr(OPERATIONS.index(name)) for name in ("Contrast", "Brightness", "ShearX", "ShearY", "TranslateY")
)


def _word(name: str) -> tl.constexpr:
    return tl.constexpr(plan.RECORD.fields[name][1] // 4)


OPERATION, SOURCE, TARGET, TABLE, CHANNEL, ARGUMENT = (
    _word(name) for name in ("operation", "source", "target", "table", "channel", "argument")
)
"""Words of a record; its row is word 0."""
WORDS, DRAWN, ROW = (tl.constexpr(number) for number in (plan.WORDS, plan.DRAWN, plan.ROW))


@triton.jit
def argument_of(record, which: tl.constexpr):
    """Return a record's first or second argument, float64, from its two words."""
    low = tl.load(record + ARGUMENT + 2 * which).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(record + ARGUMENT + 2 * which + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return (high << 32 | low).to(tl.float64, bitcast=True)


@triton.jit
def source_of(images, work, record, SIZE: tl.constexpr):
    """Return where the image that a record reads lies: the first byte of its three planes."""
    source = tl.load(record + SOURCE)
    if source < 0:
        pixels = images + tl.load(record).to(tl.int64) * (SIZE * SIZE * 3)
    else:
        pixels = work + source.to(tl.int64) * (SIZE * SIZE * 3)
    return pixels


@triton.jit
def target_of(work, record, SIZE: tl.constexpr):
    """Return where a record's operation writes."""
    return work + tl.load(record + TARGET).to(tl.int64) * (SIZE * SIZE * 3)


@triton.jit
def read(plane, at, inside, WHOLE: tl.constexpr):
    """Return a plane's pixels, int32; what is not `inside` is 0. WHOLE: all are, and nothing is masked."""
    values = tl.load(plane + at) if WHOLE else tl.load(plane + at, mask=inside, other=0)
    return values.to(tl.int32)


@triton.jit
def read_rgb(pixels, at, inside, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """Return the pixels of an image's three planes, 3 x int32 [BLOCK]."""
    red = read(pixels, at, inside, WHOLE)
    green = read(pixels + SIZE * SIZE, at, inside, WHOLE)
    blue = read(pixels + 2 * SIZE * SIZE, at, inside, WHOLE)
    return red, green, blue


@triton.jit
def write(plane, at, values, inside, WHOLE: tl.constexpr):
    """Write a plane's pixels, of 0 to 255."""
    if WHOLE:
        tl.store(plane + at, values.to(tl.uint8))
    else:
        tl.store(plane + at, values.to(tl.uint8), mask=inside)


@triton.jit
def window(plane, line, column, SIZE: tl.constexpr):
    """Return four pixels of a line, from `column` on, as the bytes of an int32, the first lowest.

    Two words of four bytes are read for it where S is a multiple of 4. Pixels behind the line are undefined.
    """
    if SIZE % 4 == 0:
        words = plane.to(tl.pointer_type(tl.int32), bitcast=True) + line * (SIZE // 4)
        first = column // 4
        low = tl.load(words + first).to(tl.uint32, bitcast=True).to(tl.uint64)
        second = tl.minimum(first + 1, SIZE // 4 - 1)
        high = tl.load(words + second).to(tl.uint32, bitcast=True).to(tl.uint64)
        return ((high << 32 | low) >> (column % 4 * 8).to(tl.uint64)).to(tl.int32)
    else:
        four = column * 0
        for byte in tl.static_range(4):
            at = line * SIZE + tl.minimum(column + byte, SIZE - 1)
            four = four | tl.load(plane + at).to(tl.int32) << (8 * byte)
        return four


@triton.jit
def byte_of(four, number):
    """Return one of the bytes of an int32, the lowest is 0; int32."""
    return (four >> (8 * number)) & 255


@triton.jit
def table_of(tables, row, channel):
    """Return a row's table for a channel, 256 values in 64 words: int32 [64]."""
    words = tables.to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(words + (row * 3 + channel) * 64 + tl.arange(0, 64))


@triton.jit
def look_up(table, values):
    """Return the table's entries for values of 0 to 255, both int32; the words pass through shared memory."""
    return byte_of(tl.gather(table, values >> 2, 0), values & 3)


@triton.jit
def packed(values):
    """Pack 256 values of 0 to 255 into 64 words, the first lowest: int32 [64]."""
    even, odd = tl.split(tl.reshape(values, (64, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first | second << 8 | third << 16 | fourth << 24
