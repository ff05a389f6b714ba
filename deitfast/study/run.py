"""Train what a study plans, from wherever it stands; a run that fails is reported and does not stop the others."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from queue import Queue

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
INTERRUPTED = 130
"""Exit code of a run that was asked to stop."""
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
        if reason := _missing(run, failures) or train_one(run):
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


def train_side_by_side(plan: StudyPlan, jobs: int, devices: int, told: Callable[[Failures], None]) -> Failures:
    """Train as many runs at once, each in a process of its own and, where there are GPUs, on one of its own.

    A run starts when there is a place and what it needs is trained.

    Args:
        plan: the study.
        jobs: runs at once.
        devices: GPUs to deal out; 0: the CPU's cores are shared.
        told: as for `train_all`.
    """
    failures: Failures = {}
    places: Queue[int] = Queue()
    for number in range(jobs):
        places.put(number)
    trained: dict[str, Future[None]] = {}

    def train_one(run: PlannedRun) -> None:
        for name in run.needs:
            if name in trained:  # it stands before this one, and so is under way
                trained[name].result()
        reason = _missing(run, failures)
        if not reason:
            place = places.get()
            try:
                reason = _in_process(plan, run, place, jobs, devices)
            finally:
                places.put(place)
        if reason:
            log.error("%s failed: %s", run.name, reason)
            failures[run.name] = reason

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for run in unfinished(plan):
                trained[run.name] = pool.submit(train_one, run)
            for done in as_completed(list(trained.values())):
                done.result()
                told(dict(failures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def _in_process(plan: StudyPlan, run: PlannedRun, place: int, jobs: int, devices: int) -> str:
    """Train a run by its command; return the last thing that it said if it failed."""
    environment = dict(os.environ)
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = str(place % devices)
    else:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    command = [sys.executable, "-m", *plan.command(run), "--device", plan.options.device]
    log.info("%s: started", run.name)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    log.info("%s: %s", run.name, "finished" if done.returncode == 0 else f"ended with {done.returncode}")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return "" if done.returncode == 0 else said.removeprefix("error: ") or f"exit code {done.returncode}"


def _missing(run: PlannedRun, failures: Failures) -> str:
    failed = [name for name in run.needs if name in failures]
    return f"{failed[0]} failed, which it needs" if failed else ""
