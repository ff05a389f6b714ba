"""Where a batch's crops lie in the stored images: as arrays with a row each, and image by image in plain integers."""

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
        """Return whether every row's resized window covers all of its S x S output."""
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


class ImageCrops(NamedTuple):
    """One image of a batch, and the crops that the batch has of it."""

    sample: int
    window: tuple[int, int, int, int]
    """The smallest (top, left, height, width) that contains the windows of all crops: what is to be decoded."""
    crops: list[Crop]


def by_image(rows: Rows, geometry: Geometry) -> list[ImageCrops]:
    """Return the images of the valid rows with their crops, images and each image's rows in rising order.

    For all rows at once: numpy's calls on single rows would hold Python's lock, which the threads share, far longer.
    """
    rows_used = np.flatnonzero(rows.valid)
    if not len(rows_used):
        return []
    rows_used = rows_used[np.argsort(rows.samples[rows_used], kind="stable")]
    samples, starts, counts = np.unique(rows.samples[rows_used], return_index=True, return_counts=True)
    corner, size = geometry.crop_box[rows_used, :2], geometry.crop_box[rows_used, 2:]
    low, high = np.minimum.reduceat(corner, starts), np.maximum.reduceat(corner + size, starts)
    within = corner - np.repeat(low, counts, axis=0)
    table = np.column_stack([rows_used, within, size, geometry.resized[rows_used], geometry.offset[rows_used]])
    crops = list(map(Crop._make, table.tolist()))
    windows = map(tuple, np.column_stack([low, high - low]).tolist())
    ends = (starts + counts).tolist()
    return [
        ImageCrops(sample, window, crops[start:end])
        for sample, window, start, end in zip(samples.tolist(), windows, starts.tolist(), ends, strict=True)
    ]
