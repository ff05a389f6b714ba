"""Filling a teacher cache: run the teacher on every view that is missing; and checking that it still says the same."""

import logging
import time
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch

from deitfast.config.recipe import Recipe
from deitfast.data_loaders import training_sampler, training_subset
from deitfast.distill.cache import TeacherCache
from deitfast.distill.cached_teacher import CachedTeacher
from deitfast.distill.encoding import encode
from deitfast.interrupt import Interrupted, Stop
from deitfast.progress import Bar, Display, duration, volume
from deitfast.runtime import Runtime
from pipelines.augment.chain import AugmentedBatch, augment
from pipelines.batch import Batch, Loader
from pipelines.errors import DeitfastError
from pipelines.loaders.factory import open_loader
from pipelines.rng.sampler import EvalSampler, Sampler
from pipelines.storage.dataset import Dataset

log = logging.getLogger("deitfast")
SPOT_CHECK = 64
"""Views, at least, that a spot check runs the teacher on again."""
NEAR_TIE = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.005}
"""By precision: how far, as a share of the largest logit, another batch may move a teacher's logits."""


@dataclass(frozen=True)
class TeacherViews:
    """What a teacher sees: every view of a run, also those that its batches leave out; or each image, whole."""

    recipe: Recipe
    dataset: Dataset
    runtime: Runtime

    @property
    def whole_images(self) -> bool:
        """Whether the teacher sees each image once, as in evaluation."""
        return self.recipe.distill.targets == "per_image"

    def sampler(self, batch: int) -> Sampler:
        """Return the rows of steps of `batch` views over all ranks."""
        recipe, dataset, runtime = self.recipe, self.dataset, self.runtime
        if not self.whole_images:
            return training_sampler(dataset, recipe, runtime, batch, include_partial=True)
        samples, subset = dataset.split("train").num_samples, training_subset(dataset, recipe)
        return EvalSampler(samples, min(batch // runtime.world, samples), runtime.rank, runtime.world, subset)

    def loader(self, sampler: Sampler) -> Loader:
        """Return the loader of those rows."""
        reader, recipe, train = self.dataset.split("train"), self.recipe, not self.whole_images
        return open_loader(reader, recipe.augment, recipe.loader, sampler, train=train, device=self.runtime.device)

    def augmented(self, batch: Batch) -> AugmentedBatch:
        """Return a batch as the teacher sees it."""
        recipe, dtype, train = self.recipe, self.runtime.input_dtype, not self.whole_images
        return augment(batch, recipe.augment, dtype=dtype, train=train, kernels=recipe.train.kernels)


def build_cache(cache: TeacherCache, teacher: CachedTeacher, views: TeacherViews, stop: Stop, display: Display) -> None:
    """Run the teacher on all views that are missing, each rank on its share, and complete the cache.

    Raises:
        Interrupted: asked to stop; the targets so far are kept.
        DeitfastError: damaged data or a damaged part, a full disk, or logits that are not finite.
    """
    runtime, total = views.runtime, cache.manifest.total
    there = runtime.broadcast_from_rank0(cache.count() if runtime.is_main_process else 0)  # all take the same way
    size = f"{volume(cache.manifest.bytes)} when complete"
    log.info("%s: %s of %s %s targets are there; %s", cache.folder, f"{there:,}", f"{total:,}", cache.spec.kind, size)
    began = time.monotonic()
    if there < total:
        sampler = views.sampler(views.recipe.train.batch)
        with closing(views.loader(sampler)) as loader, display.bar(f"teaching {cache.folder.name}", total) as bar:
            bar.start(there)
            try:
                for epoch in range(cache.manifest.views):
                    _build_epoch(epoch, sampler, loader, teacher, views, stop, bar)
                    stop.check(sync=True)
            except Interrupted as request:
                log.info("%s: stopped; the same command continues from here", request)
                raise
    runtime.barrier()  # every rank's targets are on the disk
    if runtime.is_main_process and not cache.finish():
        if not views.recipe.loader.skip_bad:
            raise DeitfastError(f"{cache.folder} is still not complete", remedy="run the same command again")
        log.warning("%s lacks the views of images that cannot be read, and so is not complete", cache.folder)
    elif there < total:
        seconds = time.monotonic() - began
        log.info("%s is complete: %s images in %s, %s images/s", cache.folder, f"{total - there:,}",
                 duration(seconds), f"{(total - there) / seconds:,.0f}")  # fmt: skip
    runtime.barrier()  # the table is there for every rank
    cache.refresh()


def _build_epoch(
    epoch: int, sampler: Sampler, loader: Loader, teacher: CachedTeacher, views: TeacherViews, stop: Stop, bar: Bar
) -> None:
    """Compute the missing targets of one epoch, from the first step that has any."""

    def missing(step: int) -> np.ndarray:
        rows = sampler.rows(epoch, step)
        return rows.valid & teacher.missing(rows.views, rows.samples)

    first = next((step for step in range(sampler.steps_per_epoch) if missing(step).any()), None)
    if first is None:
        return
    batches = loader.epoch(epoch, first, then=views.augmented)
    try:
        for step in range(first, sampler.steps_per_epoch):
            with stop.interruptible():
                inputs = next(batches)
            wanted = missing(step)
            if inputs.skipped:
                wanted &= inputs.valid.cpu().numpy()
            if wanted.any():
                teacher.compute(inputs, wanted)
                bar.advance(int(wanted.sum()) * views.runtime.world, f"{bar.rate():,.0f} images/s")
            if stop.signal:
                break  # several ranks agree on it after the epoch
    finally:
        teacher.save()


def spot_check(cache: TeacherCache, teacher: CachedTeacher, views: TeacherViews) -> None:
    """Make some views again, run the teacher on them, and compare with what the cache has; on rank 0, for all ranks.

    Raises:
        DeitfastError: the teacher's target is another one, and not for a near-tie.
    """
    if not views.runtime.is_main_process:
        return
    views = replace(views, runtime=replace(views.runtime, world=1))
    group = views.recipe.augment.mix_group
    sampler = views.sampler(-(-SPOT_CHECK // group) * group)
    checked = 0
    with closing(views.loader(sampler)) as loader:
        for epoch, step in {(0, 0), (cache.manifest.views - 1, sampler.steps_per_epoch // 2)}:
            rows = sampler.rows(epoch, step)
            known = rows.valid & ~teacher.missing(rows.views, rows.samples)
            if known.any():
                with closing(loader.epoch(epoch, step, then=views.augmented)) as batches:  # pyright: ignore
                    inputs = next(batches)
                _compare(cache, teacher, inputs, known, views.runtime)
                checked += int(known.sum())
    if checked:
        log.info("%s: spot check of %d views: the teacher's targets are the same", cache.folder, checked)


def _compare(
    cache: TeacherCache, teacher: CachedTeacher, inputs: AugmentedBatch, known: np.ndarray, runtime: Runtime
) -> None:
    """Compare the cache's targets for the `known` rows of a batch, bool [B], with the teacher's logits now."""
    views, samples = inputs.params.view[known], inputs.params.sample[known]
    logits = teacher.teacher.logits(inputs.pixels)[torch.from_numpy(known).to(runtime.device)]
    teacher.teacher.require_finite()
    then, now = teacher.stored(views, samples), encode(logits, cache.spec)
    label = then.label if then.label.ndim == 1 else then.label[:, 0]
    off = logits.amax(-1) - logits.gather(1, label[:, None]).squeeze(1)
    if then.logit is not None and now.logit is not None:
        off = off.maximum((then.logit - now.logit).abs().amax(-1))
    near = NEAR_TIE[runtime.precision] * max(1.0, float(logits.abs().max()))
    worst = int(off.argmax())
    if off[worst] > near:
        raise DeitfastError(
            f"the targets in the teacher cache {cache.folder} are not those of the teacher now",
            expected=f"class {int(logits[worst].argmax())} for view {views[worst]} of image {samples[worst]}, "
            "or a near-tie with it",
            found=f"class {int(label[worst])} in the cache, {float(off[worst]):.4f} apart in logits",
            remedy="views are made differently from when it was filled (another loader or library?): fill a new one",
        )
