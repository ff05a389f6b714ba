"""Drawn views: bits that never change; the table; and the geometry of windows."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from scipy import stats
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize

from pipelines.errors import DeitfastError
from pipelines.rng import draws
from pipelines.rng.packed_spec import pack, tables_for
from pipelines.rng.sampler import EvalSampler, Rows, SamplerSpec, TrainSampler
from pipelines.rng.view_params import COLUMNS, ViewParams, draw_eval, draw_train
from tests.helpers.view_specs import AUTO, DEIT, HARD, JITTER, SMALL, draw, frequencies, rows_of

# --- the same integers always ----------------------------------------------------------------------------------------

side = st.integers(1, 65535) | st.sampled_from([1, 2, 3, 32, 223, 224, 225, 65534, 65535])
index = st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**23 - 1))


def first_that_fits(attempt: Callable[[int], tuple[np.ndarray, ...]], blocks: range) -> tuple[np.ndarray, np.ndarray]:
    """Try all rows block after block; return each row's first box that fits, int64 [B, 4], and which rows have one."""
    found, boxes = np.False_, np.int64(0)
    for block in blocks:
        fits, *box = attempt(block)
        boxes = np.where(((fits == 1) & ~found)[:, None], np.stack(box, 1), boxes)
        found = found | (fits == 1)
    return boxes, found


def test_trying_one_after_the_other_gives_the_same_boxes():
    """The table's short cut against all ten tries in a row, where many are needed and some are in vain."""
    rows, packed, tables = rows_of(np.arange(3000)), pack(HARD), tables_for(HARD)
    sides = np.full(3000, 300), np.full(3000, 500)
    params = draw_train(HARD, rows, *sides)
    views = rows.samples, rows.views
    crops, found = first_that_fits(lambda block: draws.crop_try(*views, block, *sides, packed, tables), range(10))
    assert (params.crop_box[found] == crops[found]).all()
    assert (params.crop_box[~found] == draws.crop_fallback(300, 500, packed)).all()
    assert 0 < found.mean() < 1
    boxes, found = first_that_fits(lambda block: draws.erase_try(*views, block, packed, tables), range(1, 11))
    erased = draws.erased(*views, packed) & found & (boxes[:, 2:] > 0).all(1)
    assert (params.erase == boxes * erased[:, None]).all()
    assert 0 < erased.mean() < 1


@given(index, st.integers(0, 2**24))
@settings(deadline=None, max_examples=50)
def test_noise_agrees_between_numpy_and_torch(index, pixel):
    packed, table = pack(DEIT), tables_for(DEIT).normal
    numbers = (*index, pixel)
    results = [
        draws.erase_noise(*(np.array([number]) for number in numbers), packed, table),
        draws.erase_noise(*(torch.tensor([number]) for number in numbers), packed, torch.tensor(table)),
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
        assert (other.crop_box == base.crop_box).all(1).mean() < 0.1
        assert (other.operation == base.operation).all(1).mean() < 0.6
    assert (draw(DEIT, 64, views=1).lam == base.lam).all()  # mixing is the group's own ...
    assert (draw(DEIT, 64, number=1).lam != base.lam).any()
    assert (draw(DEIT, 64, number=1).crop_box == base.crop_box).all()  # ... and nothing else is


@pytest.mark.parametrize(
    ("spec", "columns", "expected"),
    [
        (DEIT, 25, "34499194a5a784ed"),  # as before color jitter came with six columns
        (DEIT, 31, "4b3872ebfba91e12"),
        (AUTO, 31, "2fa88b09285c7328"),
        (JITTER, 31, "acca9b10b459c33c"),
    ],
)
def test_the_draws_of_a_seed_never_change(spec, columns, expected):
    """Changed draws change what every seed means: old teacher caches would no longer fit their views."""
    rows = TrainSampler(SamplerSpec(samples=100, batch=8, seed=DEIT.seed, repeats=2, group=4)).rows(3, 1)
    drawn = draw_train(spec, rows, np.full(8, 375), np.full(8, 500)).table[:, :columns]
    assert hashlib.blake2b(drawn.astype("<i4").tobytes(), digest_size=8).hexdigest() == expected


# --- the table -------------------------------------------------------------------------------------------------------


def test_columns_are_views_of_the_table():
    params = ViewParams(np.arange(62, dtype=np.int32).reshape(2, 31))
    assert len(params) == 2
    assert sum(COLUMNS.values()) == 31
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
    assert params.mix_index.tolist() == [1, 0, 3, 2]


def test_an_empty_batch_is_an_empty_table():
    none = np.zeros(0, np.int64)
    assert len(draw_train(DEIT, rows_of(none), none, none)) == 0


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 65536)])
def test_sizes_out_of_range_are_refused(height, width):
    with pytest.raises(DeitfastError, match="1 to 65535"):
        draw(DEIT, 2, height, width)


