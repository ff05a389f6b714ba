"""Where a step's distillation targets come from: the teacher in the loop, a cache of its targets, or one per image."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deitfast.config.recipe import Recipe
from deitfast.distill.build_cache import TeacherViews, build_cache, spot_check
from deitfast.distill.cache import MemoryCache, TeacherCache, is_shared, require_shared
from deitfast.distill.cache_files import is_present
from deitfast.distill.cache_key import (
    cache_folder,
    needed_manifest,
    require_fit,
    software_changes,
    teacher_fingerprint,
    uses_cache,
)
from deitfast.distill.cache_manifest import Manifest, is_cache
from deitfast.distill.cached_teacher import CachedTeacher
from deitfast.distill.encoding import decode, from_records
from deitfast.distill.teacher import LoadedTeacher, Teacher
from deitfast.interrupt import Stop
from deitfast.progress import Display
from deitfast.runtime import Runtime
from pipelines.augment.chain import AugmentedBatch
from pipelines.storage.dataset import Dataset

log = logging.getLogger("deitfast")


class Targets(Protocol):
    """What the training loop needs of targets."""

    @property
    def teacher_views(self) -> int:
        """Views that went through the teacher so far."""
        ...

    @property
    def needs_teacher(self) -> bool:
        """Whether `get` may run the teacher, which reads the batch's pixels (not patches)."""
        ...

    def get(self, inputs: AugmentedBatch) -> Tensor:
        """Return the targets of a batch, on its device: int64 [B] or [B, 2] (hard), float32 [B, C] (soft).

        `inputs` is the batch as the step sees it. Nothing learns from rows whose image cannot be read, whatever their
        target.
        """
        ...

    def save(self) -> None:
        """Write to the cache what the teacher has computed since the last time. Waits for the device.

        Raises:
            DeitfastError: the teacher's logits were not finite, or the disk is full.
        """
        ...

    def finish(self, stop: Stop, display: Display) -> None:
        """Complete the cache with the views that no batch had room for; every rank calls it, after the last epoch.

        Raises:
            Interrupted: asked to stop; the targets so far are stored.
        """
        ...

    def describe(self) -> str:
        """Return in a line which targets a run learns from, for its log."""
        ...


class OnlineTeacher:
    """The teacher runs on every batch, and nothing is stored."""

    needs_teacher = True

    def __init__(self, teacher: Teacher, recipe: Recipe) -> None:
        """Use `teacher` in a run of `recipe`."""
        self._teacher, self._recipe, self.teacher_views = teacher, recipe, 0

    def get(self, inputs: AugmentedBatch) -> Tensor:
        """See `Targets`."""
        self.teacher_views += len(inputs.labels)
        logits = self._teacher.logits(inputs.pixels)
        return logits.argmax(-1) if self._recipe.distill.mode == "hard" else logits

    def save(self) -> None:
        """Store nothing; check that the logits were finite."""
        self._teacher.require_finite()

    def finish(self, stop: Stop, display: Display) -> None:
        """Nothing to complete."""

    def describe(self) -> str:
        """See `Targets`."""
        return f"{_kind(self._recipe)}; the teacher runs in the loop"


class CachedTargets:
    """What the cache has is read; the teacher computes the rest, once, and the cache stores it."""

    def __init__(self, cache: TeacherCache | MemoryCache, teacher: CachedTeacher, views: TeacherViews) -> None:
        """Decode the targets of `teacher`, which reads and writes `cache`, for a run that looks at `views`."""
        self.cache, self._teacher, self._views = cache, teacher, views

    @property
    def teacher_views(self) -> int:
        """See `Targets`."""
        return self._teacher.views_computed

    @property
    def needs_teacher(self) -> bool:
        """See `Targets`."""
        return not self.cache.complete

    def get(self, inputs: AugmentedBatch) -> Tensor:
        """See `Targets`."""
        classes, tau = len(self._views.dataset.spec.classes), self._views.recipe.distill.tau
        return decode(self._teacher.targets(inputs), self.cache.spec, classes, tau)

    def save(self) -> None:
        """See `Targets`."""
        self._teacher.save()

    def finish(self, stop: Stop, display: Display) -> None:
        """See `Targets`."""
        if isinstance(self.cache, TeacherCache) and not self.cache.complete:
            build_cache(self.cache, self._teacher, self._views, stop, display)

    def describe(self) -> str:
        """See `Targets`."""
        kind = _kind(self._views.recipe)
        if isinstance(self.cache, MemoryCache):
            return f"{kind}; looked up as from a complete teacher cache"
        if self.cache.complete:
            return f"{kind}; from {self.cache.folder}, which is complete: no teacher is loaded"
        share = self.cache.count() / self.cache.manifest.total
        return f"{kind}; {share:.0%} of them in {self.cache.folder}, the teacher adds what is missing"


