"""What would make the loader keep up: more cores, another loader, smaller images; predicted from measured parts."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from deitfast.bench.record import Change
from deitfast.bench.stages import loader_stages, whole_loader
from deitfast.bench.timing import TimingOptions, measure
from deitfast.bench.verdict import MIN_GAIN, Capacity, Cost, loader_costs, more_cores, predict, scaled, with_loader
from deitfast.bench.workbench import Workbench
from pipelines.errors import UserError
from pipelines.loaders.factory import available
from pipelines.loaders.host import HostLoader
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.dataset import Dataset
from pipelines.storage.entry import Entry, InMemory
from pipelines.storage.reader import RAW, Reader

SIDES = (500, 400)
"""Longest sides that are tried on a few images."""
QUALITY = 90
"""JPEG quality of them."""
SHRUNK_IMAGES = 96
"""How many."""
NEVER_SUGGESTED = ("reference", "resident")
"""The slow loader, and the one that `auto` takes wherever it can."""


def suggest(bench: Workbench, costs: list[Cost], capacity: Capacity, timing: TimingOptions) -> tuple[Change, ...]:
    """Return the changes that promise more images/s, best first."""
    found = [more_cores(costs, capacity)]
    for name, reason in available().items():
        if not reason and name not in (bench.loader.name, *NEVER_SUGGESTED):
            found.append(_other_loader(bench, name, costs, capacity, timing))
    found += _smaller_images(bench, costs, capacity, timing)
    least = MIN_GAIN * predict(costs, capacity)
    gains = [change for change in found if change and change.predicted and change.predicted >= least]
    return tuple(sorted(gains, key=lambda change: -(change.predicted or 0)))


def loader_alone(bench: Workbench, capacity: Capacity, timing: TimingOptions) -> list[Cost]:
    """Return the costs of a workbench's loader, measured alone as a whole."""
    (found,) = measure([whole_loader(bench)], bench.clock, timing)
    return loader_costs([], found, capacity)


def _other_loader(
    bench: Workbench, name: str, costs: list[Cost], capacity: Capacity, timing: TimingOptions
) -> Change | None:
    try:
        with closing(bench.changed([f"loader.name={name}"])) as other:
            theirs = loader_alone(other, capacity, timing)
    except UserError:  # it does not take this data set
        return None
    predicted = predict(with_loader(costs, theirs), capacity)
    return Change(f"--loader {name}", predicted, "that loader measured alone, on the same files")


def _smaller_images(bench: Workbench, costs: list[Cost], capacity: Capacity, timing: TimingOptions) -> list[Change]:
    reader = bench.reader
    sides = [side for side in SIDES if np.median(np.maximum(reader.heights, reader.widths)) > side]
    if not sides or not isinstance(bench.loader, HostLoader) or (reader.modes == RAW).any():
        return []
    factors = shrinking(bench, sides, timing)
    basis = f"the loader's stages measured alone on {SHRUNK_IMAGES} images converted so"
    commands = {side: f"deitfast convert --max-side {side} --quality {QUALITY}" for side in sides}
    return [Change(commands[side], predict(scaled(costs, factors[side]), capacity), basis) for side in sides]


def shrinking(bench: Workbench, sides: list[int], timing: TimingOptions) -> dict[int, dict[str, float]]:
    """Return, by longest side, each loader stage's time on shrunk images as a share of that on the images as stored.

    A few images are converted into a temporary folder, as they are and shrunk, and measured round by round.
    """
    with ExitStack() as stack:
        benches = shrunk(bench, (0, *sides), SHRUNK_IMAGES, stack)
        found = measure([case for each in benches for case in loader_stages(each)], bench.clock, timing)
    stages = len(found) // len(benches)
    stored = {stage.name: stage.seconds for stage in found[:stages]}
    return {
        side: {stage.name: stage.seconds / stored[stage.name] for stage in found[stages * place : stages * (place + 1)]}
        for place, side in enumerate(sides, start=1)
    }


def shrunk(bench: Workbench, sides: Sequence[int], most: int, stack: ExitStack) -> list[Workbench]:
    """Return a workbench on a few of the images for each longest side (0: as stored), one view each, in one batch."""
    reader = bench.reader
    entries = few_images(reader, np.arange(reader.num_samples), most)
    source = InMemory("folder", f"a few images of {reader.path}", ("any",), {"train": entries})
    batch = [f"train.batch={len(entries) // 2 * 2}", "train.accumulate=1", "train.fraction=1.0"]
    plain = ["augment.mixup=0.0", "augment.cutmix=0.0", "augment.repeats=1", f"loader.name={bench.loader.name}"]
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="deitfast-bench-"))
    benches = []
    for side in sides:
        path = Path(folder) / str(side)
        convert(source, path, ConvertOptions(max_side=side, quality=QUALITY if side else None, workers=1))
        dataset = stack.enter_context(closing(Dataset.open(path)))
        benches.append(stack.enter_context(closing(bench.changed([*batch, *plain], dataset))))
    return benches


def few_images(reader: Reader, among: np.ndarray, most: int) -> list[Entry]:
    """Return at most so many of the samples int64 [N], spread evenly, as images to convert; each is of class 0."""
    chosen = among[np.linspace(0, len(among) - 1, min(most, len(among))).astype(int)]
    files = [reader.sample(index).tobytes() for index in chosen]
    return [Entry(f"image {index}", 0, data, len(data)) for index, data in zip(chosen, files, strict=True)]
