"""Train what a study plans, from wherever it stands; a run that fails is reported and does not stop the others."""

import logging
from collections.abc import Callable, Collection

from deitfast.bench.workbench import forget_compiled
from deitfast.config import recipe as recipes
from deitfast.progress import Display
from deitfast.run_folder import RunFolder
from deitfast.runtime import Runtime
from deitfast.study.plan import PlannedRun, StudyPlan
from deitfast.train.job import TrainJob
from deitfast.train.trainer import train
from pipelines.errors import DeitfastError
from pipelines.files import write_text

log = logging.getLogger("deitfast")
Failures = dict[str, str]
"""Why a run failed, by its name."""


def write_recipes(plan: StudyPlan) -> None:
    """Write every run's recipe, which its command names."""
    for run in plan.runs:
        path = plan.recipe_file(run.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, recipes.dump(run.recipe))


def unfinished(plan: StudyPlan) -> list[PlannedRun]:
    """Return the runs that are not done, in order."""
    folders = {run.name: RunFolder(plan.folder(run.name)) for run in plan.runs}
    return [run for run in plan.runs if not (folders[run.name].exists() and folders[run.name].finished())]


def train_all(
    plan: StudyPlan, left: Collection[str], train_one: Callable[[PlannedRun], str], told: Callable[[Failures], None]
) -> Failures:
    """Train the runs that are left, one after the other.

    Args:
        plan: the study.
        left: names of the runs to train, the same on every rank; the others are finished.
        train_one: trains a run; returns why it failed, "" if it did not.
        told: called with what failed so far after each run.
    """
    failures: Failures = {}
    for number, run in enumerate(plan.runs, 1):
        if run.name not in left:
            log.info("%s is finished (%d of %d)", run.name, number, len(plan.runs))
            continue
        log.info("%s (%d of %d)", run.name, number, len(plan.runs))
        if reason := missing(run, failures) or train_one(run):
            log.error("%s failed: %s", run.name, reason)
            failures[run.name] = reason
        told(failures)
    return failures


def train_here(plan: StudyPlan, runtime: Runtime, display: Display) -> Callable[[PlannedRun], str]:
    """Return what trains a run in this process, on all of its ranks.

    With several ranks an error ends the study: one rank alone cannot know whether the others go on.
    """

    def train_one(run: PlannedRun) -> str:
        job = TrainJob(run.recipe, run.data, plan.folder(run.name), resume=True, command=plan.command(run))
        own = runtime.with_precision(run.recipe.train)
        try:
            train(job, own, display)
        except DeitfastError as error:
            if runtime.world > 1:
                raise
            return str(error)
        finally:
            if own.compile:
                forget_compiled()  # torch compiles a function only so often in a process
        return ""

    return train_one


def missing(run: PlannedRun, failures: Failures) -> str:
    """Return why a run cannot be trained, "" if it can: one that it needs has failed."""
    failed = [name for name in run.needs if name in failures]
    return f"{failed[0]} failed, which it needs" if failed else ""
