"""A small deterministic teacher, and a training's targets without the training."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from deitfast.config import recipe as recipes
from deitfast.config.recipe import Recipe
from deitfast.data_loaders import open_training
from deitfast.distill.build_cache import TeacherViews
from deitfast.distill.cache import TeacherCache
from deitfast.distill.cache_key import needed_manifest, require_fit
from deitfast.distill.cached_teacher import CachedTeacher
from deitfast.distill.precompute import TeachJob, teach
from deitfast.distill.targets import CachedTargets, OnlineTeacher
from deitfast.distill.teacher import LoadedTeacher, Teacher
from deitfast.progress import Display
from pipelines.augment.chain import augment
from pipelines.storage.dataset import Dataset
from tests.helpers.small_runs import CPU, tiny_recipe


class Judge(nn.Module):
    """Decides by sums over a 4 x 4 grid, in float64, so that a target does not depend on its batch."""

    def __init__(self, classes: int, seed: int = 0, pause: float = 0.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(48, classes, generator=draw, dtype=torch.float64), requires_grad=False)
        self.pause = pause

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        time.sleep(self.pause)
        grid = torch.nn.functional.adaptive_avg_pool2d(pixels.double(), 4).flatten(1)
        return ((grid[:, :, None] * self.matrix).sum(1).float() * 4,)


def judge(classes: int, **options) -> LoadedTeacher:
    """Return that teacher as `load_teacher` would."""
    model = Judge(classes, **options).eval()
    recipe = tiny_recipe().augment
    return LoadedTeacher("judge", model, recipe.size, recipe.mean, recipe.std, tuple(range(classes)), True)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run's teacher is the judge, whatever its recipe names."""
    monkeypatch.setattr("deitfast.distill.cache_key.load_teacher", lambda spec, classes: judge(len(classes)))


def distilled(*settings: str, mode: str = "hard") -> Recipe:
    """A tiny recipe that distils from the judge."""
    lean = ["train.ema=0", "train.checkpoint_minutes=10", "augment.mix_group=4"]
    return tiny_recipe(f"distill.mode={mode}", "distill.teacher=judge", *lean, *settings)


def with_cache(recipe: Recipe, folder: Path, *settings: str) -> Recipe:
    """The same recipe with its targets in a cache."""
    return recipes.override(recipe, {"distill.cache": str(folder), **recipes.parse_settings(settings)})


def taught(data: Path, out: Path, recipe: Recipe) -> TeacherCache:
    """Fill a cache in this process."""
    return teach(TeachJob(with_cache(recipe, out), data), CPU, Display(Console(), quiet=True))


def opened(data: Path, folder: Path, recipe: Recipe, teacher: LoadedTeacher | None = None) -> TeacherCache:
    """Open or start the cache of a run with the judge as its teacher."""
    with closing(Dataset.open(data)) as dataset:
        fingerprint = (teacher or judge(len(dataset.spec.classes))).fingerprint()
        manifest = needed_manifest(recipe, dataset, "reference", fingerprint, CPU)
    cache = TeacherCache.create(folder, manifest)
    require_fit(folder, cache.manifest, manifest)
    return cache


def no_teacher() -> Teacher:
    """The teacher of a run whose cache is complete."""
    raise AssertionError("the teacher was run")


Make = Callable[[Recipe, Dataset], OnlineTeacher | CachedTargets]


def in_loop(recipe: Recipe, dataset: Dataset) -> OnlineTeacher:
    """Targets straight from the judge."""
    return OnlineTeacher(Teacher(judge(len(dataset.spec.classes)), recipe, CPU), recipe)


def seen(data: Path, recipe: Recipe, make: Make, world: int = 1, start: int = 0) -> dict[tuple[int, int], Tensor]:
    """Return the target of every (view, sample) that a run's ranks see, from step `start` of the first epoch on."""
    found: dict[tuple[int, int], Tensor] = {}
    with closing(Dataset.open(data)) as dataset:
        for rank in range(world):
            runtime = replace(CPU, rank=rank, world=world)
            targets = make(recipe, dataset)
            with closing(open_training(dataset, recipe, runtime)) as loader:
                for epoch in range(recipe.train.epochs):
                    for batch in loader.epoch(epoch, 0 if epoch else start):
                        inputs = augment(batch, recipe.augment, dtype=torch.float32, train=True)
                        views = zip(inputs.params.view.tolist(), inputs.params.sample.tolist(), strict=True)
                        found |= dict(zip(views, targets.get(inputs), strict=True))
                    targets.save()
    return found


def fill_slowly(data: Path, out: Path) -> None:
    """Fill a cache slowly, every target on the disk at once: the life of a process that is going to be killed."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deitfast.distill.cached_teacher.FLUSH_SECONDS", 0.0)
        patch.setattr("deitfast.distill.cache_key.load_teacher", lambda spec, classes: judge(len(classes), pause=0.002))
        taught(data, out, distilled("train.epochs=6", "train.batch=8"))


def cached(folder: Path) -> Make:
    """Targets from a complete cache."""
    cache = TeacherCache.open(folder)
    assert cache.complete
    teacher = CachedTeacher(cache, no_teacher, CPU.device)
    return lambda recipe, dataset: CachedTargets(cache, teacher, TeacherViews(recipe, dataset, CPU))


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
