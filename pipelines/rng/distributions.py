"""Fixed-point maps from uniform words to the distributions of the recipe, exact on every machine.

Qn is an integer that stands for itself / 2^n. The maps take int64 numpy arrays; `normal`, which erasing's noise needs
on the device, takes torch tensors as well. Floating point appears only as + - * / and square roots on float64, which
IEEE 754 rounds alike everywhere: logarithm and exponential are summed here, because those of libm and of numpy differ
in the last bit from machine to machine.

A quantile table holds half of a symmetric distribution: 4,097 knots at even steps of probability, from the center
outwards, joined by straight lines. The farthest cell has 2^-12 of the probability (both tails together); inside it a
straight line stands for the tail.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import numpy as np

from pipelines.rng.philox import Ints

CELL_BITS = 12
CELLS = 1 << CELL_BITS
"""Cells of half a quantile table."""
REST_BITS = 31 - CELL_BITS

EXP2_BITS = 8
EXP2_UNIT = 24
"""exp2 takes Q24."""
EXP2_RANGE = 3
"""exp2 takes arguments in [-3, 3]."""
EXP2_RESULT = 28
"""exp2 gives Q28."""
HALF = 1 << 29
"""One half in the Q30 of Beta."""
LN2 = 0.6931471805599453


def shift_half_even(value: Ints, bits: int) -> Ints:
    """Return value / 2^bits rounded as Python's round() does: to the nearest integer, ties to the even one."""
    half = 1 << (bits - 1)
    nearest = (value + half) >> bits
    tie = (value & ((1 << bits) - 1)) == half
    return nearest - tie * (nearest & 1)


def isqrt(value: np.ndarray) -> np.ndarray:
    """Return floor(sqrt(value)), exactly, for int64 0 <= value < 2^62: the float64 root may be one too large."""
    root = np.sqrt(value).astype(np.int64)
    return root - (root * root > value)


@lru_cache(maxsize=1)
def exp2_table() -> np.ndarray:
    """Return floor(2^(i/256) x 2^30) for i in 0..256, int64 [257], exactly: eight nested integer square roots."""
    values = []
    for i in range((1 << EXP2_BITS) + 1):
        power = 1 << (i + (30 << EXP2_BITS))
        for _ in range(EXP2_BITS):
            power = math.isqrt(power)
        values.append(power)
    return _frozen(np.array(values, np.int64))


def exp2(exponent: Ints, table: Ints) -> Ints:
    """Return 2^exponent in Q28 for an exponent in Q24, within [-3, 3]; `table` is `exp2_table()`.

    Straight lines between the knots: at most 1e-6 too large, relatively.
    """
    fraction = exponent & ((1 << EXP2_UNIT) - 1)
    rest_bits = EXP2_UNIT - EXP2_BITS
    cell = fraction >> rest_bits
    low = table[cell]
    value = low + (((table[cell + 1] - low) * (fraction & ((1 << rest_bits) - 1))) >> rest_bits)
    return (value << 1) >> (EXP2_RANGE - (exponent >> EXP2_UNIT))


def normal(word: Ints, table: Ints) -> Ints:
    """Return a standard normal number in Q16 from a 32-bit word; `table` is `normal_table()`.

    The word's top bit is the sign. Nothing lies beyond the table's last knot, 4.13.
    """
    return distance_from_center(word, table) * (1 - (word >> 31) * 2)


def beta(word: Ints, table: Ints) -> Ints:
    """Return a Beta(a, a) number in Q30, in [0, 2^30), from a 32-bit word; `table` is `beta_table(a)`.

    The lower half mirrors the upper one as 2^30 - 1 - x, so Beta(1, 1) takes every value equally often.
    """
    distance = distance_from_center(word, table)
    return np.where(word >> 31, HALF - 1 - distance, HALF + distance)


def distance_from_center(word: Ints, table: Ints) -> Ints:
    """Return how far from the center the word's lower 31 bits lie, in the table's unit."""
    cell = (word >> REST_BITS) & (CELLS - 1)
    low = table[cell]
    return low + (((table[cell + 1] - low) * (word & ((1 << REST_BITS) - 1))) >> REST_BITS)


@lru_cache(maxsize=1)
def normal_table() -> np.ndarray:
    """Return the quantiles of |N(0, 1)| in Q16, int64 [4097]: knot i is the quantile at i / 4096, rounded to Q16.

    The last one, infinite in truth, is placed so that what is drawn from the table has variance one: at 4.13.
    """
    table = _invert(lambda knot: 2 * _normal_integral((knot + 0.5) / 65536), 19)
    return _frozen(_close(table, variance=65536.0**2))


