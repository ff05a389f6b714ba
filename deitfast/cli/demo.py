"""The built-in demo set and its teacher, made where they are wanted and missing."""

import logging
import time
from pathlib import Path

from deitfast.config import recipe as recipes
from deitfast.config.choices import Arch
from deitfast.config.recipe import Recipe
from deitfast.progress import Display
from deitfast.run_folder import RunFolder
from deitfast.train.job import TrainJob
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.dataset import SPEC_FILE
from pipelines.workers import local_rank, rank

log = logging.getLogger("deitfast")
DEMO_DATA = Path("data/demo")
SHARED_SECONDS = 90.0
"""Time for rank 0 to draw the demo set, after which another machine takes its folder for one that is not shared."""
DEMO_TEACHER = Path("runs/demo-teacher")
DEMO_TEACHER_ARCH: Arch = "resnet20"


def make_demo_data(data: Path, display: Display) -> None:
    """Draw the demo set, on rank 0, if `data` is its folder and it is not there yet.

    Another machine waits for it, and draws its own where the folder is not shared.
    """
    from deitfast.cli.data import convert_dataset

    if data != DEMO_DATA:
        return
    written = data / SPEC_FILE
    began, draws = time.monotonic(), local_rank() == 0
    patience = 0 if rank() == 0 else SHARED_SECONDS
    while not written.exists():
        if draws and time.monotonic() - began >= patience:
            convert_dataset("demo", None, data, ConvertOptions(), display)
        else:
            time.sleep(0.1)


def uses_demo_teacher(recipe: Recipe) -> bool:
    """Whether the recipe's teacher is the one that deitfast trains itself, on the demo set."""
    return recipe.distill.mode != "none" and Path(recipe.distill.teacher) == DEMO_TEACHER.resolve()


def demo_teacher_job(data: Path) -> TrainJob | None:
    """Return the job that trains (or finishes) the teacher of the demo set in `data`; None where it is trained."""
    folder = RunFolder(DEMO_TEACHER)
    recipe = recipes.choose(DEMO_TEACHER_ARCH, "demo", 0)
    if not folder.exists():
        log.info("training the demo set's own teacher, %s, into %s", DEMO_TEACHER_ARCH, DEMO_TEACHER)
    elif folder.finished():
        log.info("using the demo set's own teacher, %s", DEMO_TEACHER)
        return None
    else:
        log.info("finishing the demo set's own teacher, %s", DEMO_TEACHER)
        recipe = folder.recipe()
    return TrainJob(recipe, data, DEMO_TEACHER, resume=True, command=())
