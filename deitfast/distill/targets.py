"""Where a step's targets come from: a teacher in the loop, a cache, or both."""

import logging
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deitfast.config.recipe import Recipe
from deitfast.distill.cache import TeacherCache
from deitfast.distill.cache_files import is_present
from deitfast.distill.encoding import TeacherTargets, decode, encode, from_records, to_records
from deitfast.distill.teacher import Teacher
from deitfast.runtime import Runtime
from pipelines.augment.chain import AugmentedBatch

log = logging.getLogger("deitfast")
FLUSH_SECONDS = 10.0
"""A teacher's answers are on the disk after this long at the latest: what a kill may cost."""


class Targets(Protocol):
    """What the training loop asks for targets."""

    @property
    def cache(self) -> TeacherCache | None:
        """The cache that keeps targets, if there is one."""
        ...

    teacher_views: int
    """Views that went through the teacher so far."""

    def start_epoch(self, epoch: int) -> None:
        """Get ready for the views of an epoch, from 0."""
        ...

    def get(self, inputs: AugmentedBatch, skipped: int = 0) -> Tensor:
        """Return the targets of a batch, on its device: int64 [B] or [B, 2] (hard), float32 [B, C] (soft).

        Args:
            inputs: the batch as the step sees it.
            skipped: rows whose image cannot be read (`Batch.skipped`); nothing learns from them, whatever their target.
        """
        ...

    def save(self) -> None:
        """Have everything on the disk that the teacher has said so far."""
        ...


class OnlineTeacher:
    """The teacher answers for every batch, and nothing is kept."""

    def __init__(self, teacher: Teacher, recipe: Recipe) -> None:
        self._teacher, self._hard = teacher, recipe.distill.mode == "hard"
        self.cache: TeacherCache | None = None
        self.teacher_views = 0

    def start_epoch(self, epoch: int) -> None:
        """All epochs are alike."""

    def get(self, inputs: AugmentedBatch, skipped: int = 0) -> Tensor:
        """See `Targets`."""
        self.teacher_views += len(inputs.labels)
        logits = self._teacher.logits(inputs.pixels)
        return logits.argmax(-1) if self._hard else logits

    def save(self) -> None:
        """Nothing is kept."""


