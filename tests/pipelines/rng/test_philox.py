"""Philox and the fixed-point maps: known answers, equal bits everywhere, and the distributions they stand for."""

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipelines.rng import distributions, philox

KNOWN_ANSWERS = [  # Random123's kat_vectors, philox4x32 10: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
BACKENDS = {
    "python": lambda *words: philox.philox(*words),
    "numpy": lambda *words: philox.philox(*(np.array([word]) for word in words)),
    "torch": lambda *words: philox.philox(*(torch.tensor([word]) for word in words)),
}


def plain(words) -> tuple[int, ...]:
    return tuple(int(np.asarray(word).item()) for word in words)


@pytest.fixture(scope="module")
def words() -> np.ndarray:
    """100,000 words of one counter after the other, int64."""
    return np.concatenate(philox.philox(np.arange(25_000), 0, 99, 0, 1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers_of_random123(backend, counter, key, answer):
    assert plain(BACKENDS[backend](*counter, *key)) == answer


word32 = st.integers(0, 2**32 - 1)


@given(st.tuples(*[word32] * 6))
def test_any_counter_gives_the_same_words_everywhere(arguments):
    drawn = {plain(draw(*arguments)) for draw in BACKENDS.values()}
    assert len(drawn) == 1


def test_counters_broadcast():
    together = philox.philox(np.arange(5), 0, 1, np.arange(3)[:, None], 7, 8)
    assert together[0].shape == (3, 5)
    assert together[0][2, 4] == philox.philox(4, 0, 1, 2, 7, 8)[0]


def test_words_are_uniform_and_independent_between_streams(words):
    assert stats.kstest(words / 2**32, "uniform").pvalue > 1e-3
    other = np.concatenate(philox.philox(np.arange(25_000), 0, 100, 0, 1, 2))
    assert abs(np.corrcoef(words, other)[0, 1]) < 0.015


def test_streams_have_numbers_of_their_own_that_never_change():
    names = ("CROP", "FLIP", "OPERATION", "ERASE", "NOISE", "MIX", "ORDER", "BLOCKS", "SUBSET", "JITTER",
             "DEPTH", "DROPOUT")  # fmt: skip
    assert [getattr(philox, name) for name in names] == list(range(1, 13))


def test_bounded_draws_are_even_and_stay_inside(words):
    for count in (1, 7, 2**31):
        drawn = philox.bounded(words, count)
        assert drawn.min() >= 0
        assert drawn.max() < count
    assert philox.bounded(philox.MASK, 2**31) == 2**31 - 1
    assert stats.chisquare(np.bincount(philox.bounded(words, 7))).pvalue > 1e-3


def test_probabilities_at_their_ends_are_certain():
    assert not np.any(np.array([0, 1]) < philox.threshold(0))
    assert philox.threshold(1) > philox.MASK
    assert philox.threshold(0.25) == 2**30


def test_sort_keys_keep_the_order_of_the_words_and_are_never_negative():
    high, low = np.array([0, 2, 2, 2**32 - 1]), np.array([9, 0, 1, 2**32 - 1])
    keys = philox.sort_key(high, low)
    assert (np.diff(keys) > 0).all()
    assert keys.min() >= 0


def test_a_seed_of_63_bits_makes_two_words():
    low, high = philox.key_words(2**63 - 2)
    assert high << 32 | low == 2**63 - 2
    assert max(low, high) < 2**32


@given(
    st.integers(0, 2**62 - 1) | st.integers(0, 2**31 - 1).flatmap(lambda r: st.sampled_from([r * r, max(r * r - 1, 0)]))
)
def test_integer_square_root_is_exact(value):
    assert distributions.isqrt(np.array([value]))[0] == math.isqrt(value)


@given(st.integers(-(2**40), 2**40), st.integers(1, 20))
def test_rounding_is_that_of_python(value, bits):
    assert distributions.shift_half_even(value, bits) == round(value / 2**bits)
    assert distributions.shift_half_even(np.array([value]), bits)[0] == round(value / 2**bits)


def test_powers_of_two():
    table = distributions.exp2_table()
    exact = [math.isqrt(math.isqrt(2 ** (i // 64 + 120))) for i in range(0, 257, 64)]  # 2^(1/4): two square roots
    assert table[::64].tolist() == exact
    exponent = np.concatenate([np.arange(-3 << 24, 3 << 24, 997), [3 << 24]])
    error = distributions.exp2(exponent, table) / 2**28 / 2.0 ** (exponent / 2**24) - 1
    assert error.min() > -1e-7
    assert error.max() < 1e-6
    assert (np.diff(distributions.exp2(np.arange(-(1 << 20), 1 << 20), table)) >= 0).all()


def digest(table: np.ndarray) -> str:
    return hashlib.blake2b(table.astype("<i8").tobytes(), digest_size=8).hexdigest()


def test_the_tables_of_the_recipe_never_change():
    """A changed table changes what every seed means: old caches and checkpoints would no longer fit."""
    assert digest(distributions.exp2_table()) == "af77a14a4a2ecb7c"
    assert digest(distributions.normal_table()) == "7e381a69bba54109"
    assert digest(distributions.beta_table(0.8)) == "912a722043d1ce2c"


def test_normal_quantiles_are_those_of_scipy(words):
    table = distributions.normal_table()
    exact = stats.norm.ppf(0.5 + np.arange(distributions.CELLS) / (2 * distributions.CELLS)) * 65536
    assert np.abs(table[:-1] - exact).max() <= 0.501
    drawn = distributions.normal(words, table) / 65536
    assert stats.kstest(drawn, "norm").pvalue > 1e-3


def test_the_normal_table_has_variance_one():
    every_cell = (np.arange(1 << 20) << 11) + (1 << 10)  # the middle of every 2048th part of the positive half
    squares = (distributions.normal(every_cell, distributions.normal_table()) / 65536) ** 2
    assert squares.mean() == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("a", [0.05, 0.3, 0.8, 2.0, 40.0])
def test_beta_quantiles_are_those_of_scipy(a, words):
    table = distributions.beta_table(a)
    exact = (0.5 - stats.beta.ppf(0.5 - np.arange(distributions.CELLS) / (2 * distributions.CELLS), a, a)) * 2**30
    assert np.abs(table[:-1] - exact).max() <= 1.001
    drawn = distributions.beta(words, table) / 2**30
    assert drawn.min() >= 0
    assert drawn.max() < 1
    points = np.linspace(0.001, 0.999, 999)  # inside: for a = .05 a fifth of the distribution lies below 2^-30
    assert np.abs((np.sort(drawn).searchsorted(points) / drawn.size) - stats.beta.cdf(points, a, a)).max() < 0.006


def test_beta_1_1_is_exactly_uniform(words):
    table = distributions.beta_table(1.0)
    assert (table == np.arange(distributions.CELLS + 1) << 17).all()
    some = np.concatenate([words, [0, 2**31 - 1, 2**31, 2**32 - 1]])
    drawn = distributions.beta(some, table)
    upper = some < 2**31
    assert (drawn[upper] == 2**29 + (some[upper] >> 2)).all()
    assert (drawn[~upper] == 2**29 - 1 - ((some[~upper] - 2**31) >> 2)).all()


def test_a_wide_beta_parameter_keeps_its_variance(words):
    drawn = distributions.beta(words, distributions.beta_table(1e4)) / 2**30
    assert drawn.std() == pytest.approx(stats.beta(1e4, 1e4).std(), rel=0.02)


@given(word32)
@settings(max_examples=50)
def test_normal_agrees_between_numpy_and_torch(word):
    table = distributions.normal_table()
    ours, theirs = (distributions.normal(make([word]), make(table)) for make in (np.array, torch.tensor))
    assert ours[0] == theirs.item()


def test_tables_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        distributions.normal_table()[0] = 1


def test_drawing_imports_neither_torch_nor_numba():
    program = "import sys, pipelines.rng.view_params; sys.exit(bool({'torch', 'numba', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
