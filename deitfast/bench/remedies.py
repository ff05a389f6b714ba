"""What would lift a starved step: more cores, another loader, smaller images; predicted from what each does alone."""

import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from deitfast.bench.record import Change
from deitfast.bench.stages import Workbench, loader_stages, whole_loader
from deitfast.bench.timing import Pace, measure
from deitfast.bench.verdict import WORTH, Cost, Setup, loader_costs, more_cores, predict, scaled, with_loader
from pipelines.errors import UserError
from pipelines.loaders.factory import available
from pipelines.loaders.host import HostLoader
from pipelines.storage.convert.converter import convert
from pipelines.storage.dataset import Dataset
from pipelines.storage.entry import Entry, InMemory
from pipelines.storage.reader import RAW

SIDES = (500, 400)
"""Longest sides that are tried on a few images."""
QUALITY = 90
"""JPEG quality of them."""
SHRUNK_IMAGES = 96
"""How many."""
SLOW = ("reference", "resident")
"""Loaders that nobody is advised to take: the slow one, and the one that `auto` takes wherever it can."""


def remedies(bench: Workbench, costs: list[Cost], setup: Setup, pace: Pace) -> tuple[Change, ...]:
    """Return what promises more images/s, best first."""
    found = [more_cores(costs, setup)]
    for name, reason in available().items():
        if not reason and name not in (bench.loader.name, *SLOW):
            found.append(_other_loader(bench, name, costs, setup, pace))
    found += _smaller_images(bench, costs, setup, pace)
    least = WORTH * predict(costs, setup)
    worth = [change for change in found if change and change.predicted and change.predicted >= least]
    return tuple(sorted(worth, key=lambda change: -(change.predicted or 0)))


def loader_alone(bench: Workbench, setup: Setup, pace: Pace) -> list[Cost]:
    """Return the costs of a bench's loader, measured alone as a whole."""
    (found,) = measure([whole_loader(bench)], bench.clock, pace)
    return loader_costs([], found, setup)


def _other_loader(bench: Workbench, name: str, costs: list[Cost], setup: Setup, pace: Pace) -> Change | None:
    try:
        with closing(bench.changed([f"loader.name={name}"])) as other:
            theirs = loader_alone(other, setup, pace)
    except UserError:  # it does not take this data set
        return None
    change = f"--set loader.name={name}"
    return Change(change, predict(with_loader(costs, theirs), setup), "measured alone, on the same files")


def _smaller_images(bench: Workbench, costs: list[Cost], setup: Setup, pace: Pace) -> list[Change]:
    reader = bench.reader
    sides = [side for side in SIDES if np.median(np.maximum(reader.heights, reader.widths)) > side]
    if not sides or not isinstance(bench.loader, HostLoader) or (reader.modes == RAW).any():
        return []
    factors = shrinking(bench, sides, pace)
    how = f"{SHRUNK_IMAGES} images converted so, the loader's stages measured alone"
    commands = {side: f"deitfast convert --max-side {side} --quality {QUALITY}" for side in sides}
    return [Change(commands[side], predict(scaled(costs, factors[side]), setup), how) for side in sides]


def shrinking(bench: Workbench, sides: list[int], pace: Pace) -> dict[int, dict[str, float]]:
    """Return, by longest side, each loader stage's time on shrunk images as a share of that on the images as stored.

    A few images are converted into a temporary folder, as they are and shrunk, and measured in turns.
    """
    reader = bench.reader
    chosen = np.linspace(0, reader.num_samples - 1, min(SHRUNK_IMAGES, reader.num_samples)).astype(int)
    files = [reader.sample(index).tobytes() for index in chosen]
    entries = [Entry(f"image {index}", 0, data, len(data)) for index, data in zip(chosen, files, strict=True)]
    source = InMemory("folder", f"a few images of {reader.path}", ("any",), {"train": entries})
    batch = [f"train.batch={len(chosen) // 2 * 2}", "train.accumulate=1", "train.fraction=1.0"]
    plain = ["augment.mixup=0.0", "augment.cutmix=0.0", "augment.repeats=1", f"loader.name={bench.loader.name}"]
    with tempfile.TemporaryDirectory(prefix="deitfast-bench-") as folder, ExitStack() as stack:
        works = []
        for side in (0, *sides):
            path = Path(folder) / str(side)
            convert(source, path, max_side=side, quality=QUALITY if side else None, workers=1)
            dataset = stack.enter_context(closing(Dataset.open(path)))
            works += loader_stages(stack.enter_context(closing(bench.changed([*batch, *plain], dataset))))
        found = measure(works, bench.clock, pace)
    stages = len(found) // (1 + len(sides))
    stored = {stage.name: stage.seconds for stage in found[:stages]}
    return {
        side: {stage.name: stage.seconds / stored[stage.name] for stage in found[stages * place : stages * (place + 1)]}
        for place, side in enumerate(sides, start=1)
    }
