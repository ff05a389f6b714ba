"""Train: from a recipe and a data set to a run's folder. `Trainer.run` reads top to bottom."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch

from deitfast.data_loaders import open_split, open_training
from deitfast.distill.targets import plan_targets
from deitfast.eval.evaluate import evaluate, final_head
from deitfast.interrupt import Interrupted, Stop, catching_signals
from deitfast.progress import Bar, Display, duration, logging_to
from deitfast.run_folder import RunFolder, RunInfo, resume_command
from deitfast.runtime import Runtime
from deitfast.train.callbacks import Callbacks
from deitfast.train.checkpointer import Checkpointer, all_finite
from deitfast.train.job import TrainJob
from deitfast.train.loop import TrainLoop
from deitfast.train.messages import describe_epoch, describe_lengthening
from deitfast.train.state import DivergedError, TrainState
from deitfast.train.step import TrainStep
from deitfast.weights import checkpoint
from deitfast.weights.adapt import init_from_pretrained
from pipelines.batch import Loader
from pipelines.errors import DeitfastError, UserError, pluralize
from pipelines.files import file_lock, write_text
from pipelines.storage.dataset import Dataset

log = logging.getLogger("deitfast")
SYNCS_AN_EVALUATION = 50
"""How often several ranks agree on a request to stop while they evaluate."""
LEAST_SAVE_SECONDS = 10.0
"""An epoch's end saves a checkpoint only so long after the last one: resuming inside an epoch is as exact."""


def train(job: TrainJob, runtime: Runtime, display: Display) -> dict[str, Any]:
    """Train as `job` says and return the last epoch's row of metrics.jsonl.

    What can be refused is refused before a loader, teacher, cache or weights are touched.

    Raises:
        UserError: data set, teacher, run folder and recipe do not fit each other, or another run is in the folder.
        DeitfastError: damaged data or checkpoint, full disk, or a loss that stays non-finite.
        KeyboardInterrupt: asked to stop; a checkpoint was written.
    """
    if runtime.world > 1:
        job = job.of_rank0(runtime)
        runtime = runtime.with_precision(job.recipe.train)
    with (
        closing(Dataset.open(job.data)) as dataset,
        closing(Trainer(job, runtime, display, dataset)) as trainer,
        trainer.folder_held(),
    ):
        trainer.prepare()
        return trainer.run()


