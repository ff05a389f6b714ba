"""One call of `deitfast bench`, from a recipe and a data set to a `Record`. `Session.run` reads top to bottom."""

import json
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch

from deitfast import __version__
from deitfast.bench.machine import arithmetic, measure_disk
from deitfast.bench.peer import SkipError
from deitfast.bench.peers import LOADERS, STEPS, Rival
from deitfast.bench.record import FORMAT, OURS, Arithmetic, Change, Disk, Kind, Measured, Outlook, Peer, Record
from deitfast.bench.remedies import loader_alone, remedies
from deitfast.bench.stages import Workbench, all_together, copying, device_stages, loader_stages, whole_loader
from deitfast.bench.timing import Pace, Work, measure
from deitfast.bench.verdict import Cost, Setup, cost_of, judge, loader_costs, predict, starved, with_loader
from deitfast.config.recipe import Recipe
from deitfast.environment import environment
from deitfast.progress import Bar, Display
from deitfast.runtime import Runtime
from pipelines.errors import UserError
from pipelines.storage.dataset import Dataset

ROUNDS = 5
"""Measurements of each stage, after a warm-up."""
PARTS = ("all", "loader", "step", "train")
"""What can be measured; train: loader and step together."""
LABEL_BYTES = 2
"""Of a teacher's hard label for one view."""


