"""Where a batch's crops lie in the stored images: as arrays of a row each, and image by image in plain integers."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipelines.rng.sampler import Rows
from pipelines.rng.view_params import ViewParams


@dataclass(frozen=True)
class Geometry:
    """The columns of `ViewParams` that a decoder needs, as int64 arrays of a row each."""

    crop_box: np.ndarray
    """[B, 4]: top, left, height, width in the stored image."""
    resized: np.ndarray
    """[B, 2]: height and width that the window is resized to."""
    offset: np.ndarray
    """[B, 2]: top and left of the output in the resized window."""

    @classmethod
    def of(cls, params: ViewParams) -> "Geometry":
        """Return the geometry of a batch."""
        return cls(*(params[name].astype(np.int64) for name in ("crop_box", "resized", "offset")))

    def fills(self, side: int) -> bool:
        """Whether every row's resized window reaches over the whole of its S x S output."""
        return bool((self.offset >= 0).all() and (self.offset + side <= self.resized).all())


class Crop(NamedTuple):
    """One view of an image."""

    row: int
    """In the batch."""
    top: int
    left: int
    """Of the view's window, in the window of the image that is decoded."""
    height: int
    width: int
    resized_height: int
    resized_width: int
    """What the window is resized to."""
    offset_top: int
    offset_left: int
    """Of the S x S output in the resized window."""


class WantedImage(NamedTuple):
    """What a batch wants of one image."""

    sample: int
    window: tuple[int, int, int, int]
    """The smallest (top, left, height, width) that holds the windows of all its views: what is to be decoded."""
    crops: list[Crop]


def by_image(rows: Rows, geometry: Geometry) -> list[WantedImage]:
    """Return what the valid rows want of each image, in rising order of samples, rows in theirs.

    All at once: threads share Python's lock, and numpy's calls on single rows would hold it longest of all.
    """
    wanted = np.flatnonzero(rows.valid)
    if not len(wanted):
        return []
    wanted = wanted[np.argsort(rows.samples[wanted], kind="stable")]
    samples, starts, counts = np.unique(rows.samples[wanted], return_index=True, return_counts=True)
    corner, size = geometry.crop_box[wanted, :2], geometry.crop_box[wanted, 2:]
    low, high = np.minimum.reduceat(corner, starts), np.maximum.reduceat(corner + size, starts)
    within = corner - np.repeat(low, counts, axis=0)
    table = np.column_stack([wanted, within, size, geometry.resized[wanted], geometry.offset[wanted]])
    crops = list(map(Crop._make, table.tolist()))
    windows = map(tuple, np.column_stack([low, high - low]).tolist())
    ends = (starts + counts).tolist()
    return [
        WantedImage(sample, window, crops[start:end])
        for sample, window, start, end in zip(samples.tolist(), windows, starts.tolist(), ends, strict=True)
    ]
