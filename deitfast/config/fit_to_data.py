"""Settings that the user left to deitfast, fitted to few images, many ranks and short runs.

Pure functions of plain numbers. What was typed is never changed: where it cannot work, the error names the nearest
setting that does.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipelines.errors import UserError, pluralize

GRANULARITIES = (32, 16, 8, 4, 2, 1)
"""A rank's micro-batch is a multiple of the first of these that uses enough of the images."""
ENOUGH = 2 / 3
"""Share of the images that an epoch's batches should use; the others come in other epochs."""
WARMUP_SHARE = 0.2
"""Most of a run that warm-up may take."""
ADAPTABLE = (
    "train.batch", "augment.mix_group", "augment.repeats", "augment.mixup", "augment.cutmix", "schedule.warmup_epochs",
    "schedule.warmup_lr", "schedule.min_lr",
)  # fmt: skip
"""Fields that may be fitted."""


@dataclass(frozen=True)
class DataFacts:
    """What planning knows of a data set."""

    name: str
    """Kind of its source."""
    side: int
    """Median of the shorter sides of the training images, in pixels."""
    counts: tuple[int, ...]
    """Training images of each class."""
    fingerprint: str
    """"": not made yet."""
    validated: bool
    """Whether it has a validation split."""

    def images(self, fraction: float) -> int:
        """Return the training images that a share of every class comes to, as `stratified_subset` takes them."""
        return share_of(self.counts, fraction)


def share_of(counts: tuple[int, ...], fraction: float) -> int:
    """Return the images that a share of every class comes to, given each class's, as `stratified_subset` takes them."""
    return sum(max(math.floor(count * fraction + 0.5), 1) for count in counts if count)


