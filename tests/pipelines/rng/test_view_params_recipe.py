"""What is drawn for flips, RandAugment, erasing and mixing has the recipe's distributions, and timm's."""

import itertools
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing

from pipelines.rng.policies import AUTOAUGMENT, FIRST_JITTER, OPERATIONS, RANDAUGMENT
from pipelines.rng.sampler import SamplerSpec, TrainSampler
from pipelines.rng.view_params import SLICES, draw_train
from pipelines.spec import AugmentSpec
from tests.helpers.view_specs import AUTO, DEIT, JITTER, draw, frequencies

# --- flips and operations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_happen_as_often_as_asked(probability):
    share = draw(replace(DEIT, flip=probability), 20_000).flip.mean()
    assert share == pytest.approx(probability, abs=0.012 if 0 < probability < 1 else 0)


def test_operations_follow_the_recipe():
    params = draw(DEIT, 40_000)
    assert OPERATIONS[0] == "none"
    assert RANDAUGMENT == 15
    applied = params.operation > 0
    assert applied.mean() == pytest.approx(0.5, abs=0.01)
    assert (~applied).all(1).mean() == pytest.approx(0.25, abs=0.01)
    assert stats.chisquare(np.bincount(params.operation[applied])[1:]).pvalue > 1e-3
    both = params.operation[applied.all(1)]
    assert stats.chi2_contingency(np.histogram2d(*both.T, bins=15)[0]).pvalue > 1e-3
    magnitudes = params.magnitude[applied]
    assert (magnitudes < 0).mean() == pytest.approx(0.5, abs=0.01)
    assert not params.magnitude[~applied].any()


def test_a_view_has_nothing_in_one_draw_that_tells_another():
    params = draw(replace(DEIT, erasing=0.5), 40_000)
    area = params.crop_box[:, 2] * params.crop_box[:, 3]
    applied, which, magnitude = params.operation > 0, params.operation % 3, params.magnitude
    numbers = [area, params.crop_box[:, 0], params.flip, params.erase[:, 2] > 0, *applied.T, *which.T, *magnitude.T]
    between = np.corrcoef(numbers)
    stream = np.array([0, 0, 1, 2, 3, 4, 3, 4, 3, 4])  # what one stream and slot draw may well be related
    unrelated = stream[:, None] != stream
    assert np.abs(between[unrelated]).max() < 0.025  # five standard deviations


def test_magnitudes_are_normal_and_clipped():
    params = draw(DEIT, 40_000)
    sizes = np.abs(params.magnitude[params.operation > 0]) / 65536
    assert (sizes == 10).mean() == pytest.approx(stats.norm.sf(2), abs=0.004)
    unclipped = sizes[sizes < 10]
    assert stats.kstest(unclipped, stats.truncnorm(-18, 2, 9, 0.5).cdf).pvalue > 1e-3
    low = draw(replace(DEIT, magnitude=0.0), 4000)
    sizes = np.abs(low.magnitude[low.operation > 0])
    assert (sizes == 0).mean() == pytest.approx(0.5, abs=0.04)
    fixed_size = draw(replace(DEIT, magnitude_std=0.0), 100)
    assert set(np.abs(fixed_size.magnitude[fixed_size.operation > 0]).tolist()) == {9 << 16}


def test_operations_can_be_switched_off():
    off = draw(replace(DEIT, policy="none", color_jitter=0.0), 1000)
    for name in ("operation", "magnitude", "jitter", "factor"):
        assert not off[name].any()
    assert draw(replace(DEIT, operation_probability=1.0), 1000).operation.all()


def test_sub_policies_follow_the_policy():
    """Every pair of steps as often as the policy says, over all outcomes of both probabilities and signs."""
    params = draw(AUTO, 40_000)
    seen = Counter(map(tuple, np.hstack([params.operation, params.magnitude]).tolist()))
    expected = Counter()
    for sub_policy in AUTOAUGMENT:
        steps = []
        for name, chance, level in sub_policy:
            index, magnitude = OPERATIONS.index(name), level * 65536
            steps.append([(0, 0, 1 - chance), (index, magnitude, chance / 2), (index, -magnitude, chance / 2)])
        for first, second in itertools.product(*steps):
            outcome = first[0], second[0], first[1], second[1]
            expected[outcome] += len(params) / len(AUTOAUGMENT) * first[2] * second[2]
    expected = +expected
    assert set(seen) <= set(expected)
    assert min(expected.values()) > 5
    assert len(expected) > 100
    assert stats.chisquare([seen[outcome] for outcome in expected], list(expected.values())).pvalue > 1e-3


