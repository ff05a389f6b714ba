"""Teach: ask a teacher once for every view that a run will look at, and keep the answers."""

import logging
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from deitfast.config.recipe import Recipe
from deitfast.data_loaders import training_sampler, training_subset
from deitfast.distill.cache import TeacherCache
from deitfast.distill.cache_key import open_cache, software_changes, teacher_fingerprint
from deitfast.distill.encoding import encode
from deitfast.distill.targets import CachedTargets, OnlineTeacher, PerImage
from deitfast.distill.teacher import Teacher, load_teacher
from deitfast.interrupt import Interrupted, Stop, catching_signals
from deitfast.progress import Bar, Display, duration, volume
from deitfast.runtime import Runtime
from pipelines.augment.chain import AugmentedBatch, augment
from pipelines.batch import Batch, Loader
from pipelines.errors import DeitfastError, UserError
from pipelines.loaders.factory import open_loader
from pipelines.rng.sampler import EvalSampler, Sampler
from pipelines.storage.dataset import Dataset

log = logging.getLogger("deitfast")
SPOT_CHECK = 64
"""Views, at least, that a spot check asks for again."""
NEAR_TIE = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.005}
"""By precision: difference, as a share of the largest logit, that another batch may make to a teacher's answer."""


@dataclass(frozen=True)
class TeachJob:
    """What to ask, of whom, and about what."""

    recipe: Recipe
    """Of the students; `distill.cache` says where the answers go."""
    data: Path


def teach(job: TeachJob, runtime: Runtime, display: Display) -> TeacherCache:
    """Fill a cache; go on where it was left; of one that is complete, ask for some views again.

    Raises:
        UserError: data set, teacher, recipe and the cache that is there do not fit each other.
        DeitfastError: damaged data or cache, a full disk, or a teacher who says something else than the cache.
        KeyboardInterrupt: asked to stop; the answers so far are kept.
    """
    with closing(Dataset.open(job.data)) as dataset:
        loaded = load_teacher(job.recipe.distill, dataset.spec.classes)
        filling = CacheBuilder(job.recipe, dataset, runtime, display)
        with closing(filling), catching_signals(runtime) as stop:
            cache = open_cache(job.recipe, dataset, filling.loader.name, loaded.identity(), runtime)
            if cache is None:
                raise UserError("nowhere to keep the answers", remedy="name the cache's folder with --out")
            teacher = Teacher(loaded, job.recipe, runtime)
            answers = CachedTargets(cache, job.recipe, len(dataset.spec.classes), lambda: teacher, runtime)
            with stop.interruptible():
                spot_check(answers, job.recipe, dataset, runtime)
            filling.build(answers, stop)
        return TeacherCache.open(cache.folder)


def open_targets(
    recipe: Recipe, dataset: Dataset, loader: str, runtime: Runtime, display: Display
) -> OnlineTeacher | CachedTargets | PerImage | None:
    """Return where a training's targets come from: nowhere, its teacher, its cache, or both.

    Args:
        recipe: of the run.
        dataset: that it trains on.
        loader: name of the loader that makes its pixels.
        runtime: where it runs.
        display: for filling a cache of per-image targets, which has to be complete before training begins.

    Raises:
        UserError: teacher, cache, data set and recipe do not fit each other.
        DeitfastError: the cache is damaged, or does not say what the teacher says.
    """
    distill, classes = recipe.distill, dataset.spec.classes
    if distill.mode == "none":
        return None
    known, loaded = teacher_fingerprint(recipe, classes)
    cache = open_cache(recipe, dataset, loader, known, runtime)

    def teacher() -> Teacher:
        assert loaded  # only a complete cache does without, and that never asks
        return Teacher(loaded, recipe, runtime)

    if cache is None:
        return OnlineTeacher(teacher(), recipe)
    if cache.complete and runtime.is_main_process:
        cache.require_whole()
    answers = CachedTargets(cache, recipe, len(classes), teacher, runtime)
    if changes := software_changes(cache, runtime):
        log.warning("%s was begun with other software: %s", cache.folder, ", ".join(changes))
    if loaded and (changes or not cache.complete):
        spot_check(answers, recipe, dataset, runtime)
    if distill.targets != "per_image":
        return answers
    if not cache.complete:
        with closing(CacheBuilder(recipe, dataset, runtime, display)) as filling, catching_signals(runtime) as stop:
            filling.build(answers, stop)
    return PerImage(TeacherCache.open(cache.folder), recipe, len(classes), runtime.device)


