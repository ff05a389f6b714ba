"""The training loop of one epoch: batch, augmentation, targets, update, and a look about once a second."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

from torch import Tensor

from deitfast.config.recipe import Recipe
from deitfast.distill.targets import Targets
from deitfast.interrupt import Interrupted, Stop
from deitfast.models.vit import reads_patches
from deitfast.runtime import Runtime
from deitfast.train.monitor import Observation, StepMonitor
from deitfast.train.optim import learning_rate, peak_lr
from deitfast.train.state import DivergedError, TrainState
from deitfast.train.step import StepInputs, TrainStep
from pipelines.augment.chain import augment
from pipelines.batch import Batch, Loader
from pipelines.device import explain_oom

log = logging.getLogger("deitfast")
STEP_MEMORY = ("the training step", "lower train.batch, raise train.accumulate, or take a smaller model")
"""What runs out of memory in a step, and what to do then."""


class TrainLoop:
    """Everything that a step needs, and the steps. `train` runs it, and what measures training runs the same."""

    def __init__(
        self, recipe: Recipe, runtime: Runtime, loader: Loader, train_step: TrainStep, targets: Targets | None
    ) -> None:
        self.recipe, self.runtime, self.loader = recipe, runtime, loader
        self.train_step, self.targets = train_step, targets
        # the kernels write what a transformer's projection reads; a teacher in the loop looks at pixels
        self.patch = 0 if targets and targets.needs_teacher else reads_patches(train_step.model)
        self.monitor = StepMonitor(runtime)
        self.first_step_pending = True
        """Whether this process has done no step yet: the first one compiles, which can take minutes."""

    def epoch(self, state: TrainState, stop: Stop, save_due: Callable[[], bool]) -> Iterator[Observation | None]:
        """Do what is left of the current epoch, and yield after each step what the monitor has seen, if it looked.

        Args:
            state: where the run stands; brought forward with every step.
            stop: a request to end, answered between two steps, or at once while waiting for a batch or compiling.
            save_due: says whether it is time for a checkpoint; asked after each step.

        Raises:
            DivergedError: a rank's loss is not finite.
            Interrupted: asked to stop, on every rank alike.
        """
        recipe, train, steps = self.recipe, self.recipe.train, self.loader.steps_per_epoch
        peak = peak_lr(recipe.optim, train.batch)
        began = time.monotonic()
        made = self.loader.epoch(state.epoch, state.steps, then=partial(self.inputs, epoch=state.epoch))
        with closing(made) as batches:  # pyright: ignore
            while True:
                with stop.interruptible():
                    inputs = next(batches, None)
                if inputs is None:
                    return
                state.waited += time.monotonic() - began
                with explain_oom(*STEP_MEMORY), stop.interruptible(self.first_step_pending):
                    targets = None
                    if self.targets:
                        before = self.targets.teacher_views
                        targets = self.targets.get(inputs)
                        state.teacher_views += self.targets.teacher_views - before
                    if self.first_step_pending:
                        self.fit_memory(inputs, targets)
                    lr = learning_rate(recipe.schedule, peak, train.epochs, steps, state.epoch, state.steps)
                    state.losses += self.train_step.step(inputs, targets, lr)
                self.first_step_pending = False
                state.steps += 1
                state.skipped += inputs.skipped
                seen = self.monitor.after_step(state, stop.signal, save_due())
                now = time.monotonic()
                state.seconds += now - began
                began = now
                yield seen
                if seen and seen.diverged:
                    raise DivergedError(state.epoch, state.steps)
                if seen and seen.signal:
                    raise Interrupted(seen.signal)
                stop.check()

    def inputs(self, batch: Batch, epoch: int) -> StepInputs:
        """Return a batch of `epoch` as the step takes it. Called where batches are made: beside the step, not in it."""
        recipe, dtype = self.recipe, self.runtime.input_dtype
        augmented = augment(
            batch, recipe.augment, dtype=dtype, train=True, patch=self.patch, kernels=recipe.train.kernels
        )
        return self.train_step.prepare(augmented, epoch)

    def fit_memory(self, inputs: StepInputs, targets: Tensor | None) -> None:
        """Cut the batch into micro-batches until a step fits the GPU's memory, on all ranks alike.

        What is learned stays the same up to rounding; a CNN normalizes over smaller batches then. Where
        `train.accumulate` says how often to cut, it is left alone: then the step itself says that memory is full.
        """
        step, rows = self.train_step, len(inputs.labels)
        if self.runtime.device.type != "cuda" or self.recipe.train.accumulate > 1 or step.graphs:
            return
        while self.runtime.max_over_ranks([not step.fits(inputs, targets)])[0]:
            larger = next((n for n in range(step.accumulate + 1, rows + 1) if rows % n == 0), None)
            if larger is None:
                return
            step.accumulate = larger
        if step.accumulate > 1:
            whole = rows * self.runtime.world
            log.info("the batch does not fit the GPU's memory at once: %d = %d x %d, one after the other",
                     whole, step.accumulate, whole // step.accumulate)  # fmt: skip
