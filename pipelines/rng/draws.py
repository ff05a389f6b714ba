"""What is drawn for each view, as functions of int64 arrays: (sample, view) and an `AugmentSpec` as integers.

Each function takes the spec as `pack` and `tables_for` of `rng.packed_spec` give it, branches on the spec and never on
what is drawn, and works element by element: a view's parameters do not depend on the batch that it is drawn in.
`rng.view_params` puts them together for a batch.
"""

import numpy as np

from pipelines.rng import distributions, philox
from pipelines.rng.distributions import exp2, isqrt, shift_half_even
from pipelines.rng.packed_spec import PADDED, SQUASHED, UNIT, PackedSpec, Tables
from pipelines.rng.philox import Ints, bounded
from pipelines.rng.policies import AUTOAUGMENT, FIRST_JITTER, RANDAUGMENT

TRIES = 10
"""Tries of a random window or box before the fallback."""
MAX_SIDE = 65535
"""Longest side of a stored image: areas then stay below 2^32."""


def crop_try(
    sample: Ints, view: Ints, block: Ints, height: Ints, width: Ints, spec: PackedSpec, tables: Tables
) -> tuple[Ints, ...]:
    """Return (fits as 0 or 1, top, left, height, width) of one try, block 0 to 9, at a random resized crop.

    `height` and `width` are the stored images', in 1..65535 pixels; the window lies in those. Source: torchvision's
    RandomResizedCrop.get_params; area U(scale), width / height log-uniform, and a uniform position. Where it does not
    fit, the position means nothing.
    """
    area, aspect, y, x = philox.philox(sample, view, philox.CROP, block, spec.key0, spec.key1)
    half_log = spec.aspect_low + bounded(aspect, spec.aspect_count)
    root = isqrt(height * width * (spec.area_low + bounded(area, spec.area_count)))
    w, h = _scaled(root, half_log, tables), _scaled(root, -half_log, tables)
    fits = (w > 0) * (w <= width) * (h > 0) * (h <= height) * 1
    return fits, bounded(y, height - h + 1), bounded(x, width - w + 1), h, w


def _scaled(root: Ints, half_log: Ints, tables: Tables) -> Ints:
    """Return round(root x 2^half_log) from Q15 and Q24: a side from the root of the area."""
    bits = 15 + distributions.EXP2_RESULT
    return (root * exp2(half_log, tables.exp2) + (1 << (bits - 1))) >> bits


def crop_fallback(height: Ints, width: Ints, spec: PackedSpec) -> tuple[Ints, Ints, Ints, Ints]:
    """Return the center window (top, left, height, width) that torchvision takes after ten tries in vain.

    It is the whole image, with its long side cut where the aspect ratio is out of bounds.
    """
    narrow = (width << 28) < height * spec.narrowest
    wide = (width << 28) > height * spec.widest
    h = np.where(narrow, np.clip(shift_half_even(width * spec.narrowest_inverse, 28), 1, height), height)
    w = np.where(wide, np.clip(shift_half_even(height * spec.widest, 28), 1, width), width)
    return (height - h) >> 1, (width - w) >> 1, h, w