class CacheBuilder:
    """Goes through every view of a cache, including those that a training's batches leave out."""

    def __init__(self, recipe: Recipe, dataset: Dataset, runtime: Runtime, display: Display) -> None:
        self.recipe, self.runtime, self.display = recipe, runtime, display
        self.sampler = views_of(recipe, dataset, runtime, recipe.train.batch)
        self.loader = loader_of(recipe, dataset, runtime, self.sampler)

    def close(self) -> None:
        """Release the loader."""
        self.loader.close()

    def build(self, answers: CachedTargets, stop: Stop) -> None:
        """Ask for what is missing, every rank its share, and complete the cache.

        Raises:
            KeyboardInterrupt: asked to stop.
            DeitfastError: a part is damaged, or the disk is full.
        """
        cache, runtime = answers.cache, self.runtime
        manifest, there = cache.manifest, cache.count()
        total = manifest.views * manifest.targets_per_view
        size = f"{volume(manifest.bytes)} when complete"
        log.info("%s: %s of %s %s targets are there; %s", cache.folder, f"{there:,}", f"{total:,}",
                 manifest.targets.kind, size)  # fmt: skip
        began = time.monotonic()
        if there < total:
            with self.display.bar(f"teaching {cache.folder.name}", total) as bar:
                bar.start(there)
                for slot in range(manifest.views):
                    self._fill_epoch(slot, answers, stop, bar)
        if runtime.world > 1:
            dist.barrier()  # every rank's answers are on the disk
        if runtime.is_main_process and not cache.finish():
            if not self.recipe.loader.skip_bad:
                raise DeitfastError(f"{cache.folder} is still not complete", remedy="run the same command again")
            log.warning("%s lacks the views of images that cannot be read, and so is not complete", cache.folder)
        elif there < total:
            seconds = time.monotonic() - began
            log.info("%s is complete: %s images in %s, %s images/s", cache.folder, f"{total - there:,}",
                     duration(seconds), f"{(total - there) / seconds:,.0f}")  # fmt: skip
        runtime.barrier()

    def _fill_epoch(self, slot: int, answers: CachedTargets, stop: Stop, bar: Bar) -> None:
        """Ask for the missing views of one epoch, from the first step that has any."""
        answers.load_epoch(slot)
        steps = range(self.sampler.steps_per_epoch)
        first = next((step for step in steps if self._missing(slot, step, answers).any()), None)
        if first is None:
            return
        batches = self.loader.epoch(slot, first)
        try:
            for step in range(first, self.sampler.steps_per_epoch):
                with stop.interruptible():
                    batch = next(batches)
                wanted = self._missing(slot, step, answers)
                if batch.skipped:
                    wanted &= batch.valid.cpu().numpy()
                if wanted.any():
                    answers.ask(model_input(batch, self.recipe, self.runtime), wanted)
                    bar.advance(int(wanted.sum()) * self.runtime.world, f"{bar.rate():,.0f} images/s")
                if stop.signal:
                    raise Interrupted(stop.signal)
        except Interrupted as request:
            log.info("%s: stopped; the same command goes on from here", request)
            raise
        finally:
            answers.save()

    def _missing(self, slot: int, step: int, answers: CachedTargets) -> np.ndarray:
        rows = self.sampler.rows(slot, step)
        return rows.valid & answers.missing(rows.views, rows.samples)


def spot_check(answers: CachedTargets, recipe: Recipe, dataset: Dataset, runtime: Runtime) -> None:
    """Make some views anew, ask the teacher again, and compare with what the cache has of them; on rank 0, for all.

    Raises:
        DeitfastError: the teacher says something else, and not for a near-tie.
    """
    if not runtime.is_main_process:
        return
    alone = replace(runtime, world=1)
    group = recipe.augment.mix_group
    sampler = views_of(recipe, dataset, alone, -(-SPOT_CHECK // group) * group)
    checked = 0
    with closing(loader_of(recipe, dataset, alone, sampler)) as loader:
        for slot, step in {(0, 0), (answers.cache.manifest.views - 1, sampler.steps_per_epoch // 2)}:
            rows = sampler.rows(slot, step)
            answers.load_epoch(slot)
            known = rows.valid & ~answers.missing(rows.views, rows.samples)
            if known.any():
                with closing(loader.epoch(slot, step)) as batches:  # pyright: ignore
                    inputs = model_input(next(batches), recipe, runtime)
                _compare(answers, inputs, known, runtime)
                checked += int(known.sum())
    if checked:
        log.info("%s: %d views made anew and asked for again: all as before", answers.cache.folder, checked)


def _compare(answers: CachedTargets, inputs: AugmentedBatch, known: np.ndarray, runtime: Runtime) -> None:
    """Hold the known rows of one batch against the teacher's answers now."""
    logits = answers.teacher().logits(inputs.pixels)[torch.from_numpy(known).to(runtime.device)]
    then, now = answers.kept(inputs, known), encode(logits, answers.spec)
    label = then.label if then.label.ndim == 1 else then.label[:, 0]
    off = logits.amax(-1) - logits.gather(1, label[:, None]).squeeze(1)
    if then.logit is not None and now.logit is not None:
        off = off.maximum((then.logit - now.logit).abs().amax(-1))
    near = NEAR_TIE[runtime.precision] * max(1.0, float(logits.abs().max()))
    worst = int(off.argmax())
    if off[worst] > near:
        sample, view = (int(values[known][worst]) for values in (inputs.params.sample, inputs.params.view))
        raise DeitfastError(
            f"the teacher cache {answers.cache.folder} does not say what the teacher says now",
            expected=f"class {int(logits[worst].argmax())} for view {view} of image {sample}, or a near-tie with it",
            found=f"class {int(label[worst])} in the cache, {float(off[worst]):.4f} apart in logits",
            remedy="views are not made as when it was filled (another loader or library?): fill a new one",
        )


def views_of(recipe: Recipe, dataset: Dataset, runtime: Runtime, batch: int) -> Sampler:
    """Return the rows that a teacher looks at: all views of the run, or each image whole."""
    if recipe.distill.targets != "per_image":
        return training_sampler(dataset, recipe, runtime, batch, include_partial=True)
    samples, subset = dataset.split("train").num_samples, training_subset(dataset, recipe)
    return EvalSampler(samples, min(batch // runtime.world, samples), runtime.rank, runtime.world, subset)


def loader_of(recipe: Recipe, dataset: Dataset, runtime: Runtime, sampler: Sampler) -> Loader:
    """Return the loader of those rows."""
    reader, train = dataset.split("train"), recipe.distill.targets != "per_image"
    return open_loader(reader, recipe.augment, recipe.loader, sampler, train=train, device=runtime.device)


def model_input(batch: Batch, recipe: Recipe, runtime: Runtime) -> AugmentedBatch:
    """Return what the teacher sees of a batch: mixed views, or images as in evaluation."""
    train = recipe.distill.targets != "per_image"
    return augment(batch, recipe.augment, dtype=runtime.input_dtype, train=train, kernels=recipe.train.kernels)
