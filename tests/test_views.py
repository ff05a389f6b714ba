"""Drawn views: equal bits in numpy, torch, numba and Python, the recipe's distributions, and the geometry's rules."""

import hashlib
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize

from pipelines import draws
from pipelines.errors import Failure, Mistake
from pipelines.packed import pack, tables_for
from pipelines.sampler import EvalSampler, Rows, TrainSampler
from pipelines.spec import AugmentSpec
from pipelines.views import COLUMNS, OPERATIONS, SLICES, ViewParams, draw_eval, draw_train

DEIT = AugmentSpec(seed=2**62 + 12345)
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


# --- the same integers everywhere ------------------------------------------------------------------------------------

side = st.integers(1, 65535) | st.sampled_from([1, 2, 3, 32, 223, 224, 225, 65534, 65535])
index = st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**23 - 1))


def everywhere(name, numbers, *rest) -> set[tuple[int, ...]]:
    """Return what a draw gives in numpy, torch, numba and Python: one element where they agree."""
    on_torch = [item.on("cpu") if isinstance(item, type(tables_for(DEIT))) else item for item in rest]
    function = getattr(draws, name)
    results = (
        function(*(np.array([number]) for number in numbers), *rest),
        function(*(torch.tensor([number]) for number in numbers), *on_torch),
        getattr(draws.compiled(), name)(*numbers, *rest),
        function(*numbers, *rest),
    )
    flat = (result if isinstance(result, tuple) else (result,) for result in results)
    return {tuple(int(np.asarray(value).item()) for value in result) for result in flat}


@given(index, side, side, st.sampled_from([DEIT, HARD, SMALL]), st.booleans())
@settings(deadline=None, max_examples=100)
def test_windows_agree_everywhere_and_with_the_table(index, height, width, spec, train):
    sample, view = index
    packed, tables = pack(spec, train), tables_for(spec)
    drawn = everywhere("window", (sample, view, height, width), packed, tables)
    function = draw_train if train else draw_eval
    table = function(spec, rows_of([sample], view), np.array([height]), np.array([width])).table
    start = SLICES["window"].start
    assert drawn == {tuple(table[0, start : start + 8].tolist())}


@given(index, st.sampled_from([DEIT, HARD, SMALL]))
@settings(deadline=None, max_examples=100)
def test_everything_else_agrees_everywhere_and_with_the_table(index, spec):
    sample, view = index
    packed, tables = pack(spec), tables_for(spec)
    params = draw_train(spec, rows_of([sample], view), np.array([300]), np.array([300]))
    assert everywhere("flip", index, packed) == {(params.flip[0],)}
    for slot in (0, 1):
        drawn = everywhere("operation", index, slot, packed, tables)
        assert drawn == {(params.operation[0, slot], params.magnitude[0, slot])}
    assert everywhere("erase_box", index, packed, tables) == {tuple(params.erase[0].tolist())}
    group = Rows(**{**vars(rows_of([0])), "groups": np.array([sample]), "passes": np.array([view])})
    mixed = draw_train(spec, group, np.array([300]), np.array([300]))
    assert everywhere("mix", index, packed, tables) == {(mixed.share[0], *mixed.box[0].tolist())}


def test_trying_one_after_the_other_gives_the_same_boxes():
    """The table's short cut against all ten tries in a row, where many are needed and some are in vain."""
    rows, packed, tables = rows_of(np.arange(3000)), pack(HARD), tables_for(HARD)
    sides = np.full(3000, 300), np.full(3000, 500)
    params = draw_train(HARD, rows, *sides)
    window = draws.window(rows.samples, rows.views, *sides, packed, tables)[:4]
    assert (np.stack(window, 1) == params.window).all()
    assert (np.stack(draws.erase_box(rows.samples, rows.views, packed, tables), 1) == params.erase).all()
    assert 0 < (params.erase[:, 2] == 0).mean() < 0.9


@given(index, st.integers(0, 2**24))
@settings(deadline=None, max_examples=50)
def test_noise_agrees_everywhere(index, pixel):
    packed, table = pack(DEIT), tables_for(DEIT).normal
    numbers = (*index, pixel)
    results = [
        draws.erase_noise(*(np.array([number]) for number in numbers), packed, table),
        draws.erase_noise(*(torch.tensor([number]) for number in numbers), packed, torch.tensor(table)),
        draws.compiled().erase_noise(*numbers, packed, table),
    ]
    assert len({tuple(int(np.asarray(value).item()) for value in result) for result in results}) == 1


