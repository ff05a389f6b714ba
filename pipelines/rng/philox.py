"""Philox4x32-10, the same bits in numpy and torch, and what turns its words into decisions.

Randomness here is a function, not a state. Every draw of deitfast is

    philox(counter = (c0, c1, stream, block), key = seed) -> four 32-bit words

so any of them can be made again by another loader, on another number of ranks, after a crash, or for a teacher. The key
is the augmentation seed, low word first; DEPTH and DROPOUT have the training's. The stream says what is drawn, and what
the counter's first words mean:

| stream | c0, c1 | block: its words |
| --- | --- | --- |
| CROP | sample, view | try t: area, aspect, top, left; a padded crop takes block 0's top and left |
| FLIP | sample, view | 0: flipped? |
| OPERATION | sample, view | slot s: which, applied?, magnitude, sign; 2: AutoAugment's sub-policy |
| ERASE | sample, view | 0: erased? 1 + t: try t's area, aspect, top, left |
| NOISE | sample, view | y * S + x of the output's pixel: red, green, blue |
| MIX | group, pass | 0: mixed?, CutMix?, lambda; 1: the box's center: y, x |
| ORDER | sample, pass | 0: the pass's sort key |
| BLOCKS | block of the pass, epoch | 0: the epoch's sort key |
| SUBSET | sample, 0 | 0: the subset's sort key |
| JITTER | sample, view | 0: order, brightness, contrast, saturation |
| DEPTH | sample, view | epoch x blocks + b: which of the residual branches 4 b to 4 b + 3 are dropped |
| DROPOUT | first row's sample, view | epoch: the seed of a step's dropout |

The functions below use nothing but Python's operators on integers. So one source runs on numpy int64 arrays, on torch
int64 tensors of any device (erasing's noise), and on plain Python integers. Three traps are avoided: a product of two
words wraps modulo 2^64 in int64, which harms neither half; torch's and numpy's >> is arithmetic, hence the mask after
it; uint64 is never used, as numpy turns its mixtures with int64 into float64. numpy scalars (np.int64) warn where they
wrap: pass arrays.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; constants and known
answers from Random123. numpy's own Philox is 4x64, another generator.
"""

from typing import Any

Ints = Any
"""int64: a numpy array, a torch tensor, or a Python integer."""

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

CROP, FLIP, OPERATION, ERASE, NOISE, MIX, ORDER, BLOCKS, SUBSET, JITTER, DEPTH, DROPOUT = range(1, 13)
"""Streams: the counter's third word. Their numbers decide what a seed means and never change."""


def philox(c0: Ints, c1: Ints, c2: Ints, c3: Ints, k0: Ints, k1: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Return the four 32-bit words of Philox4x32-10 at a counter (c0 to c3) under a key (k0, k1).

    All arguments are in [0, 2^32) and broadcast against each other; the words have the broadcast shape.
    """
    for _ in range(ROUNDS):
        p0 = c0 * MULTIPLIERS[0]
        p1 = c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0 = (k0 + WEYL[0]) & MASK
        k1 = (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def bounded(word: Ints, count: Ints) -> Ints:
    """Return an integer in [0, count) from a 32-bit word, for 1 <= count <= 2^31.

    The bias is below count / 2^32: some results have one word more than others.
    """
    return (word * count) >> 32


def sort_key(high: Ints, low: Ints) -> Ints:
    """Return a 63-bit sort key from two words; one bit short of 64 so that it is never negative in int64."""
    return ((high >> 1) << 32) | low


def threshold(probability: float) -> int:
    """Return t such that `word < t` has the probability, to 2^-33: 0 never happens, 1 always does."""
    return round(probability * 2**32)


def key_words(seed: int) -> tuple[int, int]:
    """Return the key of a seed in [0, 2^63): its low and its high word."""
    return seed & MASK, seed >> 32
