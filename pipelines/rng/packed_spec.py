"""An `AugmentSpec` as integers and tables, the only form in which `pipelines.rng.draws` sees it."""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipelines.rng import distributions, philox
from pipelines.rng.policies import AUTOAUGMENT, OPERATIONS
from pipelines.spec import AugmentSpec

RESIZED, PADDED, CENTERED, SQUASHED = range(4)
"""Kinds of window: random resized crop, random crop of the padded image, evaluation's center."""
EVERY_PASS = 1 << 31
"""More passes than any run has."""
UNIT = 1 << 16
"""One, in the Q16 of magnitudes and shares."""


class PackedSpec(NamedTuple):
    """An `AugmentSpec` as integers, the only form in which draws see it."""

    key0: int
    key1: int
    crop: int  # RESIZED or PADDED in training, CENTERED or SQUASHED in evaluation
    size: int  # of the output, px
    short: int  # short side of the resized image, px; SQUASHED: both sides; not used by RESIZED
    padding: int  # px
    area_low: int  # share of the image, Q30
    area_count: int  # Q30 steps, both ends included
    aspect_low: int  # half the binary logarithm of width / height, Q24
    aspect_count: int
    narrowest: int  # the fallback's bounds of width / height, Q28
    widest: int
    narrowest_inverse: int
    flip: int  # probabilities are thresholds on a word
    operation: int
    magnitude: int  # Q16
    magnitude_std: int  # Q16
    erase: int
    erase_area_low: int
    erase_area_count: int
    erase_aspect_low: int  # of height / width
    erase_aspect_count: int
    mix: int
    cutmix: int
    mixed_passes: int  # passes in which something is mixed
    autoaugment: int  # 1: operations come from AutoAugment's sub-policies
    jitter_low: int  # factor of color jitter, Q16
    jitter_count: int  # Q16 steps, both ends included; 0: no jitter


class Tables(NamedTuple):
    """The tables that draws look up: int64 numpy arrays."""

    exp2: np.ndarray  # [257]
    normal: np.ndarray  # [4097]
    mixup: np.ndarray  # [4097]
    cutmix: np.ndarray  # [4097]
    policy: np.ndarray  # [25 * 2 * 3]: AutoAugment's operation, threshold of its probability and magnitude in Q16


@lru_cache(maxsize=8)
def tables_for(spec: AugmentSpec) -> Tables:
    """Return a spec's tables. A method that is off has Beta(1, 1)'s, which nothing looks up."""
    mixup, cutmix = (distributions.beta_table(parameter or 1.0) for parameter in (spec.mixup, spec.cutmix))
    return Tables(distributions.exp2_table(), distributions.normal_table(), mixup, cutmix, _policy_table())


@lru_cache(maxsize=1)
def _policy_table() -> np.ndarray:
    """Return AutoAugment's sub-policies as integers, one after the other."""
    steps = (step for sub_policy in AUTOAUGMENT for step in sub_policy)
    rows = [(OPERATIONS.index(name), philox.threshold(chance), level * UNIT) for name, chance, level in steps]
    table = np.array(rows, np.int64).ravel()
    table.flags.writeable = False
    return table


@lru_cache(maxsize=8)
def pack(spec: AugmentSpec, train: bool = True) -> PackedSpec:
    """Return a spec as integers, for training's random windows or for evaluation's centers."""
    key0, key1 = philox.key_words(spec.seed)
    resized = spec.crop == "resized"
    squashed = spec.eval_resize == "squash"
    crop = (RESIZED if resized else PADDED) if train else SQUASHED if squashed else CENTERED
    area_low, area_count = _steps(*spec.scale, unit=30)
    aspect_low, aspect_count = _log_steps(spec.ratio)
    erase_area_low, erase_area_count = _steps(*spec.erasing_area, unit=30)
    erase_aspect_low, erase_aspect_count = _log_steps(spec.erasing_ratio)
    jitter = spec.color_jitter if spec.policy == "none" else 0.0  # timm's rule
    jitter_low, jitter_count = _steps(1 - jitter, 1 + jitter, unit=16)
    return PackedSpec(
        key0, key1,
        crop=crop,
        size=spec.size,
        short=int(spec.size / spec.eval_crop) if resized else spec.size,
        padding=spec.padding,
        area_low=area_low, area_count=area_count, aspect_low=aspect_low, aspect_count=aspect_count,
        narrowest=round(spec.ratio[0] * 2**28), widest=round(spec.ratio[1] * 2**28),
        narrowest_inverse=round(2**28 / spec.ratio[0]),
        flip=philox.threshold(spec.flip),
        operation=philox.threshold(spec.operation_probability if spec.policy == "randaugment" else 0),
        magnitude=round(spec.magnitude * UNIT), magnitude_std=round(spec.magnitude_std * UNIT),
        erase=philox.threshold(spec.erasing),
        erase_area_low=erase_area_low, erase_area_count=erase_area_count,
        erase_aspect_low=erase_aspect_low, erase_aspect_count=erase_aspect_count,
        mix=philox.threshold(spec.mix_probability if spec.mixup or spec.cutmix else 0),
        cutmix=philox.threshold(spec.mix_switch if spec.mixup and spec.cutmix else spec.cutmix > 0),
        mixed_passes=-(-spec.mixup_off_epoch // spec.repeats) or EVERY_PASS,
        autoaugment=int(spec.policy == "autoaugment"),
        jitter_low=jitter_low, jitter_count=jitter_count if jitter else 0,
    )  # fmt: skip


def _steps(low: float, high: float, unit: int) -> tuple[int, int]:
    """Return a range as its lower end in fixed point and the number of integers up to its upper end."""
    start, end = round(low * 2**unit), round(high * 2**unit)
    return start, end - start + 1


def _log_steps(ratio: tuple[float, float]) -> tuple[int, int]:
    """Return the same of half the log2 of a range of aspect ratios, which lie in [1/64, 64]."""
    return _steps(math.log2(ratio[0]) / 2, math.log2(ratio[1]) / 2, unit=distributions.EXP2_UNIT)
