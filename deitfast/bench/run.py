"""One call of `deitfast bench`, from a recipe and a data set to a `BenchRecord`."""

from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from deitfast.bench.baseline_loaders import SkipError, package_version
from deitfast.bench.baselines import LOADERS, STEPS, Opener
from deitfast.bench.cluster_jobs import predict_cluster
from deitfast.bench.crop_baselines import compare_crops
from deitfast.bench.machine import arithmetic, measure_disk
from deitfast.bench.record import (
    OURS,
    Baseline,
    BaselineKind,
    BenchRecord,
    Change,
    Disk,
    FullRun,
    Measured,
    new_record,
)
from deitfast.bench.scaling import Cluster
from deitfast.bench.stages import all_together, copying, device_stages, loader_stages, step_alone, whole_loader
from deitfast.bench.suggestions import QUALITY, loader_alone, shrunk, suggest
from deitfast.bench.threads import loader_scaling
from deitfast.bench.timing import BenchCase, TimingOptions, measure
from deitfast.bench.verdict import (
    Capacity,
    Cost,
    cost_of,
    find_bottleneck,
    loader_bound,
    loader_costs,
    predict,
    with_loader,
)
from deitfast.bench.workbench import Workbench
from deitfast.config.recipe import Recipe
from deitfast.environment import __version__
from deitfast.progress import Bar, Display
from deitfast.runtime import Runtime
from pipelines.errors import UserError, pluralize
from pipelines.storage.dataset import Dataset

ROUNDS = 5
"""Measurements of each stage, after a warm-up."""
PARTS = ("all", "loader", "step", "train")
"""What can be measured; train: loader and step together."""
SIZES = (0, 400, 160, 96)
"""Longest sides of `--sizes`; 0: as stored."""
SIZED_IMAGES = 256
"""Images that are converted for it."""
LABEL_BYTES = 2
"""Of a teacher's hard label for one view."""


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, besides the recipe."""

    part: str = "all"
    seconds: float = 0.5
    """Least time of one measurement."""
    rounds: int = ROUNDS
    tries: tuple[str, ...] = ()
    """Changes to predict and to measure: section.field=value of the recipe, or data=FOLDER."""
    baselines: bool = False
    """Also measure other projects' loaders and steps."""
    sizes: bool = False
    """Compare the crops on a few of the images at several sizes as well."""
    cluster: Cluster | None = None
    """More GPUs and nodes to predict for."""
    command: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is opened."""
        if self.part not in PARTS:
            raise UserError(f"bench has no part called {self.part}", expected=", ".join(PARTS))
        if self.sizes and not (self.baselines and self.part in ("all", "loader")):
            raise UserError("--sizes compares crops", expected="deitfast bench loader --baselines --sizes")
        if self.tries and self.part != "all":
            raise UserError(f"--try cannot be combined with bench {self.part}", expected="deitfast bench --try CHANGE")
        if self.cluster and self.part != "all":
            raise UserError(
                f"--nodes and --gpus cannot be combined with bench {self.part}",
                expected="deitfast bench --nodes N --gpus G",
            )
        for setting in self.tries:
            if "=" not in setting:
                raise UserError(f"--try {setting} has no value", expected="section.field=value or data=FOLDER")


def benchmark(
    dataset: Dataset, recipe: Recipe, runtime: Runtime, options: BenchOptions, display: Display
) -> BenchRecord:
    """Measure a recipe on a data set, and say what limits it.

    Raises:
        UserError: more than one process; a loader, a device or a setting that does not work here.
        DeitfastError: damaged data.
    """
    if runtime.world > 1:
        raise UserError(
            "bench measures one process", found=f"{runtime.world}", remedy="run it without torchrun; see --gpus"
        )
    threads = torch.get_num_threads()
    with display.bar("measuring", 0) as bar, closing(Workbench(dataset, recipe, runtime)) as bench:
        progress = BenchProgress(bar)
        timing = TimingOptions(options.seconds, options.rounds, progress.on_planned, progress.on_measured)
        try:
            return measure_recipe(bench, options, timing)
        finally:
            torch.set_num_threads(threads)  # FFCV sets it


def measure_recipe(bench: Workbench, options: BenchOptions, timing: TimingOptions) -> BenchRecord:
    """Measure what the options ask for; the disk first, as what a loader has mapped stays in the page cache."""
    part, capacity = options.part, Capacity(bench.workers, bench.cores)
    disk = None
    if part in ("all", "loader"):
        disk = measure_disk(bench.reader, bench.recipe.augment.repeats, bench.workers, timing.rounds)
    stages, loader = _measure_stages(bench, part, timing)
    together = None
    if part in ("all", "train"):
        (together,) = measure([all_together(bench)], bench.clock, timing)
    costs = _costs(stages, loader, disk, capacity)
    verdict = find_bottleneck(costs, capacity) if part == "all" else None
    step = next((stage for stage in stages if stage.name == "step"), None)
    run, scaling = full_run(bench, together.rate) if together else None, None
    if options.cluster and run:
        scaling = predict_cluster(bench, costs, capacity, options.cluster, run, timing)
    return replace(
        new_record(part, options.command, bench.setting()),
        stages=stages,
        loader=loader,
        loader_scaling=loader_scaling(bench, timing) if part == "loader" else None,
        together=together,
        disk=disk,
        verdict=verdict,
        arithmetic=arithmetic(bench, step, timing) if step else None,
        full_run=run,
        suggestions=suggest(bench, costs, capacity, timing) if verdict and loader_bound(costs, verdict) else (),
        scaling=scaling,
        trials=tuple(_try(bench, setting, costs, timing) for setting in options.tries),
        baselines=_baselines(bench, options, timing) if options.baselines else (),
        notes=options.notes,
    )


def full_run(bench: Workbench, rate: float) -> FullRun:
    """Return what the recipe's whole run takes at `rate` images/s."""
    epochs = bench.recipe.train.epochs
    images = epochs * bench.loader.steps_per_epoch * bench.recipe.train.batch
    return FullRun(epochs, images, images / rate, images * LABEL_BYTES)