class Batching(NamedTuple):
    """How an epoch is cut into batches."""

    batch: int
    """Views of a step over all ranks."""
    group: int
    """Views of a mixing group; 1: nothing is mixed."""
    repeats: int
    """Views of an image in an epoch."""

    def views(self, images: int) -> int:
        """Return the views in the whole batches of one epoch, as `pipelines.rng.sampler.TrainSampler` cuts them."""
        whole_groups = images // self.group // self.repeats * self.repeats * self.group
        return min(images // self.batch, whole_groups // self.batch) * self.batch


def fit_to_data(
    values: Mapping[str, Any], typed: Collection[str], images: int, ranks: int
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields to change, by full name, and a line on each change for the user.

    Args:
        values: every field of the recipe by full name; those read here must be numbers in their bounds.
        typed: fields that the user set and that therefore stay.
        images: training images that the run uses.
        ranks: processes that share a batch.

    Raises:
        UserError: no batch can be made of these images with what was typed.
    """
    batching, mixing = _batching(values, typed, images, ranks)
    changes: dict[str, Any] = {} if mixing else {"augment.mixup": 0.0, "augment.cutmix": 0.0}
    changes |= {"train.batch": batching.batch, "augment.repeats": batching.repeats}
    if mixing and batching.group > 1:
        changes["augment.mix_group"] = batching.group
    changes = {key: value for key, value in changes.items() if value != values[key]}
    notes = []
    if changes:
        shared = pluralize(images, "image") + (f" on {ranks} ranks" if ranks > 1 else "")
        notes.append(f"{', '.join(_say(key, value, values[key]) for key, value in changes.items())}: {shared}")
    schedule, said = _schedule({**values, **changes}, typed)
    return changes | schedule, [*notes, *said]


def _say(key: str, new: Any, old: Any) -> str:
    match key:
        case "train.batch":
            return f"batch {new:,} instead of {old:,}"
        case "augment.mix_group":
            return f"mixing groups of {new} instead of {old}"
        case "augment.repeats":
            return f"{new} view of an image in an epoch instead of {old}"
        case "augment.mixup":
            return "no MixUp"
    return "no CutMix"


def _batching(values: Mapping[str, Any], typed: Collection[str], images: int, ranks: int) -> tuple[Batching, bool]:
    """Return the batching to use, the recipe's own where it works, and whether images are mixed with it."""
    unit = ranks * values["train.accumulate"]
    mixes = bool(values["augment.mixup"] or values["augment.cutmix"])
    group = values["augment.mix_group"] if mixes else 1
    own = Batching(values["train.batch"], group, values["augment.repeats"])
    if _works(own, unit, ranks) and own.views(images):
        return own, mixes
    fixed = {name for name in Batching._fields if FIELD_OF[name] in typed}
    if found := _search(own, fixed, images, unit, ranks):
        return found, mixes
    nearest = _search(own, (), images, unit, ranks)
    if nearest is None and mixes:  # not even one pair for every rank
        plain = own._replace(group=1)
        found = _search(plain, fixed, images, unit, ranks)
        if found and not {"augment.mixup", "augment.cutmix", "augment.mix_group"} & set(typed):
            return found, False
        nearest = _search(plain, (), images, unit, ranks)
    if nearest is None:
        raise UserError(
            f"{pluralize(images, 'image')} cannot be shared by {ranks} ranks"
            + (f" x train.accumulate {unit // ranks}" if unit > ranks else ""),
            remedy=f"use at most {images} processes and train.accumulate 1, or more images",
        )
    wanted = [f"{FIELD_OF[name]} {getattr(own, name)}" for name in Batching._fields if name in fixed]
    works = [f"{FIELD_OF[name]} {getattr(nearest, name)}" for name in Batching._fields if getattr(nearest, name) > 1]
    parts = f", in {unit} equal parts" if unit > 1 else ""
    groups = ", each rank's share a whole number of mixing groups of an even size" if mixes else ""
    raise UserError(
        f"{' with '.join(wanted)} does not fit {pluralize(images, 'image')} on {pluralize(ranks, 'rank')}",
        expected=f"a batch of at most {pluralize(images, 'view')}{parts}{groups}",
        remedy=f"these work together: {', '.join(works)}",
    )


FIELD_OF = {"batch": "train.batch", "group": "augment.mix_group", "repeats": "augment.repeats"}
"""Recipe fields of a Batching's."""


def _works(batching: Batching, unit: int, ranks: int) -> bool:
    return batching.batch % unit == 0 and batching.batch % (ranks * batching.group) == 0


def _search(own: Batching, fixed: Collection[str], images: int, unit: int, ranks: int) -> Batching | None:
    """Return the batching nearest to the recipe's that works, None where there is none.

    Round batches that use enough of the images come first, with groups as large as possible, then smaller batches.
    """
    best, used = None, 0
    for repeats in (own.repeats,) if "repeats" in fixed else dict.fromkeys((own.repeats, 1)):
        for candidate in _candidates(own._replace(repeats=repeats), fixed, images, unit, ranks):
            views = candidate.views(images)
            if views >= ENOUGH * images or (views and "batch" in fixed):
                return candidate
            if views > used:
                best, used = candidate, views
        if best:
            return best
    return None


def _candidates(own: Batching, fixed: Collection[str], images: int, unit: int, ranks: int) -> Iterator[Batching]:
    if "group" in fixed or own.group == 1:
        groups = [own.group]
    else:
        groups = list(range(min(own.group, max(2, images)) // 2 * 2, 0, -2))
    if "batch" in fixed:
        yield from (own._replace(group=group) for group in groups if _works(own._replace(group=group), unit, ranks))
        return
    for granularity in GRANULARITIES:
        for group in groups:
            step = math.lcm(granularity * unit, group * ranks)
            largest = min(images, own.batch) // step * step
            yield from (own._replace(batch=batch, group=group) for batch in range(largest, 0, -step))


def _schedule(values: Mapping[str, Any], typed: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Return a warm-up that leaves most of a short run to the peak, and ends of the schedule below a low peak."""
    changes: dict[str, Any] = {}
    notes = []
    epochs, warmup = values["train.epochs"], values["schedule.warmup_epochs"]
    if warmup > WARMUP_SHARE * epochs and "schedule.warmup_epochs" not in typed:
        changes["schedule.warmup_epochs"] = fitted = round(WARMUP_SHARE * epochs, 2)
        kept, asked = pluralize(fitted, "epoch"), pluralize(epochs, "epoch")
        notes.append(f"{kept} of warm-up instead of {warmup:g}: {asked} in all")
    scale = values["train.batch"] / values["optim.lr_batch"] if values["optim.lr_batch"] else 1
    peak = values["optim.lr"] * scale
    for key, share in (("schedule.min_lr", 0.01), ("schedule.warmup_lr", 0.001)):
        read = key != "schedule.min_lr" or values["schedule.shape"] == "cosine"
        if values[key] >= peak and read and key not in typed:
            changes[key] = fitted = float(f"{peak * share:.2g}")
            notes.append(f"{key} {fitted:g} instead of {values[key]:g}: the batch's peak learning rate is {peak:.2g}")
    return changes, notes
