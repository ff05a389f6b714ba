"""100,000 views as drawn here and by timm and torchvision themselves, with fixed seeds: the same distributions.

Some fifty comparisons are made, each failing by chance once in 10,000. `test_views_recipe.py` has quick ones of fewer
views.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import ColorJitter, RandomHorizontalFlip

from pipelines.augment.torch_ops import ops
from pipelines.rng.policies import FIRST_JITTER, OPERATIONS, RANDAUGMENT
from tests.helpers.view_specs import AUTO, DEIT, JITTER, draw, frequencies
from tools.parity import timm_ops

pytestmark = pytest.mark.slow
VIEWS = 100_000
CHANCE = 1e-4


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def assert_like(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Kolmogorov-Smirnov on each column of two samples, [n, k] each."""
    pvalues = [stats.ks_2samp(*pair).pvalue for pair in zip(ours.T, theirs.T, strict=True)]
    assert min(pvalues) > CHANCE, pvalues


def assert_as_often(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Chi-square over whole rows of two samples, [n] or [n, k] each."""
    assert frequencies(ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)) > CHANCE


def with_shape(boxes: np.ndarray) -> np.ndarray:
    """Boxes (top, left, height, width) with two columns more: area and aspect ratio."""
    height, width = boxes[:, 2], boxes[:, 3]
    return np.column_stack([boxes, height * width, height / np.maximum(width, 1)])


def timms_views(transform: auto_augment.RandAugment | auto_augment.AutoAugment) -> list[np.ndarray]:
    """Two samples of what timm applies, in order: indices into OPERATIONS and arguments (0: none), [VIEWS, 2] each."""
    steps = getattr(transform, "ops", None) or [step for sub_policy in transform.policy for step in sub_policy]
    for step in steps:
        index = OPERATIONS.index(timm_ops.OURS[step.name])
        step.aug_fn = lambda applied, *arguments, index=index, **_: (*applied, (index, *arguments[:1], 0)[:2])
    views = [(*transform(()), (0, 0), (0, 0))[:2] for _ in range(VIEWS)]
    table = np.array(views, float)
    return [table[..., 0].astype(int), table[..., 1]]


def our_views(spec) -> list[np.ndarray]:
    """The same two of ours."""
    params = draw(spec, VIEWS)
    magnitudes = params.magnitude / 65536
    arguments = np.zeros(params.operation.shape)
    for index, name in enumerate(OPERATIONS[1:FIRST_JITTER], start=1):
        some = params.operation == index
        # a rotation's arguments are its cosine and sine; timm's is the angle
        arguments[some] = magnitudes[some] * 3 if name == "Rotate" else ops.arguments(name, magnitudes[some])[:, 0]
    second_alone = params.operation[:, 0] == 0
    for table in (params.operation, arguments):
        table[second_alone] = table[second_alone][:, ::-1]
    return [params.operation, arguments]


def test_randaugment_chooses_as_timm():
    (ours, our_arguments), (theirs, their_arguments) = our_views(DEIT), timms_views(timm_randaugment())
    assert_as_often(ours, theirs)
    for index in range(1, 1 + RANDAUGMENT):
        one, other = our_arguments[ours == index], their_arguments[theirs == index]
        assert len(one) > VIEWS / 20
        discrete = len(np.unique(other)) < 100
        (assert_as_often if discrete else assert_like)(one[:, None], other[:, None])


def timm_randaugment() -> auto_augment.RandAugment:
    return auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", dict(timm_ops.HPARAMS))


def test_autoaugment_chooses_as_timm():
    """Whole views at once: both operations with their arguments and signs."""
    transform = auto_augment.auto_augment_transform("original", dict(timm_ops.HPARAMS))
    ours, theirs = np.hstack(our_views(AUTO)), np.hstack(timms_views(transform))
    ours, theirs = np.round(ours, 9), np.round(theirs, 9)
    assert len(np.unique(ours, axis=0)) == len(np.unique(theirs, axis=0)) > 40
    assert_as_often(ours, theirs)


def test_jitter_is_torchvisions():
    drawn = draw(JITTER, VIEWS)
    jitter = ColorJitter(0.4, 0.4, 0.4)
    theirs = [ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None) for _ in range(VIEWS)]
    orders = np.array([order[order < 3].tolist() for order, *_ in theirs])
    assert_as_often(drawn.jitter - FIRST_JITTER, orders)
    by_name = np.take_along_axis(drawn.factor, drawn.jitter.argsort(1), axis=1) / 65536
    assert_like(by_name, np.array([factors[:3] for _, *factors in theirs]))


@pytest.mark.parametrize(("height", "width"), [(375, 500), (60, 47)])
def test_windows_are_timms(height, width):
    image = Image.new("L", (width, height))
    get = RandomResizedCropAndInterpolation.get_params
    theirs = np.array([get(image, DEIT.scale, DEIT.ratio) for _ in range(VIEWS)])
    assert_like(with_shape(draw(DEIT, VIEWS, height, width).crop_box), with_shape(theirs))


def test_flips_are_torchvisions():
    image, flip = Image.fromarray(np.array([[0, 1]], np.uint8)), RandomHorizontalFlip(0.5)
    theirs = np.array([flip(image).getpixel((0, 0)) for _ in range(VIEWS)])
    assert_as_often(draw(DEIT, VIEWS).flip, theirs)


class Canvas:
    """Stands for an image, and notes which box is written to."""

    def __init__(self) -> None:
        self.cutmix_bbox = (0, 0, 0, 0)

    def __setitem__(self, place, value) -> None:
        _, rows, columns = place
        self.cutmix_bbox = rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start


def test_erased_boxes_are_timms():
    eraser = RandomErasing(DEIT.erasing, mode="const", device="cpu")
    canvases = [Canvas() for _ in range(VIEWS)]
    for canvas in canvases:
        eraser._erase(canvas, 3, DEIT.size, DEIT.size, torch.float32)
    theirs, ours = np.array([canvas.cutmix_bbox for canvas in canvases]), draw(DEIT, VIEWS).erase
    assert_as_often(ours[:, 2] > 0, theirs[:, 2] > 0)
    assert_like(with_shape(ours[ours[:, 2] > 0]), with_shape(theirs[theirs[:, 2] > 0]))


def test_mixing_is_timms():
    mixup = Mixup(DEIT.mixup, DEIT.cutmix, prob=DEIT.mix_probability, switch_prob=DEIT.mix_switch)
    lams, cuts = (np.array(values) for values in zip(*(mixup._params_per_batch() for _ in range(VIEWS)), strict=True))
    drawn = [cutmix_bbox_and_lam((3, DEIT.size, DEIT.size), lam) for lam in lams[cuts]]
    theirs = np.array([(top, left, bottom - top, right - left) for (top, bottom, left, right), _ in drawn])
    theirs[(theirs[:, 2:] == 0).any(1)] = 0
    params = draw(DEIT, 2 * VIEWS, group=2)
    ours, shares = params.cutmix_bbox[::2], params.lam[::2] / 65536
    cut = ours[:, 2] > 0
    assert_as_often(cut, np.concatenate([theirs[:, 2] > 0, np.zeros((~cuts).sum(), bool)]))
    assert_like(with_shape(ours[cut]), with_shape(theirs[theirs[:, 2] > 0]))
    assert_like(shares[cut, None], np.array([[share] for (_, share), box in zip(drawn, theirs, strict=True) if box[2]]))
    alone = draw(replace(DEIT, cutmix=0.0), 2 * VIEWS, group=2)
    assert_like(alone.lam[::2, None] / 65536, lams[~cuts, None])
