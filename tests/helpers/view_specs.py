"""Views drawn for tests: the specs they are drawn from, and how two samples are compared."""

from dataclasses import replace

import numpy as np
from scipy import stats

from pipelines.rng.sampler import Rows
from pipelines.rng.view_params import ViewParams, draw_train
from pipelines.spec import AugmentSpec

DEIT = AugmentSpec(seed=2**62 + 12345)
AUTO = replace(DEIT, policy="autoaugment")
JITTER = replace(DEIT, policy="none", color_jitter=0.4)
SMALL = AugmentSpec(size=32, crop="padded", seed=5)
HARD = replace(DEIT, scale=(0.3, 1.0), ratio=(0.5, 8.0), erasing=1.0, erasing_area=(0.3, 1.0))  # many tries in vain


def rows_of(samples, views=0, group=2, number=0) -> Rows:
    samples = np.asarray(samples, np.int64)
    place = np.arange(len(samples))
    return Rows(
        samples=samples,
        views=np.broadcast_to(np.int64(views), samples.shape) + 0 * samples,
        groups=place // group,
        passes=np.full(len(samples), number),
        partners=place // group * group + group - 1 - place % group,
        valid=np.ones(len(samples), np.bool_),
    )


def draw(spec, count, height=400, width=500, **kwargs) -> ViewParams:
    return draw_train(spec, rows_of(np.arange(count), **kwargs), np.full(count, height), np.full(count, width))


def frequencies(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the p-value of two samples, [n, 4] each, having the same distribution over whole rows."""
    _, kind = np.unique(np.concatenate([ours, theirs]), axis=0, return_inverse=True)
    counts = [np.bincount(part, minlength=kind.max() + 1) for part in np.split(kind, [len(ours)])]
    common = np.sum(counts, 0) >= 20  # a test of frequencies wants some of each; the rest is counted as one
    table = [np.append(part[common], part[~common].sum() + 1) for part in counts]
    return stats.chi2_contingency(table).pvalue
