"""What to train: known before anything is opened."""

from dataclasses import dataclass, replace
from pathlib import Path

from deitfast.config.recipe import Recipe, flatten, override
from deitfast.runtime import Runtime

MACHINES_OWN = (
    "model.weights", "model.finetune", "distill.teacher", "distill.teacher_weights", "distill.cache",
)  # fmt: skip
"""Fields that name files, which each machine may have in another place."""


@dataclass(frozen=True)
class TrainJob:
    """What to train, on what, into which folder."""

    recipe: Recipe
    data: Path
    out: Path
    resume: bool
    command: tuple[str, ...]
    tensorboard: bool = False

    def of_rank0(self, runtime: Runtime) -> "TrainJob":
        """Return this job with the recipe of rank 0, which may have read it in a folder that only its machine has.

        Files that this rank's own line names stay: another machine may have them elsewhere.
        """
        theirs = runtime.broadcast_from_rank0(self.recipe)
        own, default = flatten(self.recipe), flatten(Recipe())
        return replace(self, recipe=override(theirs, {k: own[k] for k in MACHINES_OWN if own[k] != default[k]}))
