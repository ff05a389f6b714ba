"""What a study will take: hours by a short measurement of every network's training, gigabytes by what it writes."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace

from deitfast.bench.run import BenchOptions, benchmark
from deitfast.config.recipe import Recipe
from deitfast.progress import Display
from deitfast.runtime import Runtime
from deitfast.study.plan import PlannedRun, StudyPlan
from pipelines.storage.dataset import Dataset

FORWARD_SHARE = 1 / 3
"""Share of a training step that its forward pass takes: what a teacher's answer costs of a step of the teacher's."""
SECONDS = 0.3
"""Least time of a measurement; there is one of each network, after its warm-up."""


@dataclass(frozen=True)
class PredictedRun:
    """One run, and the seconds that it will take."""

    name: str
    seconds: float


def predict_runs(plan: StudyPlan, left: list[PlannedRun], runtime: Runtime, display: Display) -> Iterator[PredictedRun]:
    """Yield what each run that is left will take on this device; evaluation and start-up are not counted.

    Every network is measured once, at its batch and on its data, with targets out of a cache; the first run that needs
    a teacher's targets pays for them.
    """
    rates: dict[str, float] = {}
    recipes = {run.name: run for run in plan.runs}
    filled: set[tuple[str, str]] = set()

    def rate(run: PlannedRun) -> float:
        key = _network(run.recipe)
        if key not in rates:
            rates[key] = _training_rate(run, runtime, display)
        return rates[key]

    for run in left:
        views = run.recipe.train.epochs * run.images
        seconds = views / rate(run)
        if run.recipe.distill.mode != "none":
            cached = (run.needs[0], _views(run.recipe))
            if run.recipe.distill.cache == "none" or cached not in filled:
                seconds += FORWARD_SHARE * views / rate(recipes[run.needs[0]])
            filled.add(cached)
        yield PredictedRun(run.name, seconds)


def _training_rate(run: PlannedRun, runtime: Runtime, display: Display) -> float:
    recipe = _without_teacher(run.recipe)
    options = BenchOptions("train", SECONDS, rounds=1)
    with closing(Dataset.open(run.data)) as dataset:
        found = benchmark(dataset, recipe, runtime.with_precision(recipe.train), options, display)
    assert found.together, "bench train measures the loop"
    return found.together.rate


def _without_teacher(recipe: Recipe) -> Recipe:
    """Return the recipe of the same network and images that learns from labels alone."""
    token = "on" if recipe.distilled else "off"
    plain = replace(recipe.distill, mode="none", teacher="", cache="auto", targets="exact", views=0)
    model = replace(recipe.model, token=token if recipe.model.arch.startswith("deit_") else "auto",
                    weights="", finetune="", prediction="auto")  # fmt: skip
    return replace(recipe, distill=plain, model=model)


def _network(recipe: Recipe) -> str:
    """Return what decides how fast a recipe trains."""
    plain = _without_teacher(recipe)
    free = replace(plain.train, epochs=1, seed=0, fraction=1.0)
    return replace(plain, name="", train=free, schedule=type(plain.schedule)(), optim=type(plain.optim)()).digest


def _views(recipe: Recipe) -> str:
    """Return what decides which views a teacher is asked about, and how its answers are kept."""
    distill = recipe.distill
    return f"{recipe.augment} {distill.mode} {distill.targets} {distill.views} {recipe.train.fraction}"
