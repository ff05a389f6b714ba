"""Which (sample, view) pairs, in which order: a pure function of (seed, epoch, rank, world, step).

A pass is a keyed permutation of all images. It is cut into blocks of `group` images; the few left over at its end are
left out of that pass. A block makes `repeats` mixing groups, each with one view of every image of the block, so that no
image meets itself. What a group holds depends on the seed, the pass and the group's number in it, never on batch size
or ranks.

An epoch is the next 1/repeats of the current pass's blocks, all their groups, the blocks in an order of the epoch's
own: with repeated augmentation an epoch visits 1/repeats of the images, each `repeats` times. A step takes the next
groups, and each rank a contiguous share of them. So ranks and batch size only slice one sequence, and any step can be
started at without the ones before it. Both orders are sorts by Philox keys (`pipelines.rng.philox`: ORDER and BLOCKS).
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipelines.errors import UserError
from pipelines.rng import philox
from pipelines.spec import AugmentSpec

CHUNK = 1 << 14
"""Sort keys drawn at once: numpy's intermediate arrays then stay in the processor's cache."""


@dataclass(frozen=True)
class Rows:
    """One rank's rows of one step."""

    samples: np.ndarray
    """int64 [B]: index in the split."""
    views: np.ndarray
    """int64 [B]: number of the view; (sample, view) is unique over a whole run, unless its views are reused."""
    groups: np.ndarray
    """int64 [B]: the mixing group of its pass, the same whatever the batch size, rank and world."""
    passes: np.ndarray
    """int64 [B]: number of the pass over the data set that the group belongs to."""
    partners: np.ndarray
    """int64 [B]: the row, within this batch, that this row is mixed with; its own row in evaluation."""
    valid: np.ndarray
    """bool [B]: False for rows that only fill up evaluation's last batch."""


def group_size(spec: AugmentSpec, rank_batch: int) -> int:
    """Return the views of a mixing group: the spec's, or 1 where nothing is mixed and any batch will do.

    Raises:
        UserError: the batch of one rank is no multiple of the spec's group.
    """
    if not (spec.mixup or spec.cutmix):
        return 1
    _check_groups(rank_batch, 1, spec.mix_group)
    return spec.mix_group


class Sampler(Protocol):
    """Rows as a function of (epoch, step): all that a loader asks for."""

    steps_per_epoch: int
    """Steps in one epoch."""

    def rows(self, epoch: int, step: int) -> Rows:
        """Return this rank's rows of a step, in 0..steps_per_epoch - 1 of an epoch from 0."""
        ...


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """What decides training's rows, on this rank."""

    samples: int
    """Images in the split."""
    batch: int
    """Views of one step over all ranks."""
    seed: int
    """The augmentation seed, the key of both orders."""
    repeats: int
    """Views of an image in one epoch."""
    group: int
    """Views of a mixing group; see `group_size`."""
    rank: int = 0
    """This rank, from 0."""
    world: int = 1
    """Number of ranks."""
    views: int = 0
    """Views of an image in the whole run, a multiple of `repeats`, after which passes start over with the first (in a
    new order); 0: as many as there are epochs."""
    subset: np.ndarray | None = None
    """int64: the indices to train on, each once; None: all."""
    include_partial: bool = False
    """Give all groups of an epoch, including those that do not fill a batch; rows that are not valid fill it up. For a
    teacher's targets: every view is needed, as a run with another batch size may use it."""