@given(st.integers(0, 2**62), st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=30)
def test_a_row_does_not_depend_on_the_rest_of_its_batch(seed, count, data):
    spec = replace(HARD, seed=seed)
    heights, widths = (np.array(data.draw(st.lists(side, min_size=count, max_size=count))) for _ in range(2))
    rows = rows_of(np.arange(count) * 7, views=3, group=1)
    whole = draw_train(spec, rows, heights, widths).table
    pick = data.draw(st.integers(0, count - 1))
    one = Rows(**{name: values[pick : pick + 1] for name, values in vars(rows).items()})
    assert (draw_train(spec, one, heights[pick : pick + 1], widths[pick : pick + 1]).table == whole[pick]).all()


def test_every_part_of_the_key_matters():
    base = draw(DEIT, 64)
    for other in (
        draw(replace(DEIT, seed=1), 64),
        draw(replace(DEIT, seed=DEIT.seed - 2**61), 64),
        draw(DEIT, 64, views=1),
    ):
        assert (other.window == base.window).all(1).mean() < 0.1
        assert (other.operation == base.operation).all(1).mean() < 0.6
    assert (draw(DEIT, 64, views=1).share == base.share).all()  # mixing is the group's own ...
    assert (draw(DEIT, 64, number=1).share != base.share).any()
    assert (draw(DEIT, 64, number=1).window == base.window).all()  # ... and nothing else is


def test_the_draws_of_a_seed_never_change():
    """Changed draws change what every seed means: old teacher caches would no longer fit their views."""
    rows = TrainSampler(100, 8, DEIT.seed, repeats=2, group=4).rows(3, 1)
    drawn = draw_train(DEIT, rows, np.full(8, 375), np.full(8, 500)).table
    assert hashlib.blake2b(drawn.astype("<i4").tobytes(), digest_size=8).hexdigest() == "34499194a5a784ed"


# --- the table -------------------------------------------------------------------------------------------------------


def test_columns_are_views_of_the_table():
    params = ViewParams(np.arange(50, dtype=np.int32).reshape(2, 25))
    assert len(params) == 2
    assert sum(COLUMNS.values()) == 25
    for name, width in COLUMNS.items():
        column = getattr(params, name)
        assert column.shape == ((2,) if width == 1 else (2, width))
        assert np.shares_memory(column, params.table)
        assert (params[name] == column).all()
    joined = np.concatenate([params[name].reshape(2, -1) for name in COLUMNS], 1)
    assert (joined == params.table).all()


def test_the_table_is_int32_and_names_its_rows():
    rows = rows_of([5, 9, 2, 7], views=11)
    params = draw_train(DEIT, rows, np.full(4, 50), np.full(4, 60))
    assert params.table.dtype == np.int32
    assert params.sample.tolist() == [5, 9, 2, 7]
    assert params.view.tolist() == [11] * 4
    assert params.partner.tolist() == [1, 0, 3, 2]


def test_an_empty_batch_is_an_empty_table():
    none = np.zeros(0, np.int64)
    assert len(draw_train(DEIT, rows_of(none), none, none)) == 0


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 65536)])
def test_sizes_out_of_range_are_refused(height, width):
    with pytest.raises(Failure, match="1 to 65535"):
        draw(DEIT, 2, height, width)


@pytest.mark.parametrize("change", [{"ratio": (0.001, 2.0)}, {"erasing_ratio": (0.5, 65.0)}, {"magnitude_std": 1e9}])
def test_specs_that_do_not_fit_the_integers_are_refused(change):
    with pytest.raises(Mistake, match=f"augment.{next(iter(change))}"):
        pack(replace(DEIT, **change))


# --- windows ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**62), side, side, st.sampled_from([DEIT, HARD]))
@settings(deadline=None, max_examples=100)
def test_random_windows_lie_inside_the_image(seed, height, width, spec):
    params = draw(replace(spec, seed=seed), 20, height, width)
    top, left, h, w = params.window.astype(np.int64).T
    assert min(top.min(), left.min()) >= 0
    assert min(h.min(), w.min()) >= 1
    assert ((top + h <= height) & (left + w <= width)).all()
    assert (params.resized == spec.size).all()
    assert not params.offset.any()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (60, 47)])
