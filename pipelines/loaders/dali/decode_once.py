"""Which images a step decodes and which crops it cuts from each, so that an image is decoded once for all its views.

With repeated augmentation the views of an image mostly come in one step, but a block of images may begin in one step
and end in the next. So a run of the decoder also cuts the crops that the steps just ahead want of the images it has
at hand: at batch 1024 and three views, 341 images a step in place of 384, at batch 256 85 in place of 128.
What a crop shows depends on its view alone: it does not matter in which run it was cut.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.rng.sampler import Rows
from pipelines.rng.view_params import ViewParams

GEOMETRY = ("crop_box", "resized", "offset")
"""Columns of `ViewParams` that place a crop: 4, 2 and 2 integers."""
NOTHING = (0, 0, 1, 1, 1, 1, 0, 0)
"""Geometry of a crop that nobody wants, and of one from an image that cannot be read: one pixel."""
Drawn = tuple[Rows, ViewParams]


@dataclass(frozen=True)
class Work:
    """One step's run of a decoder that gives up to R crops of each of n images, and its batch's rows."""

    rows: Rows
    params: ViewParams
    samples: np.ndarray
    """int64 [n]: the images to decode; n may be 0."""
    geometry: np.ndarray
    """int64 [R, n, 8]: window, resized, offset of each crop."""
    place: np.ndarray
    """int64 [R, n]: the row that a crop is for, k x B + row in the batch k steps ahead; -1: nobody wants it."""


def decode_once(draw: Callable[[int], Drawn], steps: range, views: int) -> Iterator[Work]:
    """Yield the work of each step.

    Args:
        draw: rows and parameters of a step; called once for each, up to `views` - 1 steps ahead.
        steps: from the first step to make to the end of the epoch.
        views: R, the crops of one image in one run: as many as an image has views in an epoch.
    """
    ahead: deque[Drawn] = deque()
    done: deque[np.ndarray] = deque()  # bool [B] for each step ahead: which rows were cut already
    for step in steps:
        while len(ahead) < views and step + len(ahead) < steps.stop:
            drawn = draw(step + len(ahead))
            ahead.append(drawn)
            done.append(~drawn[0].valid)
        yield plan_work(list(ahead), list(done), views)
        ahead.popleft()
        done.popleft()


def plan_work(steps: list[Drawn], done: list[np.ndarray], views: int) -> Work:
    """Return what to decode and cut for the first of `steps`, and what of it serves the others; marks that `done`."""
    size = len(steps[0][0].samples)
    samples = np.concatenate([rows.samples for rows, _ in steps])
    left = ~np.concatenate(done)
    now = samples[:size][left[:size]]
    images, counts = np.unique(now, return_counts=True)
    lines = -(-counts // views)  # more than one where a step holds more views of an image than a run can cut
    wanted = np.flatnonzero(left & np.isin(samples, images))
    wanted = wanted[np.argsort(samples[wanted], kind="stable")]  # by image; this step's crops before later ones
    image = np.searchsorted(images, samples[wanted])
    rank = np.arange(len(wanted)) - np.searchsorted(samples[wanted], images)[image]
    kept = rank < lines[image] * views
    wanted, image, rank = wanted[kept], image[kept], rank[kept]
    line, slot = (np.cumsum(lines) - lines)[image] + rank // views, rank % views
    geometry = np.tile(np.array(NOTHING), (views, int(lines.sum()), 1))
    columns = [np.concatenate([params[name] for _, params in steps]) for name in GEOMETRY]
    geometry[slot, line] = np.column_stack(columns)[wanted]
    place = np.full(geometry.shape[:2], -1)
    place[slot, line] = wanted
    for number, mask in enumerate(done):
        mask[wanted[wanted // size == number] % size] = True
    return Work(*steps[0], np.repeat(images, lines), geometry, place)
