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


@dataclass(frozen=True)
class CropTable:
    """A batch's valid rows, grouped by image: images and each image's rows in rising order."""

    samples: np.ndarray
    """int64 [n]: the images."""
    windows: np.ndarray
    """int64 [n, 4]: `ImageCrops.window` of each."""
    first_crop: np.ndarray
    """int64 [n]: the first of an image's crops."""
    counts: np.ndarray
    """int64 [n]: the number of its crops."""
    crops: np.ndarray
    """int64 [m, 9]: the fields of `Crop`."""

    @classmethod
    def of(cls, rows: Rows, geometry: Geometry) -> "CropTable":
        """Return the table of a batch.

        For all rows at once: numpy's calls on single rows would hold Python's lock, which threads share, far longer.
        """
        used = np.flatnonzero(rows.valid)
        used = used[np.argsort(rows.samples[used], kind="stable")]
        samples, starts, counts = np.unique(rows.samples[used], return_index=True, return_counts=True)
        if not len(used):
            return cls(samples, np.zeros((0, 4), np.int64), starts, counts, np.zeros((0, len(Crop._fields)), np.int64))
        corner, size = geometry.crop_box[used, :2], geometry.crop_box[used, 2:]
        low, high = np.minimum.reduceat(corner, starts), np.maximum.reduceat(corner + size, starts)
        within = corner - np.repeat(low, counts, axis=0)
        crops = np.column_stack([used, within, size, geometry.resized[used], geometry.offset[used]])
        return cls(samples, np.column_stack([low, high - low]), starts, counts, crops)

    def images(self, start: int = 0, end: int | None = None) -> list[ImageCrops]:
        """Return the images from `start` to before `end`, in plain integers."""
        part = slice(start, end)
        columns = (self.samples, self.windows, self.first_crop, self.counts)
        return [
            ImageCrops(sample, tuple(window), list(map(Crop._make, self.crops[first : first + count].tolist())))
            for sample, window, first, count in zip(*(column[part].tolist() for column in columns), strict=True)
        ]


def by_image(rows: Rows, geometry: Geometry) -> list[ImageCrops]:
    """Return the images of the valid rows with their crops, images and each image's rows in rising order."""
    return CropTable.of(rows, geometry).images()