def placed_crop(sample: Ints, view: Ints, height: Ints, width: Ints, spec: PackedSpec) -> tuple[Ints, ...]:
    """Return crop_box, resized, offset (see `view_params.COLUMNS`): the full image, resized by its short side.

    PADDED: the offset is uniform and reaches `padding` over each edge. CENTERED: it is torchvision's CenterCrop's.
    SQUASHED: the same of the image resized to a square.
    """
    landscape = height <= width
    resized_h = np.where(landscape, spec.short, spec.short * height // width)
    resized_w = np.where(landscape, spec.short * width // height, spec.short)
    zero = height * 0
    if spec.crop == SQUASHED:
        resized_h, resized_w = zero + spec.short, zero + spec.short
    if spec.crop == PADDED:
        _, _, y, x = philox.philox(sample, view, philox.CROP, 0, spec.key0, spec.key1)
        top = bounded(y, resized_h - spec.size + 2 * spec.padding + 1) - spec.padding
        left = bounded(x, resized_w - spec.size + 2 * spec.padding + 1) - spec.padding
    else:
        top, left = shift_half_even(resized_h - spec.size, 1), shift_half_even(resized_w - spec.size, 1)
    return zero, zero, height, width, resized_h, resized_w, top, left


def flip(sample: Ints, view: Ints, spec: PackedSpec) -> Ints:
    """Return 1 where the view is mirrored, else 0."""
    word, _, _, _ = philox.philox(sample, view, philox.FLIP, 0, spec.key0, spec.key1)
    return (word < spec.flip) * 1


def operation(sample: Ints, view: Ints, slot: int, spec: PackedSpec, tables: Tables) -> tuple[Ints, Ints]:
    """Return the operation in slot 0 or 1 (an index into OPERATIONS; 0: none) and its signed magnitude in Q16.

    RandAugment's magnitude is N(magnitude, magnitude_std), clipped to [0, 10]; AutoAugment's stands in the sub-policy.
    Either is then negated with probability 1/2. A magnitude of 0 has no sign and needs none: every operation that
    heeds the sign is the identity there.
    """
    if spec.autoaugment:
        return _of_sub_policy(sample, view, slot, spec, tables)
    which, applied, size, sign = philox.philox(sample, view, philox.OPERATION, slot, spec.key0, spec.key1)
    magnitude = spec.magnitude + ((distributions.normal(size, tables.normal) * spec.magnitude_std) >> 16)
    magnitude = np.clip(magnitude, 0, 10 * UNIT) * (1 - (sign >> 31) * 2)
    taken = applied < spec.operation
    return taken * (1 + bounded(which, RANDAUGMENT)), taken * magnitude


def _of_sub_policy(sample: Ints, view: Ints, slot: int, spec: PackedSpec, tables: Tables) -> tuple[Ints, Ints]:
    """Return what `operation` does of AutoAugment: both slots read one sub-policy, each applies its own step or not."""
    which, _, _, _ = philox.philox(sample, view, philox.OPERATION, 2, spec.key0, spec.key1)
    _, applied, _, sign = philox.philox(sample, view, philox.OPERATION, slot, spec.key0, spec.key1)
    step = (bounded(which, len(AUTOAUGMENT)) * 2 + slot) * 3
    taken = applied < tables.policy[step + 1]
    return taken * tables.policy[step], taken * tables.policy[step + 2] * (1 - (sign >> 31) * 2)


def jitter(sample: Ints, view: Ints, spec: PackedSpec) -> tuple[Ints, Ints, Ints, Ints, Ints, Ints]:
    """Return color jitter's three operations (indices into OPERATIONS) in their order, then their factors in Q16.

    All six are 0 where the spec has no jitter. Source: torchvision's ColorJitter.get_params, without hue.
    """
    order, brightness, contrast, saturation = philox.philox(sample, view, philox.JITTER, 0, spec.key0, spec.key1)
    if spec.jitter_count == 0:
        zero = order * 0
        return zero, zero, zero, zero, zero, zero
    brightness = spec.jitter_low + bounded(brightness, spec.jitter_count)
    contrast = spec.jitter_low + bounded(contrast, spec.jitter_count)
    saturation = spec.jitter_low + bounded(saturation, spec.jitter_count)
    order = bounded(order, 6)
    first = order >> 1
    low, high = (first == 0) * 1, 2 - (first == 2) * 1  # the other two
    swapped = order & 1
    second, third = np.where(swapped, high, low), np.where(swapped, low, high)
    factors, drawn = (brightness, contrast, saturation), (first, second, third)
    return (*(FIRST_JITTER + index for index in drawn), *(np.choose(index, factors) for index in drawn))


def erased(sample: Ints, view: Ints, spec: PackedSpec) -> Ints:
    """Return 1 where random erasing happens, else 0."""
    word, _, _, _ = philox.philox(sample, view, philox.ERASE, 0, spec.key0, spec.key1)
    return (word < spec.erase) * 1


def erase_try(sample: Ints, view: Ints, block: Ints, spec: PackedSpec, tables: Tables) -> tuple[Ints, ...]:
    """Return (fits as 0 or 1, top, left, height, width) of one try, block 1 to 10, at an erased box.

    Source: timm's RandomErasing; both sides must be shorter than the output's, the position is uniform.
    """
    area, aspect, y, x = philox.philox(sample, view, philox.ERASE, block, spec.key0, spec.key1)
    half_log = spec.erase_aspect_low + bounded(aspect, spec.erase_aspect_count)
    root = isqrt(spec.size * spec.size * (spec.erase_area_low + bounded(area, spec.erase_area_count)))
    h, w = _scaled(root, half_log, tables), _scaled(root, -half_log, tables)
    fits = (h < spec.size) * (w < spec.size) * 1
    return fits, bounded(y, spec.size - h + 1), bounded(x, spec.size - w + 1), h, w


def erase_noise(sample: Ints, view: Ints, pixel: Ints, spec: PackedSpec, table: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the erased box's N(0, 1) noise at a pixel, y * S + x of the output, as red, green and blue in Q16.

    `table` is `distributions.normal_table()`. The noise is a function of (seed, sample, view, pixel) alone, so any
    device and any batch gives the same; mirroring does not come into it, for erasing follows the flip.
    """
    red, green, blue, _ = philox.philox(sample, view, philox.NOISE, pixel, spec.key0, spec.key1)
    return distributions.normal(red, table), distributions.normal(green, table), distributions.normal(blue, table)


def mix(group: Ints, number: Ints, spec: PackedSpec, tables: Tables) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Return a group's lambda in Q16 and its box (top, left, height, width) in pass `number`.

    A box of zeros means MixUp, or nothing where lambda is one. CutMix's box has a uniform center and sides of
    S sqrt(1 - lambda), and is clipped; lambda is then the area that it leaves. Source: timm's Mixup and rand_bbox.
    """
    mixed, switch, size, _ = philox.philox(group, number, philox.MIX, 0, spec.key0, spec.key1)
    y, x, _, _ = philox.philox(group, number, philox.MIX, 1, spec.key0, spec.key1)
    mixes = (mixed < spec.mix) & (number < spec.mixed_passes)
    cuts = mixes * (switch < spec.cutmix)
    mixup_lam = distributions.beta(size, tables.mixup)
    side = isqrt(((1 << 30) - distributions.beta(size, tables.cutmix)) * (spec.size * spec.size)) >> 15
    top, bottom = _clipped(bounded(y, spec.size), side, spec.size)
    left, right = _clipped(bounded(x, spec.size), side, spec.size)
    h, w = (bottom - top) * cuts, (right - left) * cuts
    area = spec.size * spec.size
    uncovered = ((area - h * w) * UNIT + (area >> 1)) // area
    lam = np.where(cuts, uncovered, np.where(mixes, (mixup_lam + (1 << 13)) >> 14, UNIT))
    kept = (h * w > 0) * 1
    return lam, top * kept, left * kept, h * kept, w * kept


def _clipped(center: Ints, side: Ints, size: int) -> tuple[Ints, Ints]:
    """Return both ends of a side about its center, clipped to the output."""
    return np.clip(center - (side >> 1), 0, size), np.clip(center + ((side + 1) >> 1), 0, size)