class BenchProgress:
    """Shows measurements on a bar that grows with what is planned."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._done, self._total = bar, 0, 0

    def on_planned(self, count: int) -> None:
        """Expect so many more measurements."""
        self._total += count
        self._bar.reach(self._done, total=self._total)

    def on_measured(self, name: str, rate: float) -> None:
        """Count one measurement as done."""
        self._done += 1
        self._bar.reach(self._done, f"{name} {rate:,.0f} images/s")


def _measure_stages(bench: Workbench, part: str, timing: TimingOptions) -> tuple[tuple[Measured, ...], Measured | None]:
    """Return each stage measured alone, and the loader as a whole, all measured round by round."""
    cases: list[BenchCase] = []
    if part in ("all", "loader"):
        cases += [*loader_stages(bench), whole_loader(bench), *copying(bench)]
    if part in ("all", "step"):
        cases += device_stages(bench)
    found = measure(cases, bench.clock, timing)
    loader = next((stage for stage in found if stage.name == "loader"), None)
    return tuple(stage for stage in found if stage is not loader), loader


def _costs(stages: tuple[Measured, ...], loader: Measured | None, disk: Disk | None, capacity: Capacity) -> list[Cost]:
    """Return what each stage costs an image; the disk counts where every epoch reads it."""
    costs = [cost_of(stage) for stage in stages]
    if loader:
        own = [cost for cost in costs if cost.resource == "loader"]
        costs = with_loader(costs, loader_costs(own, loader, capacity))
    if disk and disk.cold and not disk.fits:
        costs.append(cost_of(disk.cold))
    return costs


def _try(bench: Workbench, setting: str, costs: list[Cost], timing: TimingOptions) -> Change:
    """Predict what a change will bring, then measure it."""
    key, _, value = (part.strip() for part in setting.partition("="))
    with ExitStack() as stack:
        if key == "data":
            dataset = stack.enter_context(closing(Dataset.open(Path(value))))
            other = stack.enter_context(closing(bench.changed([], dataset)))
        else:
            other = stack.enter_context(closing(bench.changed([setting])))
        capacity = Capacity(other.workers, other.cores)
        if key == "loader.workers":
            changed, basis = costs, f"the stages' times, {pluralize(capacity.workers, 'loader thread')}"
        else:
            changed, basis = with_loader(costs, loader_alone(other, capacity, timing)), "its loader measured alone"
            if key != "data" and not key.startswith("loader."):
                device = [cost_of(stage) for stage in measure(device_stages(other), other.clock, timing)]
                changed = [*(cost for cost in changed if cost.resource != "device"), *device]
                basis = "its loader and its step measured alone"
        (found,) = measure([all_together(other)], other.clock, timing)
    return Change(f"--try {setting}", predict(changed, capacity), basis, found)


def _baselines(bench: Workbench, options: BenchOptions, timing: TimingOptions) -> tuple[Baseline, ...]:
    found: tuple[Baseline, ...] = ()
    if options.part in ("all", "loader"):
        with closing(bench.changed(["augment.repeats=1"])) as once:  # no other loader decodes once for three views
            found += _compare("loader", once, whole_loader(once), LOADERS, timing)
        found += compare_crops(bench, timing)
        if options.sizes:
            with ExitStack() as stack:
                for side, small in zip(SIZES, shrunk(bench, SIZES, SIZED_IMAGES, stack), strict=True):
                    stored = f"at most {side} px, quality {QUALITY}" if side else "as stored"
                    found += tuple(replace(each, stored=stored) for each in compare_crops(small, timing))
    if options.part in ("all", "step"):
        found += _compare("step", bench, step_alone(bench), STEPS, timing)
    return found


def _compare(
    kind: BaselineKind, bench: Workbench, ours: BenchCase, openers: dict[str, Opener], timing: TimingOptions
) -> tuple[Baseline, ...]:
    """Measure ours and the baselines round by round."""
    cases, opened, skipped = [ours], [(OURS, f"deitfast {__version__}")], []
    with ExitStack() as stack:
        for name, opener in openers.items():
            try:
                cases.append(replace(opener.open(bench, stack), name=name))
                opened.append((name, package_version(opener.distribution)))
            except SkipError as reason:
                skipped.append(Baseline(name, kind, None, str(reason)))
            except ModuleNotFoundError as missing:
                skipped.append(Baseline(name, kind, None, f"{missing.name} is not installed"))
        found = measure(cases, bench.clock, timing)
    measured = zip(opened, found, strict=True)
    return (*(Baseline(name, kind, one, version=version) for (name, version), one in measured), *skipped)