class PerImageTargets:
    """The teacher has seen each image whole; a mixed view's target is its images' targets, mixed like labels."""

    needs_teacher, teacher_views = False, 0

    def __init__(self, cache: TeacherCache, recipe: Recipe, classes: int, device: torch.device) -> None:
        """Read a cache of one target an image."""
        self._folder, self._spec, self._rows = cache.folder, cache.spec, cache.read_pass(0)[0]
        self._rows[~is_present(self._rows)] = 0  # images that cannot be read, from which nothing learns
        self._recipe, self._classes, self._device = recipe, classes, device

    def get(self, inputs: AugmentedBatch) -> Tensor:
        """Return both images' labels, int64 [B, 2], or logits whose softmax at tau is the mixed distribution."""
        samples, tau = inputs.params.sample, self._recipe.distill.tau
        pair = np.stack([samples, samples[inputs.params.mix_index]], 1)
        targets = decode(from_records(self._rows[pair.ravel()], self._device), self._spec, self._classes, tau)
        if self._spec.kind == "hard":
            return targets.view(-1, 2)
        own, partner = F.softmax(targets / tau, -1).view(len(pair), 2, -1).unbind(1)
        lam = inputs.lam[:, None]
        return tau * (lam * own + (1 - lam) * partner).clamp(min=1e-30).log()

    def save(self) -> None:
        """Nothing to store."""

    def finish(self, stop: Stop, display: Display) -> None:
        """Nothing to complete."""

    def describe(self) -> str:
        """See `Targets`."""
        return f"{_kind(self._recipe)}; from {self._folder}: no teacher is loaded"


def _kind(recipe: Recipe) -> str:
    distill = recipe.distill
    kinds = {
        "exact": "exact (a view of its own in every epoch)",
        "reused": f"reused ({distill.views} views of each image, again and again; approximates DeiT)",
        "per_image": "per image, mixed like labels (not DeiT)",
    }
    return f"{distill.mode} targets, {kinds[distill.targets]}"


@dataclass(frozen=True)
class TargetPlan:
    """Where a run's targets will come from. Until `open` nothing is written and the teacher does not run."""

    views: TeacherViews
    loaded: LoadedTeacher | None
    """The teacher, on the CPU; None where a complete cache does without."""
    manifest: Manifest
    """What the run's cache has to be like."""
    folder: Path | None
    """The run's cache, which need not be there; None: the teacher runs in the loop."""

    def open(self, stop: Stop, display: Display) -> Targets:
        """Open cache and teacher, and compute targets per image; every rank calls it.

        Raises:
            UserError: the cache cannot be used; see `open_cache`.
            DeitfastError: the cache is damaged, the disk is full, or the teacher says something else than the cache.
            Interrupted: asked to stop; the targets so far are stored.
        """
        recipe, runtime = self.views.recipe, self.views.runtime
        if self.folder is None:
            return OnlineTeacher(self._teacher(), recipe)
        unnamed = recipe.distill.cache == "auto" and recipe.distill.targets == "exact"
        if unnamed and not is_shared(self.folder, runtime):
            log.warning(
                "the machines do not share %s: the teacher runs in the loop, and its targets are not kept. To keep "
                "them: `deitfast teach --out CACHE` on one machine, a copy on each, --cache CACHE",
                self.folder.parent,
            )
            return OnlineTeacher(self._teacher(), recipe)
        cache, teacher = self.open_cache(self.folder, stop)
        if recipe.distill.targets != "per_image":
            return CachedTargets(cache, teacher, self.views)
        if not cache.complete:
            build_cache(cache, teacher, self.views, stop, display)
        return PerImageTargets(cache, recipe, self.manifest.classes, runtime.device)

    def open_cache(self, folder: Path, stop: Stop, *, check: bool = False) -> tuple[TeacherCache, CachedTeacher]:
        """Open the cache, or start it where there is none, and check it.

        Args:
            folder: of the cache.
            stop: ends the checks.
            check: have the teacher compute some views again also where the cache is complete and the software the same.

        Raises:
            UserError: the ranks do not see the same folder, or something else is in it.
            DeitfastError: as `open`.
        """
        runtime = self.views.runtime
        if runtime.is_main_process and not is_cache(folder):
            TeacherCache.create(folder, self.manifest)
        runtime.barrier()  # it is there for every rank
        require_shared(folder, runtime)
        cache = TeacherCache.open(folder)
        require_fit(folder, cache.manifest, self.manifest)
        teacher = CachedTeacher(cache, self._teacher, runtime.device)
        if changes := software_changes(cache.manifest, runtime):
            log.warning("%s was started with other software: %s", folder, ", ".join(changes))
        with stop.interruptible():
            if cache.complete and runtime.is_main_process:
                cache.remove_leftovers()
                cache.require_intact()
            if self.loaded and (check or changes or not cache.complete):
                spot_check(cache, teacher, self.views)
        return cache, teacher

    def _teacher(self) -> Teacher:
        assert self.loaded  # only a complete cache does without, and that has every target
        return Teacher(self.loaded, self.views.recipe, self.views.runtime)


def plan_targets(
    recipe: Recipe, dataset: Dataset, loader: str, runtime: Runtime, *, teacher_required: bool = False
) -> TargetPlan | None:
    """Decide where a run's targets will come from, and check that teacher, cache, data set and recipe fit; only reads.

    Args:
        recipe: of the run.
        dataset: that it trains on.
        loader: name of the loader that makes its pixels.
        runtime: where it runs.
        teacher_required: load the teacher also where a complete cache does without.

    Raises:
        UserError: there is no such teacher, or teacher, cache, data set and recipe do not fit each other.
        DeitfastError: the cache or the teacher's weights are damaged.
    """
    if recipe.distill.mode == "none":
        return None
    fingerprint, loaded = teacher_fingerprint(recipe, dataset.spec.classes, required=teacher_required)
    manifest = needed_manifest(recipe, dataset, loader, fingerprint, runtime)
    folder = cache_folder(recipe, dataset, manifest) if uses_cache(recipe) else None
    if folder is not None and is_cache(folder):
        require_fit(folder, TeacherCache.open(folder).manifest, manifest)
    same_pixels = replace(recipe, loader=replace(recipe.loader, name=loader))  # also where `auto` would choose again
    return TargetPlan(TeacherViews(same_pixels, dataset, runtime), loaded, manifest, folder)
