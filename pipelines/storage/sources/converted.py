"""A dataset that was converted before as a source: for another format, or smaller images, without the originals."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipelines.storage.dataset import Dataset
from pipelines.storage.entry import Entry
from pipelines.storage.reader import JPEG
from pipelines.storage.sources.opened_source import OpenedSource


@dataclass(frozen=True, slots=True)
class Converted:
    """One sample of a dataset, as a locator."""

    folder: Path
    fingerprint: str
    split: str
    sample: int

    def read(self) -> bytes | np.ndarray:
        """Return the stored JPEG, or raw pixels as uint8 [H, W, 3]. Raises DeitfastError if it is damaged."""
        reader = _opened(self.folder, self.fingerprint).split(self.split)
        data = reader.read_verified(self.sample)
        if reader.modes[self.sample] == JPEG:
            return data.tobytes()
        return data.reshape(int(reader.heights[self.sample]), int(reader.widths[self.sample]), 3)


def open_dataset(folder: Path) -> OpenedSource:
    """Open a converted dataset as a source of its own kind, classes, splits and order.

    Raises:
        UserError: there is no dataset.
        DeitfastError: it is damaged.
    """
    dataset = Dataset.open(folder)
    spec = dataset.spec
    splits = {}
    for name in spec.splits:
        reader = dataset.split(name)
        splits[name] = [
            Entry(f"{name}#{number}", label, Converted(folder, spec.fingerprint, name, number), size)
            for number, (label, size) in enumerate(zip(reader.labels.tolist(), reader.sizes.tolist(), strict=True))
        ]
    dataset.close()
    origin = f"data set {folder}, fingerprint {spec.fingerprint}, from {spec.source}"
    return OpenedSource(spec.name, origin, spec.classes, splits)


@lru_cache(maxsize=2)
def _opened(folder: Path, fingerprint: str) -> Dataset:
    """Return the dataset, opened once in this process; another fingerprint is another dataset."""
    return Dataset.open(folder)
