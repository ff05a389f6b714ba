"""Train: from a recipe and a data set to a run's folder. `Run.run` reads top to bottom."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from deitfast.config.recipe import Recipe
from deitfast.data_loaders import open_split, open_training
from deitfast.distill.build_cache import CacheBuilder, open_targets
from deitfast.distill.targets import CachedTargets
from deitfast.distill.targets import describe as describe_targets
from deitfast.eval.evaluate import evaluate, final_head
from deitfast.interrupt import Interrupted, Stop, catching_signals
from deitfast.models.vit import reads_patches
from deitfast.progress import Bar, Display, duration, logging_to
from deitfast.run_folder import RunFolder, RunInfo
from deitfast.runtime import Runtime
from deitfast.train.callbacks import Callbacks
from deitfast.train.optim import peak_lr
from deitfast.train.schedule import learning_rate
from deitfast.train.state import DivergedError, TrainState
from deitfast.train.step import TrainStep
from deitfast.weights import checkpoint
from deitfast.weights.adapt import init_from_pretrained
from pipelines.augment.chain import augment
from pipelines.batch import Batch, Loader
from pipelines.device import explain_oom
from pipelines.errors import DeitfastError
from pipelines.files import file_lock, write_text
from pipelines.storage.dataset import Dataset

log = logging.getLogger("deitfast")
LOOKS_AN_EPOCH = 50
"""How often an epoch looks at its loss: the only host synchronizations between checkpoints."""
STEP_MEMORY = ("the training step", "lower train.batch, raise train.accumulate, or take a smaller model")
"""What runs out of memory in a step, and what to do then."""


@dataclass(frozen=True)
class TrainJob:
    """What to train, on what, into which folder."""

    recipe: Recipe
    data: Path
    out: Path
    resume: bool
    command: tuple[str, ...]
    tensorboard: bool = False


def train(job: TrainJob, runtime: Runtime, display: Display) -> dict[str, Any]:
    """Train as `job` says and return the last epoch's row of metrics.jsonl.

    Raises:
        UserError: data set, teacher, run folder and recipe do not fit each other, or another run is in the folder.
        DeitfastError: damaged data or checkpoint, full disk, or a loss that stays non-finite.
        KeyboardInterrupt: asked to stop; a checkpoint was written.
    """
    with closing(Dataset.open(job.data)) as dataset:
        folder = RunFolder(runtime.broadcast_from_rank0(job.out))
        run = Run(job, runtime, display, dataset, folder)
        spec, data = dataset.spec, str(job.data.resolve())
        info = RunInfo(data, spec.name, spec.fingerprint, spec.classes, job.command, run.learner.started)
        with file_lock(folder.path, "run") if runtime.is_main_process else nullcontext():
            if runtime.is_main_process:
                folder.open(job.recipe, info, resume=job.resume)
            runtime.barrier()  # nobody goes on before the folder is open
            with logging_to(folder.log if runtime.is_main_process else None):
                return run.run()


class Run:
    """One call of `train`: what it holds open while it goes on."""

    def __init__(self, job: TrainJob, runtime: Runtime, display: Display, dataset: Dataset, folder: RunFolder) -> None:
        recipe = job.recipe
        self.recipe, self.runtime, self.display, self.folder = recipe, runtime, display, folder
        self.dataset, self.spec = dataset, dataset.spec
        self.loader = open_training(dataset, recipe, runtime)
        self.targets = open_targets(recipe, dataset, self.loader.name, runtime, display)
        self.validation = open_split(dataset, "val", recipe, runtime) if "val" in self.spec.splits else None
        start = partial(init_from_pretrained, spec=recipe.model, classes=self.spec.classes)
        begun = folder.checkpoint.exists()  # the weights come out of the checkpoint then
        self.learner = TrainStep(recipe, len(self.spec.classes), runtime, None if begun else start)
        # the kernels write what a transformer's projection reads; a teacher in the loop looks at pixels
        needs_teacher = self.targets and not (self.targets.cache and self.targets.cache.complete)
        self.patch = 0 if needs_teacher else reads_patches(self.learner.model)
        self.peak = peak_lr(recipe.optim, recipe.train.batch)
        self.position = TrainState.start(runtime.device)
        self.saved = time.monotonic()
        self.first_step_pending = (
            True  # no step was done in this process yet: the first one compiles, which can take minutes
        )
        self.evaluating = 0.0  # seconds that the last evaluation took
        self.watch = Callbacks(folder.path if runtime.is_main_process else None, tensorboard=job.tensorboard)

    def run(self) -> dict[str, Any]:
        """Go through the epochs, from wherever the checkpoint stands."""
        self._greet()
        if self.folder.checkpoint.exists():
            self._go_back()
            log.info("resuming in epoch %d after %d steps", self.position.epoch + 1, self.position.steps)
        elif self.runtime.compile:
            self._save()  # compiling can be interrupted, and nothing can be saved at that moment
        row: dict[str, Any] = {}
        last: DivergedError | None = None
        with catching_signals(self.runtime) as stop, closing(self.watch), closing(self.loader):
            try:
                while self.position.epoch < self.recipe.train.epochs:
                    try:
                        self._train_epoch(stop)
                    except DivergedError as event:
                        self._recover(event, last)
                        last = event
                        continue
                    row = self._finish_epoch(stop)
            except Interrupted as request:
                self._stop(request)
                raise
            self._complete_cache(stop)
        if self.validation:
            self.validation.close()
        return row

    def _stop(self, request: Interrupted) -> None:
        """Save what was learned: what a first step that did not end was doing is not."""
        if not self.first_step_pending:
            try:
                self._save()
            except DivergedError as event:
                log.warning("the loss is not finite at %s: the checkpoint stays as it was", event)
        epoch, steps = self.position.epoch + 1, self.position.steps
        log.info("%s: stopped in epoch %d after %d steps; --resume goes on", request, epoch, steps)

    def _greet(self) -> None:
        recipe, runtime = self.recipe, self.runtime
        parameters = sum(parameter.numel() for parameter in self.learner.model.parameters())
        how = f"{runtime.precision}, compiled" if runtime.compile else runtime.precision
        log.info("%s (%s parameters) on %s, %s", recipe.model.arch, f"{parameters:,}", runtime.device, how)
        steps = self.loader.steps_per_epoch
        log.info("%s: %d epochs of %d steps, loader %s", self.folder.path, recipe.train.epochs, steps, self.loader.name)
        if self.targets:
            log.info("%s", describe_targets(recipe, self.targets.cache))
        if self.validation is None:
            log.info("the data set has no validation split: nothing will be evaluated")

    def _train_epoch(self, stop: Stop) -> None:
        """Run what is left of the current epoch."""
        position, train = self.position, self.recipe.train
        steps = self.loader.steps_per_epoch
        if self.targets:
            self.targets.start_epoch(position.epoch)
        look = max(1, steps // LOOKS_AN_EPOCH)
        with self.display.bar(f"epoch {position.epoch + 1}/{train.epochs}", steps) as bar:
            bar.start(position.steps)
            for batch in self._timed(self.loader.epoch(position.epoch, position.steps), stop):
                with explain_oom(*STEP_MEMORY), stop.interruptible(self.first_step_pending):
                    losses = self._step(batch)
                self.first_step_pending = False
                position.losses += losses
                position.steps += 1
                position.skipped += batch.skipped
                looking = position.steps % look == 0
                if looking:
                    self._look(bar)
                stop.check(sync=looking)
                if time.monotonic() - self.saved >= 60 * train.checkpoint_minutes:
                    self._save()
        self._save()

    def _timed(self, batches: Iterator[Batch], stop: Stop) -> Iterator[Batch]:
        """Pass batches on; count the time in the loader, and in loader and step together."""
        asked = time.monotonic()
        while True:
            with stop.interruptible():
                batch = next(batches, None)
            if batch is None:
                return
            self.position.waited += time.monotonic() - asked
            yield batch
            now = time.monotonic()
            self.position.seconds += now - asked
            asked = now

    def _step(self, batch: Batch) -> Tensor:
        """Take one batch through augmentation, teacher and update; return its losses."""
        position, recipe, runtime = self.position, self.recipe, self.runtime
        dtype, kernels = runtime.input_dtype, recipe.train.kernels
        inputs = augment(batch, recipe.augment, dtype=dtype, train=True, patch=self.patch, kernels=kernels)
        targets = None
        if self.targets:
            before = self.targets.teacher_views
            targets = self.targets.get(inputs, batch.skipped)
            position.teacher_views += self.targets.teacher_views - before
        lr = learning_rate(
            recipe.schedule,
            self.peak,
            recipe.train.epochs,
            self.loader.steps_per_epoch,
            position.epoch,
            position.steps,
        )
        return self.learner.step(inputs, targets, lr, position.step_seed(recipe.train.seed, runtime.rank))

    def _look(self, bar: Bar) -> None:
        """Show where the epoch and the run stand; the one place in it that waits for the device."""
        position, train = self.position, self.recipe.train
        loss = position.means()["loss"]
        seconds = max(position.seconds, 1e-9)
        rate, waiting = position.steps * train.batch / seconds, position.waited / seconds
        steps, done = self.loader.steps_per_epoch * train.epochs, self._steps_done()
        evaluations = -(-(train.epochs - position.epoch) // train.evaluate_every)
        left = duration(seconds / position.steps * (steps - done) + self.evaluating * evaluations)
        bar.reach(position.steps, f"loss {loss:.3f}, {rate:,.0f} images/s, waiting {waiting:.0%}, run ends in {left}")
        if position.steps < self.loader.steps_per_epoch:  # the epoch's last figures are those of its row
            self.watch.look(done, loss=loss, images_per_second=rate, waiting=waiting)

    def _steps_done(self) -> int:
        return self.position.epoch * self.loader.steps_per_epoch + self.position.steps

    def _save(self) -> None:
        if self.targets:
            self.targets.save()
        state = {**self.position.state(), **self.learner.state()}
        if self.runtime.is_main_process:
            checkpoint.save(self.folder.checkpoint, state)
        self.saved = time.monotonic()

    def _go_back(self) -> None:
        """Take up the run where its checkpoint stands."""
        state = checkpoint.load(self.folder.checkpoint, self.runtime.device)
        self.learner.restore(state)
        self.position = TrainState.restore(state, self.runtime.device)

    def _recover(self, event: DivergedError, last: DivergedError | None) -> None:
        """Go back to the last good checkpoint; give up where that does not get any further."""
        again = last is not None and (event.epoch, event.steps) <= (last.epoch, last.steps)
        if again or not self.folder.checkpoint.exists():
            raise DeitfastError(
                f"the loss is not finite at {event}",
                remedy="start a new run with a lower optim.lr, with optim.clip, or with train.amp=off",
            ) from event
        log.warning("the loss is not finite at %s: going back to the last checkpoint", event)
        self._go_back()

    def _finish_epoch(self, stop: Stop) -> dict[str, Any]:
        """Evaluate, write the epoch's row, and move on to the next."""
        position, train = self.position, self.recipe.train
        position.sum_over_ranks(self.runtime.world)
        images, epoch = position.steps * train.batch, position.epoch + 1
        row: dict[str, Any] = {
            "epoch": epoch,
            **position.means(),
            "lr": self.learner.optimizer.param_groups[0]["lr"],
            "images": images,
            "seconds": round(position.seconds, 3),
            "images_per_second": round(images / max(position.seconds, 1e-9), 1),
            "waited_seconds": round(position.waited, 3),
            "skipped": position.skipped,
        }
        if self.targets:
            row["teacher_views"] = position.teacher_views * self.runtime.world
        if self.validation and (epoch % train.evaluate_every == 0 or epoch == train.epochs):
            row |= self._evaluate(self.validation, stop)
        if self.runtime.is_main_process:
            self.folder.append(row)
        log.info("%s", describe(row, train.epochs))
        with stop.interruptible():
            self.watch.epoch(self._steps_done(), row, last=epoch == train.epochs)
        self.position = TrainState.start(self.runtime.device, epoch)
        return row

    def _complete_cache(self, stop: Stop) -> None:
        """Have the teacher also answer for the views that no batch had room for: any batch size can then use them."""
        if not isinstance(self.targets, CachedTargets) or self.targets.cache.complete:
            return
        with closing(CacheBuilder(self.recipe, self.dataset, self.runtime, self.display)) as filling:
            filling.build(self.targets, stop)

    def _evaluate(self, loader: Loader, stop: Stop) -> dict[str, Any]:
        """Return the metrics of every head, of the weights as they are and averaged: {"val": {head: ...}, ...}."""
        models = {"val": self.learner.model}
        if self.learner.ema:
            models["val_ema"] = self.learner.ema.model
        found, everything, began = {}, {}, time.monotonic()

        def seen(done: int, steps: int, bar: Bar) -> None:
            bar.reach(done)
            stop.check(sync=done % max(1, steps // LOOKS_AN_EPOCH) == 0)

        for name, model in models.items():
            with stop.interruptible(), self.display.bar("evaluating", loader.steps_per_epoch) as bar:
                count, progress = len(self.spec.classes), partial(seen, bar=bar)
                heads = evaluate(model, loader, self.recipe, self.runtime, count, progress)
            found[name] = {head: metrics.summary() for head, metrics in heads.items()}
            everything[name] = {head: metrics.everything() for head, metrics in heads.items()}
        self.evaluating = time.monotonic() - began
        if self.runtime.is_main_process:
            tree = {"epoch": self.position.epoch + 1, "classes": self.spec.classes, **everything}
            write_text(self.folder.evaluation, json.dumps(tree))
        return found


def describe(row: dict[str, Any], epochs: int) -> str:
    """Return an epoch's row of metrics.jsonl as one line for people."""
    parts = [f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.4f}"]
    for name, label in (("val", "top-1"), ("val_ema", "averaged weights")):
        if name in row:
            parts.append(f"{label} {row[name][final_head(row[name])]['top1']:.2%}")
    waiting = row["waited_seconds"] / max(row["seconds"], 1e-9)
    if row["skipped"]:
        parts.append(f"{row['skipped']:,} damaged skipped")
    parts.append(f"{row['images_per_second']:,.0f} images/s, waiting {waiting:.0%}, {duration(row['seconds'])}")
    return ", ".join(parts)