def test_jitter_is_torchvisions():
    params = draw(JITTER, 40_000)
    orders, counts = np.unique(params.jitter, axis=0, return_counts=True)
    names = [OPERATIONS[index] for index in range(FIRST_JITTER, FIRST_JITTER + 3)]
    assert names == ["JitterBrightness", "JitterContrast", "JitterSaturation"]
    assert len(orders) == 6
    assert (np.sort(orders, axis=1) == FIRST_JITTER + np.arange(3)).all()
    assert stats.chisquare(counts).pvalue > 1e-3
    by_name = np.take_along_axis(params.factor, params.jitter.argsort(1), axis=1) / 65536
    for factors in by_name.T:
        assert stats.kstest(factors, stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef([*by_name.T, *params.jitter[:, :1].T]) - np.eye(4)).max() < 0.025


def test_jitter_gives_way_to_a_policy():
    """timm's rule: color jitter is for runs without RandAugment and AutoAugment."""
    assert not draw(replace(JITTER, policy="randaugment"), 100).jitter.any()
    assert not draw(replace(JITTER, policy="autoaugment"), 100).jitter.any()
    assert draw(replace(JITTER, color_jitter=1.0), 4000).factor.min() < 0.01 * 65536


# --- erasing ---------------------------------------------------------------------------------------------------------


def timm_boxes(spec: AugmentSpec, count: int) -> np.ndarray:
    """Return boxes of timm's RandomErasing, [n, 4], read from where it changed zeros."""
    eraser = RandomErasing(1.0, *spec.erasing_area, *spec.erasing_ratio, mode="pixel", device="cpu")
    boxes = []
    for _ in range(count):
        image = torch.zeros(1, spec.size, spec.size)
        eraser(image)
        y, x = (image[0].any(axis).nonzero()[:, 0] for axis in (1, 0))
        boxes.append([y[0], x[0], len(y), len(x)] if len(y) else [0, 0, 0, 0])
    return np.array(boxes)


def test_erased_boxes_are_distributed_as_those_of_timm():
    random.seed(1)
    torch.manual_seed(1)
    spec = replace(DEIT, size=64, erasing=1.0)
    ours, theirs = draw(spec, 10_000).erase, timm_boxes(spec, 1500)
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert stats.ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3


def test_boxes_in_a_tiny_output_are_as_frequent_as_those_of_timm():
    random.seed(2)
    torch.manual_seed(2)
    spec = replace(DEIT, size=8, erasing=1.0, erasing_area=(0.3, 1.0), erasing_ratio=(0.8, 3.0))
    assert frequencies(draw(spec, 40_000).erase, timm_boxes(spec, 8000)) > 1e-3


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_erasing_happens_as_often_as_asked(probability):
    erased = draw(replace(DEIT, erasing=probability), 20_000).erase[:, 2] > 0
    assert erased.mean() == pytest.approx(probability, abs=0.012 if 0 < probability < 1 else 0)


@given(st.integers(0, 2**62), st.sampled_from([8, 32, 224, 4096]), st.floats(0.001, 0.9))
@settings(deadline=None, max_examples=50)
def test_erased_boxes_lie_inside_the_output(seed, size, area):
    spec = replace(DEIT, seed=seed, size=size, erasing=1.0, erasing_area=(area, 1.0))
    top, left, h, w = draw(spec, 50).erase.T
    assert ((top >= 0) & (left >= 0) & (top + h <= size) & (left + w <= size)).all()
    assert ((h > 0) == (w > 0)).all()
    assert not (top + left)[h == 0].any()


def test_boxes_that_never_fit_are_given_up():
    spec = replace(DEIT, erasing=1.0, erasing_area=(1.0, 1.0), erasing_ratio=(1.0, 1.0))
    assert not draw(spec, 200).erase.any()


# --- mixing ----------------------------------------------------------------------------------------------------------