class Trainer:
    """One run, from its folder's state to its last epoch."""

    step: TrainStep
    loop: TrainLoop

    def __init__(self, job: TrainJob, runtime: Runtime, display: Display, dataset: Dataset) -> None:
        """Remember what to do; nothing is opened before `prepare`."""
        self.job, self.recipe, self.runtime, self.display = job, job.recipe, runtime, display
        self.dataset, self.spec = dataset, dataset.spec
        self.folder = RunFolder(runtime.broadcast_from_rank0(job.out))
        self.callbacks = Callbacks(self.folder.path if runtime.is_main_process else None, tensorboard=job.tensorboard)
        self.checkpoints = Checkpointer(self.folder.checkpoint, writes=runtime.is_main_process)
        self.validation: Loader | None = None
        self.state = TrainState.start(runtime.device)
        self.last_divergence: DivergedError | None = None
        self.lengthened_from = 0
        """Epochs that a run had before it was resumed with more; 0: it was not."""
        self.best_top1: float | None = None
        """Of the best checkpoint; None: not looked up yet."""
        self.seconds_to_evaluate = 0.0
        self._resources = ExitStack()

    @contextmanager
    def folder_held(self) -> Iterator[None]:
        """Keep other runs out of the folder while the block runs; leave none behind that nothing was written to.

        Raises:
            UserError: another run is in it, or it is not the one to be resumed.
        """
        main, folder = self.runtime.is_main_process, self.folder
        info = RunInfo(str(self.job.data.resolve()), self.spec.name, self.spec.fingerprint, self.spec.classes, ())
        try:
            with file_lock(folder.path, "run") if main else nullcontext():
                if main:
                    self.lengthened_from = folder.check(self.recipe, info, resume=self.job.resume)
                self.runtime.barrier()
                yield
        finally:
            if main:
                with suppress(OSError):
                    folder.path.rmdir()

    def prepare(self) -> None:
        """Open loaders, targets and model, as they were where the folder holds a run, and write the folder's facts."""
        recipe, runtime, classes = self.recipe, self.runtime, self.spec.classes
        self._require_same_data()
        loader = self._resources.enter_context(closing(open_training(self.dataset, recipe, runtime)))
        if "val" in self.spec.splits:
            self.validation = self._resources.enter_context(closing(open_split(self.dataset, "val", recipe, runtime)))
        plan = plan_targets(recipe, self.dataset, loader.name, runtime)
        # the weights come out of the checkpoint then
        resumed = runtime.broadcast_from_rank0(self.folder.checkpoint.exists())
        init_weights = None if resumed else partial(init_from_pretrained, spec=recipe.model, classes=classes)
        self.step = TrainStep(recipe, len(classes), runtime, init_weights)
        with catching_signals(runtime) as stop:
            self.targets = plan.open(stop, self.display) if plan else None
        self.loop = TrainLoop(recipe, runtime, loader, self.step, self.targets)
        if runtime.is_main_process:
            data, start = str(self.job.data.resolve()), self.step.initial_weights
            info = RunInfo(data, self.spec.name, self.spec.fingerprint, classes, self.job.command, start)
            self.folder.create(recipe, info) if not self.folder.exists() else self.folder.check_start(info)
            if self.lengthened_from:
                self.folder.lengthen(recipe)
        runtime.barrier()
        self._resources.enter_context(logging_to(self.folder.log if runtime.is_main_process else None))
        self._log_start()
        if resumed:
            self._restore()
            if self.lengthened_from:
                log.info("%s", describe_lengthening(recipe, self.lengthened_from, self.state, loader.steps_per_epoch))
            log.info("resuming in epoch %d after %d steps", self.state.epoch + 1, self.state.steps)
        else:
            self._save()  # what a first step that diverges, or is interrupted while it compiles, goes back to

    def _require_same_data(self) -> None:
        """Refuse machines whose data sets are not equal: every rank takes its share of one list of images.

        Raises:
            UserError: this rank's is another one than rank 0's.
        """
        host, theirs = self.runtime.broadcast_from_rank0((socket.gethostname(), self.spec.fingerprint))
        if theirs != self.spec.fingerprint:
            raise UserError(
                f"rank {self.runtime.rank} on {socket.gethostname()} reads another data set than rank 0 on {host}",
                expected=f"fingerprint {theirs}",
                found=f"{self.spec.fingerprint} in {self.job.data}",
                remedy="name it with --data on every machine; `deitfast info` prints the fingerprint",
            )

    def run(self) -> dict[str, Any]:
        """Go through the epochs, from wherever the state stands; return the last one's row of metrics.jsonl."""
        row: dict[str, Any] = {}
        epochs, steps = self.recipe.train.epochs, self.loop.loader.steps_per_epoch
        with catching_signals(self.runtime) as stop:
            try:
                while self.state.epoch < epochs:
                    try:
                        with self.display.bar(f"epoch {self.state.epoch + 1}/{epochs}", steps) as bar:
                            bar.start(self.state.steps)
                            for seen in self.loop.epoch(self.state, stop, self._save_due):
                                if seen is None or seen.diverged:  # what diverged proves no checkpoint
                                    bar.reach(self.state.steps)
                                    continue
                                if seen.finite_at:
                                    self.checkpoints.prove(*seen.finite_at)
                                self._show(bar, seen.means)
                                if seen.save:
                                    self._save()
                        row = self._finish_epoch(stop)
                    except DivergedError as event:
                        self._go_back(event)
            except Interrupted as request:
                self._stop(request)
                raise
            if self.targets:
                self.targets.finish(stop, self.display)
        return row

    def close(self) -> None:
        """Release loaders, threads and files."""
        with self._resources, closing(self.callbacks), closing(self.checkpoints):
            if hasattr(self, "loop"):
                self.loop.monitor.close()

    def _stop(self, request: Interrupted) -> None:
        """Save what was learned: what a first step that did not end was doing is not."""
        if not self.loop.first_step_pending:
            try:
                self._save()
            except DivergedError as event:
                log.warning("%s: the checkpoint stays as it was", event)
        self.checkpoints.wait()
        epoch, steps = self.state.epoch + 1, self.state.steps
        line = resume_command(self.folder.path, self.job.command)
        log.info("%s: stopped at epoch %d, step %d. Resume: %s", request, epoch, steps, line)

    def _log_start(self) -> None:
        recipe, runtime, loader = self.recipe, self.runtime, self.loop.loader
        parameters = sum(parameter.numel() for parameter in self.step.model.parameters())
        how = f"{runtime.precision}, compiled" if runtime.compile else runtime.precision
        log.info("%s (%s parameters) on %s, %s", recipe.model.arch, f"{parameters:,}", runtime.device, how)
        epochs, steps = pluralize(recipe.train.epochs, "epoch"), pluralize(loader.steps_per_epoch, "step")
        log.info("%s: %s of %s, loader %s", self.folder.path, epochs, steps, loader.name)
        if self.targets:
            log.info("%s", self.targets.describe())
        if self.validation is None:
            log.info("the data set has no validation split: nothing will be evaluated")

    def _show(self, bar: Bar, means: dict[str, float] | None) -> None:
        """Show where the epoch and the run stand, by what is known without waiting for the device."""
        state, train = self.state, self.recipe.train
        seconds = max(state.seconds, 1e-9)
        done, steps = self._steps_done(), self.loop.loader.steps_per_epoch * train.epochs
        evaluations = -(-(train.epochs - state.epoch) // train.evaluate_every)
        left = duration(seconds / state.steps * (steps - done) + self.seconds_to_evaluate * evaluations)
        rate, waiting = state.steps * train.batch / seconds, state.waited / seconds
        loss = f"loss {means['loss']:.3f}, " if means else ""
        bar.reach(state.steps, f"{loss}{rate:,.0f} images/s, waiting {waiting:.0%}, run ends in {left}")
        if means and state.steps < self.loop.loader.steps_per_epoch:  # the epoch's last figures are those of its row
            self.callbacks.log_step(done, loss=means["loss"], images_per_second=rate, waiting=waiting)

    def _steps_done(self) -> int:
        return self.state.epoch * self.loop.loader.steps_per_epoch + self.state.steps

    def _save_due(self) -> bool:
        return time.monotonic() - self.checkpoints.saved >= 60 * self.recipe.train.checkpoint_minutes

    def _save(self, finite: tuple[TrainState, dict[str, Any]] | None = None) -> None:
        """Save what was learned and where the run stands, on every rank alike; waits for the device.

        Args:
            finite: what `_finite_state` has just returned; None: it is asked.

        Raises:
            DivergedError: a loss or a weight is not finite, on any rank; nothing was saved.
        """
        if self.targets:
            self.targets.save()
        state, learned = finite or self._finite_state()
        self.checkpoints.save({**state.state(), **learned})

    def _finite_state(self) -> tuple[TrainState, dict[str, Any]]:
        """Return where the run stands over all ranks, and what was learned; raises as `_save`."""
        state, learned = self.state.over_ranks(self.runtime), self.step.state()
        state.means()
        self.checkpoints.prove(state.epoch, state.steps)
        if any(self.runtime.max_over_ranks([not all_finite(learned)])):
            raise DivergedError(state.epoch, state.steps, "a weight")
        return state, learned

    def _restore(self) -> None:
        """Take up the run where its checkpoint stands."""
        self.checkpoints.wait()
        self.runtime.barrier()
        state = self._load()
        self.step.restore(state)
        self.state = TrainState.restore(state, self.runtime)
        self.runtime.barrier()  # no rank replaces the file while another reads it

    def _load(self) -> dict[str, Any]:
        """Return the checkpoint to go on from. Other machines, which may not see rank 0's folder, are sent it."""
        runtime, path = self.runtime, self.runtime.broadcast_from_rank0(self.checkpoints.best())
        assert path, "called where there is a checkpoint"
        if not runtime.several_machines:
            return checkpoint.load(path, runtime.device)
        return runtime.broadcast_from_rank0(checkpoint.load(path, torch.device("cpu")) if runtime.rank == 0 else {})

    def _go_back(self, event: DivergedError) -> None:
        """Go back to the last good checkpoint; give up where that does not get any further."""
        last, self.last_divergence = self.last_divergence, event
        again = last is not None and (event.epoch, event.steps) <= (last.epoch, last.steps)
        self.loop.monitor.reset()
        if self.targets:
            self.targets.save()  # raises if it is the teacher's logits that are not finite
        self.checkpoints.wait()
        none = self.runtime.broadcast_from_rank0(self.checkpoints.best() is None)
        if any(self.runtime.max_over_ranks([again or none])):
            raise DeitfastError(
                str(event), remedy="start a new run with a lower optim.lr, with optim.clip, or with train.amp=off"
            ) from event
        log.warning("%s: going back to the last good checkpoint", event)
        self._restore()

    def _finish_epoch(self, stop: Stop) -> dict[str, Any]:
        """Save, evaluate, write the epoch's row, and move on to the next epoch."""
        train, epoch = self.recipe.train, self.state.epoch + 1
        state, learned = self._finite_state()  # before it is evaluated, whether it is saved or not
        last, due = epoch == train.epochs, time.monotonic() - self.checkpoints.saved >= LEAST_SAVE_SECONDS
        if any(self.runtime.max_over_ranks([last or due])):
            self._save((state, learned))
        images = state.steps * train.batch
        row: dict[str, Any] = {
            "epoch": epoch,
            **state.means(),
            "lr": self.step.optimizer.param_groups[0]["lr"],
            "images": images,
            "seconds": round(state.seconds, 3),
            "images_per_second": round(images / max(state.seconds, 1e-9), 1),
            "waited_seconds": round(state.waited, 3),
            "skipped": state.skipped,
        }
        if self.targets:
            row["teacher_views"] = state.teacher_views
        if self.validation and (last or epoch % train.evaluate_every == 0):
            row |= self._evaluate(self.validation, stop)
        best = ""
        if self.runtime.is_main_process:
            best = self._save_best(row)
            self.folder.append(row)
        log.info("%s%s", describe_epoch(row, train.epochs, self.recipe.model.prediction), best)
        with stop.interruptible():
            self.callbacks.log_epoch(self._steps_done(), row, last=last)
        self.state = TrainState.start(self.runtime.device, epoch)
        return row

    def _evaluate(self, loader: Loader, stop: Stop) -> dict[str, Any]:
        """Return the metrics of every head, of the weights as they are and averaged: {"val": {head: ...}, ...}."""
        models = {"val": self.step.model}
        if self.step.ema:
            models["val_ema"] = self.step.ema.model
        found, everything, began = {}, {}, time.monotonic()

        def progress(done: int, steps: int, bar: Bar) -> None:
            bar.reach(done)
            stop.check(sync=done % max(1, steps // SYNCS_AN_EVALUATION) == 0)

        for name, model in models.items():
            with stop.interruptible(), self.display.bar("evaluating", loader.steps_per_epoch) as bar:
                count = len(self.spec.classes)
                heads = evaluate(model, loader, self.recipe, self.runtime, count, partial(progress, bar=bar))
            found[name] = {head: metrics.summary() for head, metrics in heads.items()}
            everything[name] = {head: metrics.everything() for head, metrics in heads.items()}
        self.seconds_to_evaluate = time.monotonic() - began
        if self.runtime.is_main_process:
            tree = {"epoch": self.state.epoch + 1, "classes": self.spec.classes, **everything}
            write_text(self.folder.evaluation, json.dumps(tree))
        return found

    def _save_best(self, row: dict[str, Any]) -> str:
        """Save the better of plain and averaged weights if it is the run's best so far; return what to say of it."""
        predicts = self.recipe.model.prediction
        top1 = {name: row[name][final_head(row[name], predicts)]["top1"] for name in ("val", "val_ema") if name in row}
        path, epoch = self.folder.best, row["epoch"] - 1
        if self.best_top1 is None:
            self.best_top1 = checkpoint.best_before(path, epoch)
        if not top1 or max(top1.values()) <= self.best_top1:
            return ""
        name = max(top1, key=top1.__getitem__)
        averaged = name == "val_ema" and self.step.ema is not None
        model = self.step.ema.model if averaged and self.step.ema else self.step.model
        self.checkpoints.save_best(path, epoch, top1[name], model, averaged=averaged)
        self.best_top1 = top1[name]
        return f"; best so far: the {'averaged' if averaged else 'plain'} weights"