class TrainSampler:
    """Training's rows.

    Raises:
        UserError: the numbers of the spec do not fit each other; the message says which to change.
    """

    def __init__(self, spec: SamplerSpec) -> None:
        self.spec, batch, group, repeats = spec, spec.batch, spec.group, spec.repeats
        _check_ranks(spec.samples, batch, spec.rank, spec.world)
        _check_groups(batch, spec.world, group)
        if spec.views % repeats:
            raise UserError(
                f"{spec.views} views of each image do not divide into {repeats} of an epoch",
                remedy=f"ask for a multiple of {repeats} views, or set augment.repeats to 1",
            )
        self._indices = np.arange(spec.samples) if spec.subset is None else _checked_subset(spec.subset, spec.samples)
        self._step_groups, self._rank_groups = batch // group, batch // group // spec.world
        self._blocks = len(self._indices) // group
        available = self._blocks // repeats * repeats * group
        self.steps_per_epoch: int = min(len(self._indices) // batch, available // batch)
        if spec.include_partial:
            largest = -(-self._blocks // repeats) * repeats  # groups of the epoch that has most
            self.steps_per_epoch = -(-largest // self._step_groups)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{len(self._indices)} images do not fill one batch",
                expected=f"{batch} views in an epoch",
                found=f"{available}, in groups of {group} images x {repeats} views",
                remedy="lower train.batch, augment.mix_group or augment.repeats, or train on more images",
            )
        self._permutation: tuple[int, np.ndarray] = (-1, self._indices)
        self._order: tuple[int, np.ndarray] = (-1, self._indices)

    def rows(self, epoch: int, step: int) -> Rows:
        """Return this rank's rows of a step, in 0..steps_per_epoch - 1 of an epoch from 0.

        May be called from several threads; the first call of a pass sorts its keys (.4 s for ImageNet).
        """
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} is not in 0..{self.steps_per_epoch - 1}")
        group, repeats = self.spec.group, self.spec.repeats
        number = epoch // repeats  # of the pass
        if self.spec.views:
            number %= self.spec.views // repeats
        first = step * self._step_groups + self.spec.rank * self._rank_groups
        sequence = np.arange(first, first + self._rank_groups)
        blocks = self._block_order(epoch)
        there = sequence < len(blocks) * repeats  # all of them, but at the end of an `include_partial` epoch
        turn = sequence % repeats  # which of its block's groups
        block = blocks[sequence // repeats] if there.all() else _padded(blocks, sequence // repeats)
        place = np.arange(group)
        # A block's groups hold the same images; turning each by its number gives an image another partner every time.
        images = block[:, None] * group + (place + turn[:, None]) % group
        starts = np.arange(self._rank_groups)[:, None] * group
        return Rows(
            samples=self._pass_order(number)[images].ravel(),
            views=np.repeat(number * repeats + turn, group),
            groups=np.repeat(block * repeats + turn, group),
            passes=np.full(self._rank_groups * group, number),
            partners=(starts + place[::-1]).ravel(),
            valid=np.repeat(there, group),
        )

    @property
    def views_per_epoch(self) -> int:
        """Views of one epoch over all ranks; with `include_partial`, the mean over the epochs of a pass."""
        return self._blocks * self.spec.group

    def _pass_order(self, number: int) -> np.ndarray:
        """Return a pass's permutation of the indices, kept until another pass is asked for."""
        kept = self._permutation
        if kept[0] != number:
            keys = sort_keys(self.spec.seed, philox.ORDER, self._indices, number)
            kept = self._permutation = (number, self._indices[np.argsort(keys, kind="stable")])
        return kept[1]

    def _block_order(self, epoch: int) -> np.ndarray:
        """Return the numbers, in their pass, of an epoch's blocks in the order of their visit."""
        kept = self._order
        if kept[0] != epoch:
            repeats = self.spec.repeats
            part = epoch % repeats
            start, stop = (k * self._blocks // repeats for k in (part, part + 1))
            blocks = np.arange(start, stop)
            keys = sort_keys(self.spec.seed, philox.BLOCKS, blocks, epoch)
            kept = self._order = (epoch, blocks[np.argsort(keys, kind="stable")])
        return kept[1]


class EvalSampler:
    """Evaluation's rows: every sample once over all ranks, the last batches filled up with rows that are not valid.

    Args:
        samples: images in the split.
        batch: rows of one step on each rank.
        rank: this rank, from 0.
        world: number of ranks; all have the same number of steps.
        subset: int64, the indices to go through, each once; None: all.
    """

    def __init__(
        self, samples: int, batch: int, rank: int = 0, world: int = 1, subset: np.ndarray | None = None
    ) -> None:
        _check_ranks(samples, batch, rank, world)
        self._indices = np.arange(samples) if subset is None else _checked_subset(subset, samples)
        self._batch, self._rank, self._world = batch, rank, world
        self.steps_per_epoch: int = -(-len(self._indices) // (batch * world))

    def rows(self, epoch: int, step: int) -> Rows:
        """Return this rank's rows of a step; they are the same in every epoch."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} is not in 0..{self.steps_per_epoch - 1}")
        own = np.arange(self._batch)
        position = (step * self._world + self._rank) * self._batch + own
        zeros = np.zeros(self._batch, np.int64)
        valid = position < len(self._indices)
        samples = self._indices[np.where(valid, position, -1)]
        return Rows(samples, views=zeros, groups=zeros, passes=zeros, partners=own, valid=valid)


def stratified_subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return the indices, int64 and rising, of the same share of every class, at least one image of each.

    Images are taken by rising Philox keys, so a smaller fraction's subset lies inside a larger one's.

    Args:
        labels: int [N].
        fraction: share of each class, in (0, 1].
        seed: key of the choice.
    """
    keys = sort_keys(seed, philox.SUBSET, np.arange(len(labels)), 0)
    order = np.lexsort((keys, labels))
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    rank_in_class = np.arange(len(labels)) - np.repeat(starts, counts)
    wanted = np.maximum(np.floor(counts * fraction + 0.5), 1)
    return np.sort(order[rank_in_class < np.repeat(wanted, counts)])


def sort_keys(seed: int, stream: int, items: np.ndarray, number: int) -> np.ndarray:
    """Return a sort key, int64 [n], of each item, int64 [n], drawn at counter (item, number, stream, 0)."""
    keys = np.empty(len(items), np.int64)
    for start in range(0, len(items), CHUNK):
        part = slice(start, start + CHUNK)
        high, low, _, _ = philox.philox(items[part], number, stream, 0, *philox.key_words(seed))
        keys[part] = philox.sort_key(high, low)
    return keys


def _padded(blocks: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return `blocks[places]`, any block where there is none."""
    return blocks[np.minimum(places, len(blocks) - 1)] if len(blocks) else np.zeros(len(places), np.int64)


def _check_ranks(samples: int, batch: int, rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} is not one of {world} ranks")
    if not 0 < samples < 2**31:
        raise UserError(f"a split of {samples} images cannot be sampled", expected="between 1 and 2^31 - 1 images")
    if batch < 1:
        raise UserError(f"a batch of {batch} is empty", remedy="set train.batch to at least 1 for each rank")


def _check_groups(batch: int, world: int, group: int) -> None:
    """Raise UserError unless every rank's share of a batch is a whole number of groups."""
    if batch % (world * group) == 0:
        return
    share = batch // world
    divisors = [size for size in range(2, min(group, share) + 1, 2) if batch % (world * size) == 0]
    larger = f"set train.batch to a multiple of {world * group}"
    raise UserError(
        f"a batch of {batch} views on {world} rank(s) is no whole number of mixing groups",
        expected=f"a multiple of augment.mix_group x ranks = {group} x {world}",
        remedy=f"set augment.mix_group to {divisors[-1]}, or {larger}" if divisors else larger,
    )


def _checked_subset(subset: np.ndarray, samples: int) -> np.ndarray:
    indices = np.asarray(subset, np.int64)
    if len(np.unique(indices)) != len(indices) or (len(indices) and not 0 <= indices.min() <= indices.max() < samples):
        raise UserError(f"a subset must name images 0..{samples - 1}, each once")
    return indices