class CachedTargets:
    """Reads what the cache has; asks the teacher for the rest, once, and the cache keeps the answers.

    The student learns from what the cache keeps of an answer, in its first epoch as in every later run.
    """

    def __init__(
        self, cache: TeacherCache, recipe: Recipe, classes: int, teacher: Callable[[], Teacher], runtime: Runtime
    ) -> None:
        """Read `cache`; call `teacher` when it is first needed, if ever."""
        self.cache, self.spec, self.teacher_views = cache, cache.manifest.targets, 0
        self._recipe, self._classes, self._runtime = recipe, classes, runtime
        self._load, self._teacher = teacher, None
        self._first, self._rows = 0, np.empty((0, 0))
        self._answered: list[tuple[np.ndarray, np.ndarray, np.ndarray, TeacherTargets]] = []
        self._written = time.monotonic()

    def start_epoch(self, epoch: int) -> None:
        """Read what the run looks at in an epoch."""
        self.load_epoch(epoch % self._recipe.views)

    def load_epoch(self, view: int) -> None:
        """Read the views of the pass that `view` is of: for ImageNet 2.5 MB a view of hard targets."""
        repeats = self.cache.manifest.repeats
        self._first = view // repeats * repeats
        self._rows = self.cache.rows(self._first)

    def get(self, inputs: AugmentedBatch, skipped: int = 0) -> Tensor:
        """Return targets as `Targets` does, with one gather on the host and a copy that nobody waits for.

        Which targets are missing is known on the host, so a complete cache costs no synchronization.
        """
        views, samples = inputs.params.view, inputs.params.sample
        records = self._rows[views - self._first, samples]
        missing = ~is_present(records)
        if skipped and missing.any():  # a black picture's answer is not kept for when it can be read again
            missing &= inputs.valid.cpu().numpy()
            records[~is_present(records)] = 0
        if not missing.any():
            return self._targets(from_records(records, self._runtime.device))
        return self._targets(self.ask(inputs, missing))

    def missing(self, views: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Return which of the pass's targets, of int [n] views and samples, are not in the cache: bool [n]."""
        return ~is_present(self._rows[views - self._first, samples])

    def ask(self, inputs: AugmentedBatch, wanted: np.ndarray) -> TeacherTargets:
        """Ask the teacher about a batch, and keep the answers for those rows that are `wanted`, bool [B]."""
        answers = encode(self.teacher().logits(inputs.pixels), self.spec)
        self._answered.append((wanted, inputs.params.view, inputs.params.sample, answers))
        self.teacher_views += int(wanted.sum())
        if time.monotonic() - self._written >= FLUSH_SECONDS:
            self.save()
        return answers

    def kept(self, inputs: AugmentedBatch, some: np.ndarray) -> TeacherTargets:
        """Return the cache's answers to `some` rows of a batch, bool [B], which it has."""
        views, samples = inputs.params.view[some], inputs.params.sample[some]
        return from_records(self._rows[views - self._first, samples], self._runtime.device)

    def teacher(self) -> Teacher:
        """Return the teacher, loaded when it is first asked for."""
        if self._teacher is None:
            self._teacher = self._load()
        return self._teacher

    def save(self) -> None:
        """Write the answers since the last time. The only place here that waits for the device."""
        if self._answered:
            wanted, views, samples = (
                np.concatenate(column) for column in zip(*(entry[:3] for entry in self._answered), strict=True)
            )
            records = to_records([entry[3] for entry in self._answered], self.spec)
            self.cache.add(views[wanted], samples[wanted], records[wanted])
            self._answered.clear()
        self.cache.flush()
        self._written = time.monotonic()

    def _targets(self, answers: TeacherTargets) -> Tensor:
        return decode(answers, self.spec, self._classes, self._recipe.distill.tau)


class PerImage:
    """The teacher has seen each image whole; a mixed view's target is its images' targets, mixed like labels."""

    teacher_views = 0

    def __init__(self, cache: TeacherCache, recipe: Recipe, classes: int, device: torch.device) -> None:
        """Read a cache of one target an image."""
        self.cache, self._rows, self._spec = cache, cache.rows(0)[0], cache.manifest.targets
        self._rows[~is_present(self._rows)] = 0  # images that cannot be read, from which nothing learns
        self._classes, self._tau, self._device = classes, recipe.distill.tau, device

    def start_epoch(self, epoch: int) -> None:
        """All epochs read the same."""

    def get(self, inputs: AugmentedBatch, skipped: int = 0) -> Tensor:
        """Return both images' labels, int64 [B, 2], or logits whose softmax at tau is the mixed distribution."""
        samples = inputs.params.sample
        pair = np.stack([samples, samples[inputs.params.mix_index]], 1)
        answers = from_records(self._rows[pair.ravel()], self._device)
        targets = decode(answers, self._spec, self._classes, self._tau)
        if self._spec.kind == "hard":
            return targets.view(-1, 2)
        own, partner = F.softmax(targets / self._tau, -1).view(len(pair), 2, -1).unbind(1)
        lam = inputs.lam[:, None]
        return self._tau * (lam * own + (1 - lam) * partner).clamp(min=1e-30).log()

    def save(self) -> None:
        """Nothing is added."""


def describe(recipe: Recipe, cache: TeacherCache | None) -> str:
    """Return in a line which targets a run learns from, for its log."""
    distill = recipe.distill
    each = {
        "exact": "exact (a view of its own in every epoch)",
        "reused": f"reused ({distill.views} views of each image, again and again; approximates DeiT)",
        "per_image": "per image, mixed like labels (not DeiT)",
    }[distill.targets]
    if cache is None:
        return f"{distill.mode} targets, {each}; the teacher answers in the loop"
    if cache.complete:
        return f"{distill.mode} targets, {each}; from {cache.folder}, which is complete: no teacher is loaded"
    share = cache.count() / (cache.manifest.views * cache.manifest.targets_per_view)
    return f"{distill.mode} targets, {each}; {share:.0%} of them in {cache.folder}, the teacher adds what is missing"