@pytest.mark.parametrize("change", [{"ratio": (0.001, 2.0)}, {"erasing_ratio": (0.5, 65.0)}, {"magnitude_std": 1e9}])
def test_specs_that_do_not_fit_the_integers_are_refused(change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        replace(DEIT, **change)


# --- windows ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**62), side, side, st.sampled_from([DEIT, HARD]))
@settings(deadline=None, max_examples=100)
def test_random_windows_lie_inside_the_image(seed, height, width, spec):
    params = draw(replace(spec, seed=seed), 20, height, width)
    top, left, h, w = params.crop_box.astype(np.int64).T
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
    ours = draw(DEIT, 20_000, height, width).crop_box
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    ratios = [windows[:, 3] / windows[:, 2] for windows in (ours, theirs)]
    areas = [windows[:, 3] * windows[:, 2] for windows in (ours, theirs)]
    assert stats.ks_2samp(*ratios).pvalue > 1e-3
    assert stats.ks_2samp(*areas).pvalue > 1e-3


@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 4.0)])
def test_windows_of_tiny_images_are_as_frequent_as_those_of_torchvision(ratio):
    """On a few pixels every inclusive bound, and which side is which, shows."""
    torch.manual_seed(2)
    image = torch.empty(3, 4, 5)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], list(ratio)) for _ in range(8000)])
    assert frequencies(draw(replace(DEIT, ratio=ratio), 40_000, 4, 5).crop_box, theirs) > 1e-3


@given(side, side, st.sampled_from([(3 / 4, 4 / 3), (0.5, 1.5), (2 / 3, 2.0), (1.0, 1.0)]))
@settings(deadline=None)
def test_the_fallback_is_that_of_torchvision(height, width, ratio):
    image = torch.empty(1).expand(1, height, width)  # of a size, without its pixels
    theirs = RandomResizedCrop.get_params(image, [50.0, 51.0], list(ratio))  # an area that never fits
    spec = replace(DEIT, ratio=ratio)
    ours = draws.crop_fallback(height, width, pack(spec))
    expected = (theirs[0], theirs[1], max(theirs[2], 1), max(theirs[3], 1))
    assert ours == expected


def test_long_images_fall_back_to_their_center():
    assert (draw(DEIT, 100, 10, 4000).crop_box == [0, 1993, 10, 13]).all()  # 8 % of the area is 57 pixels high


def test_padded_crops_reach_over_the_edge_evenly():
    params = draw(SMALL, 20_000, 32, 32)
    assert (params.crop_box == [0, 0, 32, 32]).all()
    assert (params.resized == 32).all()
    for axis in (0, 1):
        values, counts = np.unique(params.offset[:, axis], return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert stats.chisquare(counts).pvalue > 1e-3


def test_padded_crops_scale_the_short_side():
    params = draw(SMALL, 4000, 97, 150)
    assert (params.crop_box == [0, 0, 97, 150]).all()
    assert (params.resized == [32, int(32 * 150 / 97)]).all()
    assert np.unique(params.offset[:, 1]).tolist() == list(range(-4, 49 - 32 + 4 + 1))


@pytest.mark.parametrize("spec", [DEIT, replace(DEIT, size=384), replace(DEIT, eval_crop=0.9), SMALL])
@pytest.mark.parametrize(("height", "width"), [(500, 375), (333, 500), (1, 7), (224, 224), (32, 32), (257, 256)])
def test_evaluation_takes_the_center_as_torchvision_does(spec, height, width):
    rows = EvalSampler(1, 1).rows(0, 0)
    params = draw_eval(spec, rows, np.array([height]), np.array([width]))
    image = Image.fromarray((np.arange(height * width) % 251).astype(np.uint8).reshape(height, width))
    short = int(spec.size / spec.eval_crop) if spec.crop == "resized" else spec.size
    resized = Resize(short)(image)
    (resized_h, resized_w), (top, left) = params.resized[0].tolist(), params.offset[0].tolist()
    assert (resized_h, resized_w) == (resized.height, resized.width)
    ours = np.asarray(resized)[top : top + spec.size, left : left + spec.size]
    assert (ours == np.asarray(CenterCrop(spec.size)(resized))).all()
    assert params.crop_box[0].tolist() == [0, 0, height, width]


def test_evaluation_draws_nothing_else():
    params = draw_eval(DEIT, EvalSampler(3, 4).rows(0, 0), np.full(4, 300), np.full(4, 200))
    for name in ("flip", "operation", "magnitude", "erase", "cutmix_bbox", "jitter", "factor"):
        assert not params[name].any()
    assert (params.lam == 65536).all()
    assert params.mix_index.tolist() == [0, 1, 2, 3]
