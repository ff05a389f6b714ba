"""`deitfast teach`: run a teacher once on every view that a student will see, and store its targets in a cache."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from deitfast.config.recipe import Recipe
from deitfast.distill.build_cache import build_cache
from deitfast.distill.cache import TeacherCache
from deitfast.distill.targets import plan_targets
from deitfast.interrupt import catching_signals
from deitfast.progress import Display
from deitfast.runtime import Runtime
from pipelines.errors import UserError
from pipelines.loaders.factory import choose
from pipelines.storage.dataset import Dataset


@dataclass(frozen=True)
class TeachJob:
    """Whose targets to compute, for which views."""

    recipe: Recipe
    """Of the students; `distill.cache` is the cache's folder."""
    data: Path


def teach(job: TeachJob, runtime: Runtime, display: Display) -> TeacherCache:
    """Fill a cache, from where it was left; check one that is complete on some views.

    Raises:
        UserError: data set, teacher, recipe and the cache that is there do not fit each other.
        DeitfastError: damaged data or cache, a full disk, or a teacher that says something else than the cache.
        Interrupted: asked to stop; the targets so far are stored.
    """
    recipe = job.recipe
    with closing(Dataset.open(job.data)) as dataset, catching_signals(runtime) as stop:
        loader = recipe.loader.name
        if loader == "auto":
            loader = choose(dataset.split("train"), runtime.device)
        plan = plan_targets(recipe, dataset, loader, runtime, teacher_required=True)
        if plan is None or plan.folder is None:
            raise UserError("teach has no folder to write to", remedy="pass --out CACHE_DIR")
        cache, teacher = plan.open_cache(plan.folder, stop, check=True)
        build_cache(cache, teacher, plan.views, stop, display)
        return cache
