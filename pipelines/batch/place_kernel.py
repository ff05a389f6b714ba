"""The Triton kernel of `pipelines.batch.place`; imported only where Triton is."""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Triton's language looks like Python, and its functions' annotations are not meant for their own callers.

import triton
import triton.language as tl

BLOCK, WARPS = 1024, 4
"""Pixels that a program moves, and its warps."""


@triton.jit
def place_kernel(crops, moves, out, SIZE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy BLOCK pixels of one crop into the planes of a batch's row, mirrored where asked.

    Grid: M x ceil(S^2 / BLOCK) programs.

    Args:
        crops: uint8 [N, S, S, 3]; with WORDS, which needs S to be a multiple of 4, the same memory as int32.
        moves: int32 [M, 4]: crop, row of the batch, 1 to mirror, unused.
        out: uint8 [B, 3, S, S]; int32 with WORDS.
    """
    BLOCKS: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    move = moves + tl.program_id(0) // BLOCKS * 4
    crop = tl.load(move).to(tl.int64)
    row = tl.load(move + 1).to(tl.int64)
    mirror = tl.load(move + 2) == 1
    block = tl.program_id(0) % BLOCKS
    if WORDS:  # four pixels are three words of the crop, and one of each plane
        LINE: tl.constexpr = SIZE // 4
        at = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        inside = at < SIZE * LINE
        source = crops + crop * (SIZE * LINE * 3) + at * 3
        first = tl.load(source, mask=inside)
        second = tl.load(source + 1, mask=inside)
        third = tl.load(source + 2, mask=inside)
        red = _word(first, first >> 24, second >> 16, third >> 8, mirror)
        green = _word(first >> 8, second, second >> 24, third >> 16, mirror)
        blue = _word(first >> 16, second >> 8, third, third >> 24, mirror)
    else:
        LINE: tl.constexpr = SIZE
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < SIZE * SIZE
        source = crops + crop * (SIZE * SIZE * 3) + at * 3
        red = tl.load(source, mask=inside)
        green = tl.load(source + 1, mask=inside)
        blue = tl.load(source + 2, mask=inside)
    column = at % LINE
    target = out + row * (SIZE * LINE * 3) + at - column + tl.where(mirror, LINE - 1 - column, column)
    tl.store(target, red, mask=inside)
    tl.store(target + SIZE * LINE, green, mask=inside)
    tl.store(target + 2 * SIZE * LINE, blue, mask=inside)


@triton.jit
def _word(a, b, c, d, mirror):
    """Pack the lowest bytes of four int32 tensors into words, the first lowest, or in reverse if `mirror`."""
    forth = (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24
    back = (d & 255) | (c & 255) << 8 | (b & 255) << 16 | a << 24
    return tl.where(mirror, back, forth)