def test_rows_of_a_group_share_their_mixing_and_groups_differ():
    params = draw(DEIT, 64 * 40, group=64)
    mixing = params.table[:, SLICES["lam"].start : SLICES["cutmix_bbox"].stop].reshape(40, 64, 5)
    assert (mixing == mixing[:, :1]).all()
    assert len(np.unique(mixing[:, 0], axis=0)) > 30


def test_modes_are_mixed_as_asked():
    cut = draw(DEIT, 20_000).cutmix_bbox[::2, 2] > 0
    assert cut.mean() == pytest.approx(0.5, abs=0.02)
    assert (draw(replace(DEIT, mixup=0.0), 400).lam < 65536).mean() > 0.9
    assert not draw(replace(DEIT, cutmix=0.0), 400).cutmix_bbox.any()
    assert (draw(replace(DEIT, cutmix=0.0, mixup=0.0), 400).lam == 65536).all()
    assert (draw(replace(DEIT, mix_probability=0.0), 400).lam == 65536).all()
    half = draw(replace(DEIT, mix_probability=0.5, cutmix=0.0), 8000).lam[::2] < 65536
    assert half.mean() == pytest.approx(0.5, abs=0.035)


@pytest.mark.parametrize(("repeats", "first_unmixed"), [(1, 4), (3, 6)])
def test_nothing_is_mixed_from_an_epoch_on_and_nothing_else_changes(repeats, first_unmixed):
    spec = replace(DEIT, mixup_off_epoch=4, repeats=repeats)
    sampler = TrainSampler(SamplerSpec(samples=120, batch=8, seed=1, repeats=repeats, group=4))
    sizes = np.full(8, 400), np.full(8, 500)
    for epoch in range(8):
        rows = sampler.rows(epoch, 1)
        found, plain = draw_train(spec, rows, *sizes), draw_train(replace(spec, mixup_off_epoch=0), rows, *sizes)
        mixing = SLICES["lam"].start, SLICES["cutmix_bbox"].stop
        assert (found.table[:, : mixing[0]] == plain.table[:, : mixing[0]]).all()
        assert (found.table[:, mixing[1] :] == plain.table[:, mixing[1] :]).all()
        if epoch < first_unmixed:
            assert (found.table == plain.table).all()
        else:
            assert (found.lam == 65536).all()
            assert not found.cutmix_bbox.any()


def test_mixup_shares_are_beta():
    shares = draw(replace(DEIT, cutmix=0.0), 40_000).lam[::2] / 65536
    assert stats.kstest(shares, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def test_cutmix_boxes_and_shares_are_distributed_as_those_of_timm():
    rng = np.random.default_rng(0)
    np.random.seed(0)
    params = draw(replace(DEIT, mixup=0.0), 20_000)
    drawn = [cutmix_bbox_and_lam((224, 224), lam) for lam in rng.beta(1, 1, 4000)]
    theirs = np.array([(y, x, y1 - y, x1 - x) if y1 - y and x1 - x else (0,) * 4 for (y, y1, x, x1), _ in drawn])
    ours = params.cutmix_bbox[::2]
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert stats.ks_2samp(params.lam[::2] / 65536, [share for _, share in drawn]).pvalue > 1e-3


def test_cutmix_boxes_in_a_tiny_output_are_as_frequent_as_those_of_timm():
    np.random.seed(1)
    drawn = [cutmix_bbox_and_lam((8, 8), lam)[0] for lam in np.random.default_rng(1).beta(1, 1, 20_000)]
    theirs = np.array([(y, x, y1 - y, x1 - x) if y1 > y and x1 > x else (0,) * 4 for y, y1, x, x1 in drawn])
    ours = draw(replace(DEIT, size=8, mixup=0.0), 80_000).cutmix_bbox[::2]
    assert frequencies(ours, theirs) > 1e-3


@given(st.integers(0, 2**62), st.sampled_from([8, 33, 224, 4096]))
@settings(deadline=None, max_examples=30)
def test_cutmix_shares_are_what_the_box_leaves(seed, size):
    params = draw(replace(DEIT, seed=seed, size=size, mixup=0.0), 200)
    top, left, h, w = params.cutmix_bbox.astype(np.int64).T
    assert ((top >= 0) & (left >= 0) & (top + h <= size) & (left + w <= size)).all()
    assert np.abs(params.lam / 65536 - (1 - h * w / size**2)).max() <= 2**-17
    assert ((params.lam == 65536) <= (h * w <= size**2 / 65536)).all()
