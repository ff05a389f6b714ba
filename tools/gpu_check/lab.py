"""What sections share: the machine, the data, how long to measure, and the benches that are open."""

import gc
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from deitfast.bench.peer_steps import random_teacher
from deitfast.bench.record import Measured
from deitfast.bench.stages import Targets, Workbench
from deitfast.bench.timing import Pace
from deitfast.config import recipe as recipes
from deitfast.config.recipe import Recipe
from deitfast.runtime import Runtime
from pipelines.loaders.factory import why_not
from tools.gpu_check.inputs import SIDES, Prolonged, open_photos, open_small
from tools.gpu_check.record import Figure, Unit

BASE = ("distill.mode=hard", "distill.teacher=a full cache", "distill.cache=auto")


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    photos: tuple[str, ...]
    """Settings on top of the recipe deit_ti_imagenet."""
    small: tuple[str, ...]
    """Settings on top of deit_ti_cifar10."""
    batches: tuple[int, ...]
    """Of the small images."""
    seconds: float
    """Least time of one measurement."""
    rounds: int
    runs: int
    """Of the augmentation, on a GPU's own clock."""
    steps: int
    """Watched for synchronizations, and traced."""
    drawn: int
    """Photographs, and small images, that are drawn where none are given."""
    sides: tuple[tuple[int, int], ...]
    """Of drawn photographs."""
    classes: int
    train: int
    """Images in an epoch of photographs: ImageNet's."""
    val: int
    small_train: int
    compared: int
    """Crops whose pixels are compared."""
    tests: str
    """Pattern of the test files."""


FULL = Scale((), (), (512, 1024, 2048), 1.0, 5, 50, 10, 256, SIDES, 1000, 1_281_167, 16_384, 50_000, 512, "test_*.py")
QUICK = replace(FULL, seconds=0.3, rounds=3, runs=20, compared=128)
MINIATURE = ("train.batch=8", "augment.mix_group=4", "train.compile=off", "train.amp=off", "model.patch=16")
DRY = Scale(
    photos=("augment.size=32", *MINIATURE), small=MINIATURE, batches=(4, 8), seconds=0.001, rounds=1, runs=1, steps=2,
    drawn=8, sides=((60, 80), (80, 60)), classes=8, train=64, val=16, small_train=64, compared=8, tests="test_gpu.py",
)  # fmt: skip


@dataclass(frozen=True)
class Given:
    """What the user gave to measure on."""

    data: Path | None = None
    images: Path | None = None
    cifar: Path | None = None


class Lab:
    """One call's machine and data; benches are opened when first asked for."""

    def __init__(self, runtime: Runtime, scale: Scale, given: Given, scratch: Path, trace: Path) -> None:
        self.runtime, self.scale, self.given, self.scratch, self.trace = runtime, scale, given, scratch, trace
        self.pace = Pace(scale.seconds, scale.rounds)
        self.what: dict[str, str] = {}
        """The data that was opened, in words."""

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.runtime.device.type == "cuda"

    @cached_property
    def photos(self) -> Prolonged:
        """Large JPEGs in two splits, repeated to an epoch of ImageNet's length."""
        least = {"train": self.scale.train, "val": self.scale.val}
        scale, given = self.scale, self.given
        found, self.what["photos"] = open_photos(
            given.data, given.images, scale.drawn, scale.classes, self.scratch, least, scale.sides
        )
        return found

    @cached_property
    def small(self) -> Prolonged:
        """Images of CIFAR's size."""
        least = {"train": self.scale.small_train, "val": self.scale.small_train // 5}
        found, self.what["small"] = open_small(self.given.cifar, self.scale.drawn, self.scratch, least)
        return found

    @cached_property
    def recipe(self) -> Recipe:
        """DeiT-Ti at 224 px, hard-distilled from a full cache; the dali loader also where `auto` would take another."""
        dali = ["loader.name=dali"] if not why_not("dali") else []
        return recipes.override(
            recipes.load("deit_ti_imagenet"), recipes.parse_settings([*BASE, *self.scale.photos, *dali])
        )

    @cached_property
    def bench(self) -> Workbench:
        """That recipe on the photographs; its network is compiled once for all sections."""
        return Workbench(self.photos, self.recipe, self.runtime.with_precision(self.recipe.train))

    @cached_property
    def teacher(self) -> Targets:
        """A teacher of the size of the paper's, which looks at every batch."""
        return random_teacher(self.bench)

    @contextmanager
    def small_bench(self, *settings: str) -> Iterator[Workbench]:
        """Open DeiT-Ti at 32 px, hard-distilled from a full cache, on the small images, with all that it compiles."""
        recipe = recipes.override(
            recipes.load("deit_ti_cifar10"), recipes.parse_settings([*BASE, *self.scale.small, *settings])
        )
        with fresh(), closing(Workbench(self.small, recipe, self.runtime.with_precision(recipe.train))) as bench:
            yield bench

    def release(self) -> None:
        """Close the photographs' bench and the teacher, with what they hold on the GPU; both may be opened again."""
        self.__dict__.pop("teacher", None)
        if "bench" in self.__dict__:
            self.bench.close()
            del self.bench
        with fresh():
            pass

    def close(self) -> None:
        """Close everything."""
        self.release()
        for name in ("photos", "small"):
            if name in self.__dict__:
                self.__dict__[name].close()


@contextmanager
def fresh() -> Iterator[None]:
    """Forget afterward what was compiled: CUDA graphs hold memory, and torch compiles a function only so often."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.compiler.reset()
            torch.cuda.empty_cache()


def rates(found: Measured, name: str, *, unit: Unit = "images/s", what: str = "") -> Figure:
    """Return what a stage did as a figure."""
    return Figure(name, unit, found.rates, what or found.what)


def ratio(name: str, found: Measured, to: Measured, *, least: float | None = None, what: str = "") -> Figure:
    """Return a stage's rate as a share of another's, measured in turn with it: round by round."""
    pairs = zip(found.rates, to.rates, strict=True)
    return Figure(name, "share", tuple(one / other for one, other in pairs), what, least=least)
