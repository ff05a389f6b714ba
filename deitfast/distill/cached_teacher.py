"""A teacher whose targets are computed once: what a cache has is read, the rest is computed and written there."""

import time
from collections.abc import Callable

import numpy as np
import torch

from deitfast.distill.cache import MemoryCache, TeacherCache
from deitfast.distill.cache_files import is_present
from deitfast.distill.encoding import TeacherTargets, encode, from_records, to_records
from deitfast.distill.teacher import Teacher
from pipelines.augment.chain import AugmentedBatch

FLUSH_SECONDS = 10.0
"""Targets are on the disk after this long at the latest: what a kill may cost."""


class CachedTeacher:
    """Reads one pass of a cache at a time (hard targets of ImageNet: 2.5 MB a view), the one that batches are of.

    A student learns from the targets as the cache stores them, in its first epoch as in every later run.
    """

    def __init__(self, cache: TeacherCache | MemoryCache, load: Callable[[], Teacher], device: torch.device) -> None:
        """Read and write `cache`; call `load` when the teacher is first needed, if ever; targets are on `device`."""
        self.cache, self.views_computed = cache, 0
        self._load, self._device = load, device
        self._teacher: Teacher | None = None
        self._first, self._rows = -1, np.empty((0, 0))
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray, TeacherTargets]] = []
        self._flushed = time.monotonic()

    @property
    def teacher(self) -> Teacher:
        """The teacher, loaded when it is first needed."""
        if self._teacher is None:
            self._teacher = self._load()
        return self._teacher

    def targets(self, inputs: AugmentedBatch) -> TeacherTargets:
        """Return a batch's targets: one gather on the host and a copy that the host does not wait for.

        Which targets are missing is known on the host, so a complete cache costs no synchronization. What the teacher
        says of the black picture in the place of an image that cannot be read is not stored: the image may be readable
        another time.
        """
        records = self._records(inputs.params.view, inputs.params.sample)
        missing = ~is_present(records)
        if inputs.skipped and missing.any():
            records[missing] = 0
            missing &= inputs.valid.cpu().numpy()
        return self.compute(inputs, missing) if missing.any() else from_records(records, self._device)

    def missing(self, views: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Return which targets, of int [n] views of one pass and samples, are not in the cache: bool [n]."""
        return ~is_present(self._records(views, samples))

    def stored(self, views: np.ndarray, samples: np.ndarray) -> TeacherTargets:
        """Return what the cache has for int [n] views of one pass and samples, none of which is missing."""
        return from_records(self._records(views, samples), self._device)

    def compute(self, inputs: AugmentedBatch, wanted: np.ndarray) -> TeacherTargets:
        """Run the teacher on a batch and return its targets; store those of the rows that are `wanted`, bool [B]."""
        targets = encode(self.teacher.logits(inputs.pixels), self.cache.spec)
        self._pending.append((wanted, inputs.params.view, inputs.params.sample, targets))
        self.views_computed += int(wanted.sum())
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.save()
        return targets

    def save(self) -> None:
        """Write the targets computed since the last time. The only place here that waits for the device.

        Raises:
            DeitfastError: the teacher's logits were not finite (nothing is written), or the disk is full.
        """
        if self._pending:
            self.teacher.require_finite()
            columns = zip(*(entry[:3] for entry in self._pending), strict=True)
            wanted, views, samples = (np.concatenate(column) for column in columns)
            records = to_records([entry[3] for entry in self._pending], self.cache.spec)[wanted]
            views, samples = views[wanted], samples[wanted]
            self._pending.clear()
            self.cache.write(views, samples, records)
            self._rows[views - self._first, samples] = records  # all of the pass that is loaded: see `_records`
        self._flushed = time.monotonic()

    def _records(self, views: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Return the records, `TargetSpec.record` [n], of views of one pass, which is read if it is another one."""
        first = int(views[0]) // self.cache.repeats * self.cache.repeats
        if first != self._first:
            self.save()
            self._rows, self._first = self.cache.read_pass(first), first
        return self._rows[views - first, samples]