def test_random_windows_are_distributed_as_those_of_torchvision(height, width):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    ours = draw(DEIT, 20_000, height, width).window
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    ratios = [windows[:, 3] / windows[:, 2] for windows in (ours, theirs)]
    areas = [windows[:, 3] * windows[:, 2] for windows in (ours, theirs)]
    assert stats.ks_2samp(*ratios).pvalue > 1e-3
    assert stats.ks_2samp(*areas).pvalue > 1e-3


def frequencies(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the p-value of two samples, [n, 4] each, having the same distribution over whole rows."""
    _, kind = np.unique(np.concatenate([ours, theirs]), axis=0, return_inverse=True)
    counts = [np.bincount(part, minlength=kind.max() + 1) for part in np.split(kind, [len(ours)])]
    common = np.sum(counts, 0) >= 20  # a test of frequencies wants some of each; the rest is counted as one
    table = [np.append(part[common], part[~common].sum() + 1) for part in counts]
    return stats.chi2_contingency(table).pvalue


@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 4.0)])
def test_windows_of_tiny_images_are_as_frequent_as_those_of_torchvision(ratio):
    """On a few pixels every inclusive bound, and which side is which, shows."""
    torch.manual_seed(2)
    image = torch.empty(3, 4, 5)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], list(ratio)) for _ in range(8000)])
    assert frequencies(draw(replace(DEIT, ratio=ratio), 40_000, 4, 5).window, theirs) > 1e-3


@given(side, side, st.sampled_from([(3 / 4, 4 / 3), (0.5, 1.5), (2 / 3, 2.0), (1.0, 1.0)]))
@settings(deadline=None)
def test_the_fallback_is_that_of_torchvision(height, width, ratio):
    image = torch.empty(1).expand(1, height, width)  # of a size, without its pixels
    theirs = RandomResizedCrop.get_params(image, [50.0, 51.0], list(ratio))  # an area that never fits
    spec = replace(DEIT, ratio=ratio)
    ours = draws.window_fallback(height, width, pack(spec))
    expected = (theirs[0], theirs[1], max(theirs[2], 1), max(theirs[3], 1))
    assert ours == expected


def test_long_images_fall_back_to_their_centre():
    assert (draw(DEIT, 100, 10, 4000).window == [0, 1993, 10, 13]).all()  # 8 % of the area is 57 pixels high


def test_padded_crops_reach_over_the_edge_evenly():
    params = draw(SMALL, 20_000, 32, 32)
    assert (params.window == [0, 0, 32, 32]).all()
    assert (params.resized == 32).all()
    for axis in (0, 1):
        values, counts = np.unique(params.offset[:, axis], return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert stats.chisquare(counts).pvalue > 1e-3


def test_padded_crops_scale_the_short_side():
    params = draw(SMALL, 4000, 97, 150)
    assert (params.window == [0, 0, 97, 150]).all()
    assert (params.resized == [32, int(32 * 150 / 97)]).all()
    assert np.unique(params.offset[:, 1]).tolist() == list(range(-4, 49 - 32 + 4 + 1))


@pytest.mark.parametrize("spec", [DEIT, replace(DEIT, size=384), replace(DEIT, eval_crop=0.9), SMALL])
@pytest.mark.parametrize(("height", "width"), [(500, 375), (333, 500), (1, 7), (224, 224), (32, 32), (257, 256)])
def test_evaluation_takes_the_centre_as_torchvision_does(spec, height, width):
    rows = EvalSampler(1, 1).rows(0, 0)
    params = draw_eval(spec, rows, np.array([height]), np.array([width]))
    image = Image.fromarray((np.arange(height * width) % 251).astype(np.uint8).reshape(height, width))
    short = int(spec.size / spec.eval_crop) if spec.crop == "resized" else spec.size
    resized = Resize(short)(image)
    (resized_h, resized_w), (top, left) = params.resized[0].tolist(), params.offset[0].tolist()
    assert (resized_h, resized_w) == (resized.height, resized.width)
    ours = np.asarray(resized)[top : top + spec.size, left : left + spec.size]
    assert (ours == np.asarray(CenterCrop(spec.size)(resized))).all()
    assert params.window[0].tolist() == [0, 0, height, width]


def test_evaluation_draws_nothing_else():
    params = draw_eval(DEIT, EvalSampler(3, 4).rows(0, 0), np.full(4, 300), np.full(4, 200))
    for name in ("flip", "operation", "magnitude", "erase", "box"):
        assert not params[name].any()
    assert (params.share == 65536).all()
    assert params.partner.tolist() == [0, 1, 2, 3]


# --- flips and operations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_happen_as_often_as_asked(probability):
    share = draw(replace(DEIT, flip=probability), 20_000).flip.mean()
    assert share == pytest.approx(probability, abs=0.012 if 0 < probability < 1 else 0)


def test_operations_follow_the_recipe():
    params = draw(DEIT, 40_000)
    assert OPERATIONS[0] == "none"
    assert len(OPERATIONS) == 16
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
    area = params.window[:, 2] * params.window[:, 3]
    applied, which, magnitude = params.operation > 0, params.operation % 3, params.magnitude
    numbers = [area, params.window[:, 0], params.flip, params.erase[:, 2] > 0, *applied.T, *which.T, *magnitude.T]
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
    assert not draw(replace(DEIT, policy="none"), 1000).operation.any()
    assert draw(replace(DEIT, operation_probability=1.0), 1000).operation.all()


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
    mixing = params.table[:, SLICES["share"].start :].reshape(40, 64, 5)
    assert (mixing == mixing[:, :1]).all()
    assert len(np.unique(mixing[:, 0], axis=0)) > 30


def test_modes_are_mixed_as_asked():
    cut = draw(DEIT, 20_000).box[::2, 2] > 0
    assert cut.mean() == pytest.approx(0.5, abs=0.02)
    assert (draw(replace(DEIT, mixup=0.0), 400).share < 65536).mean() > 0.9
    assert not draw(replace(DEIT, cutmix=0.0), 400).box.any()
    assert (draw(replace(DEIT, cutmix=0.0, mixup=0.0), 400).share == 65536).all()
    assert (draw(replace(DEIT, mix_probability=0.0), 400).share == 65536).all()
    half = draw(replace(DEIT, mix_probability=0.5, cutmix=0.0), 8000).share[::2] < 65536
    assert half.mean() == pytest.approx(0.5, abs=0.035)


def test_mixup_shares_are_beta():
    shares = draw(replace(DEIT, cutmix=0.0), 40_000).share[::2] / 65536
    assert stats.kstest(shares, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def test_cutmix_boxes_and_shares_are_distributed_as_those_of_timm():
    rng = np.random.default_rng(0)
    np.random.seed(0)
    params = draw(replace(DEIT, mixup=0.0), 20_000)
    drawn = [cutmix_bbox_and_lam((224, 224), lam) for lam in rng.beta(1, 1, 4000)]
    theirs = np.array([(y, x, y1 - y, x1 - x) if y1 - y and x1 - x else (0,) * 4 for (y, y1, x, x1), _ in drawn])
    ours = params.box[::2]
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert stats.ks_2samp(params.share[::2] / 65536, [share for _, share in drawn]).pvalue > 1e-3


def test_cutmix_boxes_in_a_tiny_output_are_as_frequent_as_those_of_timm():
    np.random.seed(1)
    drawn = [cutmix_bbox_and_lam((8, 8), lam)[0] for lam in np.random.default_rng(1).beta(1, 1, 20_000)]
    theirs = np.array([(y, x, y1 - y, x1 - x) if y1 > y and x1 > x else (0,) * 4 for y, y1, x, x1 in drawn])
    ours = draw(replace(DEIT, size=8, mixup=0.0), 80_000).box[::2]
    assert frequencies(ours, theirs) > 1e-3


@given(st.integers(0, 2**62), st.sampled_from([8, 33, 224, 4096]))
@settings(deadline=None, max_examples=30)
def test_cutmix_shares_are_what_the_box_leaves(seed, size):
    params = draw(replace(DEIT, seed=seed, size=size, mixup=0.0), 200)
    top, left, h, w = params.box.astype(np.int64).T
    assert ((top >= 0) & (left >= 0) & (top + h <= size) & (left + w <= size)).all()
    assert np.abs(params.share / 65536 - (1 - h * w / size**2)).max() <= 2**-17
    assert ((params.share == 65536) <= (h * w <= size**2 / 65536)).all()