@dataclass(frozen=True)
class Wish:
    """What to measure besides the recipe."""

    part: str = "all"
    seconds: float = 0.5
    """Least time of one measurement."""
    rounds: int = ROUNDS
    tries: tuple[str, ...] = ()
    """Changes to predict and to measure: section.field=value of the recipe, or data=FOLDER."""
    peers: bool = False
    command: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is opened."""
        if self.part not in PARTS:
            raise UserError(f"bench has no part called {self.part}", expected=", ".join(PARTS))
        if self.tries and self.part != "all":
            raise UserError(f"--try with bench {self.part}", expected="--try with plain bench")
        for setting in self.tries:
            if "=" not in setting:
                raise UserError(f"--try {setting} has no value", expected="section.field=value or data=FOLDER")


class Session:
    """One bench and what it has found so far."""

    def __init__(self, bench: Workbench, wish: Wish, pace: Pace) -> None:
        self.bench, self.wish, self.pace = bench, wish, pace
        self.setup = Setup(bench.workers, bench.cores)
        self.stages: list[Measured] = []
        self.loader: Measured | None = None

    def run(self) -> Record:
        """Measure what is wished for."""
        bench, wish = self.bench, self.wish
        disk = self._disk() if wish.part in ("all", "loader") else None
        self._alone()
        together = None
        if wish.part in ("all", "train"):
            (together,) = measure([all_together(bench)], bench.clock, self.pace)
        costs = self._costs(disk)
        verdict = judge(costs, self.setup) if wish.part == "all" else None
        lifts: tuple[Change, ...] = ()
        if verdict and starved(costs, verdict):
            lifts = remedies(bench, costs, self.setup, self.pace)
        return Record(
            format=FORMAT,
            made=datetime.now().astimezone().isoformat(timespec="seconds"),
            part=wish.part,
            command=wish.command,
            machine=json.loads(json.dumps(environment())),
            setting=bench.setting(),
            stages=tuple(self.stages),
            loader=self.loader,
            together=together,
            disk=disk,
            verdict=verdict,
            arithmetic=self._arithmetic(),
            outlook=outlook(bench, together.rate) if together else None,
            remedies=lifts,
            trials=tuple(self._trial(setting, costs) for setting in wish.tries),
            peers=self._peers() if wish.peers else (),
            notes=wish.notes,
        )

    def _disk(self) -> Disk:
        """Measured before anything else: what a loader has mapped cannot be dropped from the page cache."""
        bench = self.bench
        return measure_disk(bench.reader, bench.recipe.augment.repeats, bench.workers, self.pace.rounds)

    def _alone(self) -> None:
        """Measure each stage alone, in turns, and the loader as a whole among them."""
        bench, part, works = self.bench, self.wish.part, []
        if part in ("all", "loader"):
            works += [*loader_stages(bench), whole_loader(bench), *copying(bench)]
        if part in ("all", "step"):
            works += device_stages(bench)
        found = measure(works, bench.clock, self.pace)
        self.stages = [stage for stage in found if stage.name != "loader"]
        self.loader = next((stage for stage in found if stage.name == "loader"), None)

    def _costs(self, disk: Disk | None) -> list[Cost]:
        """Return what the verdict is about; the disk counts where every epoch reads it."""
        costs = [cost_of(stage) for stage in self.stages]
        if self.loader:
            own = [cost for cost in costs if cost.lane == "loader"]
            costs = with_loader(costs, loader_costs(own, self.loader, self.setup))
        if disk and disk.cold and not disk.fits:
            costs.append(cost_of(disk.cold))
        return costs

    def _arithmetic(self) -> Arithmetic | None:
        bench = self.bench
        step = next((stage for stage in self.stages if stage.name == "step"), None)
        if step is None:
            return None
        classes = len(bench.dataset.spec.classes)
        return arithmetic(bench.recipe, classes, step, bench.runtime, bench.clock, self.pace)

    def _trial(self, setting: str, costs: list[Cost]) -> Change:
        """Predict what a change will bring, then measure it."""
        key, _, value = (part.strip() for part in setting.partition("="))
        with ExitStack() as stack:
            if key == "data":
                dataset = stack.enter_context(closing(Dataset.open(Path(value))))
                other = stack.enter_context(closing(self.bench.changed([], dataset)))
            else:
                other = stack.enter_context(closing(self.bench.changed([setting])))
            setup = Setup(other.workers, other.cores)
            if key == "loader.workers":
                predicted, how = predict(costs, setup), f"the stages' times, {setup.workers} of the loader's threads"
            else:
                changed = with_loader(costs, loader_alone(other, setup, self.pace))
                how = "its loader measured alone"
                if key != "data" and not key.startswith("loader."):
                    device = [cost_of(stage) for stage in measure(device_stages(other), other.clock, self.pace)]
                    changed = [*(cost for cost in changed if cost.lane != "device"), *device]
                    how = "its loader and its step measured alone"
                predicted = predict(changed, setup)
            (found,) = measure([all_together(other)], other.clock, self.pace)
        return Change(f"--try {setting}", predicted, how, found)

    def _peers(self) -> tuple[Peer, ...]:
        found: tuple[Peer, ...] = ()
        if self.wish.part in ("all", "loader"):
            with closing(self.bench.changed(["augment.repeats=1"])) as once:  # nobody else decodes once for three views
                found += self._beside("loader", once, [whole_loader(once)], LOADERS)
        if self.wish.part in ("all", "step"):
            found += self._beside("step", self.bench, [device_stages(self.bench)[-1]], STEPS)
        return found

    def _beside(self, kind: Kind, bench: Workbench, ours: list[Work], rivals: dict[str, Rival]) -> tuple[Peer, ...]:
        """Measure ours and theirs in turns."""
        works, opened, absent = list(ours), [(OURS, f"deitfast {__version__}")], []
        with ExitStack() as stack:
            for name, rival in rivals.items():
                try:
                    works.append(replace(rival.open(bench, stack), name=name))
                    opened.append((name, rival.version()))
                except SkipError as reason:
                    absent.append(Peer(name, kind, None, str(reason)))
                except ModuleNotFoundError as missing:
                    absent.append(Peer(name, kind, None, f"{missing.name} is not installed"))
            found = measure(works, bench.clock, self.pace)
        peers = zip(opened, found, strict=True)
        return (*(Peer(name, kind, one, version=version) for (name, version), one in peers), *absent)


def outlook(bench: Workbench, rate: float) -> Outlook:
    """Return what the recipe's run takes at `rate` images/s."""
    epochs = bench.recipe.train.epochs
    images = epochs * bench.loader.steps_per_epoch * bench.recipe.train.batch
    return Outlook(epochs, images, images / rate, images * LABEL_BYTES)


def run_session(dataset: Dataset, recipe: Recipe, runtime: Runtime, wish: Wish, display: Display) -> Record:
    """Measure as `wish` says and return what was found.

    Raises:
        UserError: more than one process; a loader, a device or a setting that is not to be had.
        DeitfastError: damaged data.
    """
    if runtime.world > 1:
        raise UserError("bench measures one process", found=f"{runtime.world}", remedy="run it without torchrun")
    threads = torch.get_num_threads()
    with display.bar("measuring", 0) as bar, closing(Workbench(dataset, recipe, runtime)) as bench:
        heard = Heard(bar)
        try:
            return Session(bench, wish, Pace(wish.seconds, wish.rounds, heard.planned, heard.told)).run()
        finally:
            torch.set_num_threads(threads)


class Heard:
    """Shows measurements on a bar that grows with what is planned."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._done, self._total = bar, 0, 0

    def planned(self, count: int) -> None:
        """Expect so many more."""
        self._total += count
        self._bar.reach(self._done, total=self._total)

    def told(self, name: str, rate: float) -> None:
        """Count one as done."""
        self._done += 1
        self._bar.reach(self._done, f"{name} {rate:,.0f} images/s")