@lru_cache(maxsize=8)
def beta_table(a: float) -> np.ndarray:
    """Return the quantiles of |X - 1/2| in Q30 for X ~ Beta(a, a), int64 [4097], for any a > 0, rounded to Q30.

    The last knot is placed so that the variance is right, at most at 1/2: it is 1/2 for a <= 1, but for a large a a
    straight line from the last but one to 1/2 would weigh more than all the rest. Beta(1, 1) is exactly uniform.
    """
    center = _beta_series(np.array([0.5]), a)

    def inside(knot: np.ndarray) -> np.ndarray:
        x = (HALF - knot - 0.5) / (1 << 30)  # the end of the lower tail, whose probability is half of what is outside
        return 1 - _exp(a * _log(4 * x * (1 - x))) * (_beta_series(x, a) / center)

    table = _invert(inside, 29)
    table = _close(table, variance=4.0**29 / (2 * a + 1))
    return _frozen(np.minimum(table, HALF))


def _close(table: np.ndarray, variance: float) -> np.ndarray:
    """Place the last knot so that a number drawn from the table, with either sign, has the variance.

    Between knots a and b the mean square is (a^2 + ab + b^2) / 3, so the last knot solves a quadratic equation.
    """
    knots = [float(knot) for knot in table[:-1]]
    squares = math.fsum((a * a + a * b + b * b) / 3 for a, b in pairwise(knots))
    last = knots[-1]
    wanted = 3 * max(CELLS * variance - squares, last * last)
    table[-1] = round((math.sqrt(4 * wanted - 3 * last * last) - last) / 2)
    return table


def _invert(cdf: Callable[[np.ndarray], np.ndarray], bits: int) -> np.ndarray:
    """Return for each i in 0..4096 how many integers k in [0, 2^bits) have cdf(k) <= i / 4096, by bisection.

    With a cdf taken at k + 1/2 that is the quantile rounded to the nearest integer. The first is 0 by symmetry.
    """
    probability = np.arange(CELLS + 1) / CELLS
    table = np.zeros(CELLS + 1, np.int64)
    for bit in reversed(range(bits)):
        table += (cdf((table + (1 << bit) - 1).astype(np.float64)) <= probability).astype(np.int64) << bit
    return table


def _normal_integral(z: np.ndarray) -> np.ndarray:
    """Return the integral of the standard normal density from 0 to z: density x sum of z^(2n+1) / (2n+1)!!."""
    term = z.copy()
    total = z.copy()
    n = 1
    while term.max() > 1e-18 * total.max():
        n += 2
        term = term * (z * z) / n
        total = total + term
    return total * _exp(z * z * -0.5) * 0.3989422804014327  # 1 / sqrt(2 pi)


def _beta_series(x: np.ndarray, a: float) -> np.ndarray:
    """Return 2F1(2a, 1; a + 1; x), the incomplete Beta function over x^a (1 - x)^a / a, for x in [0, 1/2].

    All terms are positive, so nothing cancels. Source: NIST DLMF 8.17.8.
    """
    term = np.ones_like(x)
    total = np.ones_like(x)
    n = 0
    while term.max() > 1e-18:
        term = term * x * ((2 * a + n) / (a + 1 + n))
        total = total + term
        n += 1
    return total


def _log(x: np.ndarray) -> np.ndarray:
    """Return the natural logarithm of x > 0 to about 1e-16, by 2 artanh((m - 1) / (m + 1)) of the mantissa."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < 0.7071067811865476
    mantissa = np.where(small, mantissa * 2, mantissa)
    s = (mantissa - 1) / (mantissa + 1)
    total = np.zeros_like(x)
    for n in range(25, 0, -2):
        total = total * (s * s) + 1 / n
    return 2 * s * total + (exponent - small) * LN2


def _exp(x: np.ndarray) -> np.ndarray:
    """Return e^x for x <= 0 to about 1e-16 |x|, by Taylor's series within ln 2 / 2 of a power of two."""
    x = np.maximum(x, -700.0)
    exponent = np.floor(x / LN2 + 0.5)
    rest = x - exponent * LN2
    total = np.ones_like(x)
    for n in range(18, 0, -1):
        total = total * rest / n + 1
    return np.ldexp(total, exponent.astype(np.int32))


def _frozen(table: np.ndarray) -> np.ndarray:
    table.flags.writeable = False
    return table
