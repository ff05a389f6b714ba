"""What sections share: the machine, the data, how long to measure, and the workbenches that are open."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deitfast.bench.baselines import random_teacher
from deitfast.bench.record import Figure, Measured, Unit
from deitfast.bench.timing import TimingOptions
from deitfast.bench.workbench import Workbench, forget_compiled
from deitfast.config import recipe as recipes
from deitfast.distill.targets import OnlineTeacher
from deitfast.runtime import Runtime
from pipelines.loaders.factory import why_not
from tools.gpu_check.inputs import SIDES, RepeatedDataset, open_photos, open_small

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
    """Steps that are watched for waits, and traced."""
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
class InputPaths:
    """The user's data to measure on; None: drawn for the occasion."""

    data: Path | None = None
    images: Path | None = None
    cifar: Path | None = None


@dataclass(frozen=True)
class Note:
    """A finding that is no figure: goes into the JSON under its name."""

    name: str
    value: Any


class Context:
    """One call's machine and data. Data sets and workbenches are opened when first needed, and closed by `close`."""

    def __init__(self, runtime: Runtime, scale: Scale, paths: InputPaths, scratch: Path, trace: Path) -> None:
        """Prepare; converted images go to the folder `scratch`, the profiler's trace to the file `trace`."""
        self.runtime, self.scale, self.paths, self.scratch, self.trace = runtime, scale, paths, scratch, trace
        self.timing = TimingOptions(scale.seconds, scale.rounds)
        self.inputs: list[str] = []
        """The data that was opened, in words."""
        self._photos: RepeatedDataset | None = None
        self._small: RepeatedDataset | None = None
        self._bench: Workbench | None = None
        self._teacher: tuple[OnlineTeacher, str] | None = None

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.runtime.device.type == "cuda"

    @property
    def photos(self) -> RepeatedDataset:
        """Large JPEGs in two splits, repeated to an epoch of ImageNet's length."""
        if self._photos is None:
            least = {"train": self.scale.train, "val": self.scale.val}
            scale, paths = self.scale, self.paths
            self._photos, what = open_photos(
                paths.data, paths.images, scale.drawn, scale.classes, self.scratch, least, scale.sides
            )
            self.inputs.append(what)
        return self._photos

    @property
    def small(self) -> RepeatedDataset:
        """Images of CIFAR's size."""
        if self._small is None:
            least = {"train": self.scale.small_train, "val": self.scale.small_train // 5}
            self._small, what = open_small(self.paths.cifar, self.scale.drawn, self.scratch, least)
            self.inputs.append(what)
        return self._small

    @property
    def bench(self) -> Workbench:
        """DeiT-Ti at 224 px on the photographs, hard-distilled from a full cache; compiled once for all sections.

        Its loader is dali where it runs, also where `auto` would take another.
        """
        if self._bench is None:
            dali = ["loader.name=dali"] if not why_not("dali") else []
            settings = recipes.parse_settings([*BASE, *self.scale.photos, *dali])
            recipe = recipes.override(recipes.load("deit_ti_imagenet"), settings)
            self._bench = Workbench(self.photos, recipe, self.runtime.with_precision(recipe.train))
        return self._bench

    @property
    def teacher(self) -> tuple[OnlineTeacher, str]:
        """A teacher of the size of the paper's, for batches of the photographs, and what it is in words."""
        if self._teacher is None:
            self._teacher = random_teacher(self.bench)
        return self._teacher

    @contextmanager
    def small_bench(self, *settings: str) -> Iterator[Workbench]:
        """Open DeiT-Ti at 32 px on the small images, hard-distilled from a full cache."""
        overrides = recipes.parse_settings([*BASE, *self.scale.small, *settings])
        recipe = recipes.override(recipes.load("deit_ti_cifar10"), overrides)
        with closing(Workbench(self.small, recipe, self.runtime.with_precision(recipe.train))) as bench:
            yield bench

    def close_photos_bench(self) -> None:
        """Close the photographs' workbench and the teacher; both are opened again when needed."""
        self._teacher = None
        if self._bench is not None:
            self._bench.close()
            self._bench = None
        forget_compiled()

    def close(self) -> None:
        """Close everything."""
        self.close_photos_bench()
        for dataset in (self._photos, self._small):
            if dataset is not None:
                dataset.close()


def rates(found: Measured, name: str, *, unit: Unit = "images/s", what: str = "") -> Figure:
    """Return a case's rates as a figure."""
    return Figure(name, unit, found.rates, what or found.what)


def ratio(name: str, found: Measured, to: Measured, *, least: float | None = None, what: str = "") -> Figure:
    """Return a case's rate as a share of another's, round by round, as they were measured."""
    pairs = zip(found.rates, to.rates, strict=True)
    return Figure(name, "share", tuple(one / other for one, other in pairs), what, least=least)
