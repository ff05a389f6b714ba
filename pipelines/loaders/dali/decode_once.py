"""Which images a step decodes and which crops it cuts from each, so that an image is decoded once for all its views.

With repeated augmentation the views of an image mostly come in one step, but a block of images may begin in one step
and end in the next. So a run of the decoder also cuts the crops that the next steps need of the images that it
decodes: at batch 1024 and three views, 341 images a step in place of 384, at batch 256 85 in place of 128.
A crop is a function of its view alone: it does not matter in which run it is cut.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.rng.sampler import Rows
from pipelines.rng.view_params import ViewParams

GEOMETRY = ("crop_box", "resized", "offset")
"""Columns of `ViewParams` that place a crop: 4, 2 and 2 integers."""
UNUSED_CROP = (0, 0, 1, 1, 1, 1, 0, 0)
"""Geometry of a crop that no row needs, and of one from an image that cannot be read: one pixel."""
Drawn = tuple[Rows, ViewParams]


@dataclass(frozen=True)
class DecodeRun:
    """One step's run of a decoder that gives up to R crops of each of n images, and its batch's rows."""

    rows: Rows
    params: ViewParams
    samples: np.ndarray
    """int64 [n]: the images to decode; n may be 0."""
    geometry: np.ndarray
    """int64 [R, n, 8]: window, resized, offset of each crop."""
    destination: np.ndarray
    """int64 [R, n]: the row that a crop is for: k x B + row, in the batch k steps ahead; -1: the crop is unused."""
    mirror: np.ndarray
    """bool [R, n]: whether that row is mirrored left to right."""


def decode_once(draw: Callable[[int], Drawn], steps: range, views: int) -> Iterator[DecodeRun]:
    """Yield the run of each step.

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
        yield plan_run(list(ahead), list(done), views)
        ahead.popleft()
        done.popleft()


def plan_run(steps: list[Drawn], done: list[np.ndarray], views: int) -> DecodeRun:
    """Return what to decode and cut for the first of `steps`, and what of it serves the others; updates `done`.

    An example with B = 4, R = 2, two steps, nothing done. Positions count the rows of all steps: k x B + row.

        samples of step 0:  7 5 7 7    positions 0 to 3
        samples of step 1:  5 9 9 7    positions 4 to 7

    Step 0 needs images 5 and 7 (`images`), 1 and 3 times. A slot of the run cuts two crops, so image 7 takes two
    slots: `slots_of` = [1, 2], the run decodes [5, 7, 7]. Sorted by image, candidate positions are 1 4 for image 5 and
    0 2 3 7 for image 7, each with its rank within its image: 0 1, 0 1 2 3. All have a crop free (`rank` < slots x R),
    so the run also cuts positions 4 and 7, which are step 1's. With slot = first slot + rank // R and crop = rank % R:

        destination = [[1, 0, 3],     first crop of each slot
                       [4, 2, 7]]     second crop
    """
    batch = len(steps[0][0].samples)
    samples = np.concatenate([rows.samples for rows, _ in steps])
    missing = ~np.concatenate(done)

    needed_now = samples[:batch][missing[:batch]]
    images, counts = np.unique(needed_now, return_counts=True)
    slots_of = -(-counts // views)  # of each image
    first_slot = np.cumsum(slots_of) - slots_of

    positions = np.flatnonzero(missing & np.isin(samples, images))
    positions = positions[np.argsort(samples[positions], kind="stable")]  # by image; this step's before later ones
    first_of_image = np.searchsorted(samples[positions], images)
    image = np.searchsorted(images, samples[positions])
    rank = np.arange(len(positions)) - first_of_image[image]
    fits = rank < slots_of[image] * views
    positions, image, rank = positions[fits], image[fits], rank[fits]
    slot, crop = first_slot[image] + rank // views, rank % views

    columns = np.column_stack([np.concatenate([params[name] for _, params in steps]) for name in GEOMETRY])
    geometry = np.tile(np.array(UNUSED_CROP), (views, int(slots_of.sum()), 1))
    geometry[crop, slot] = columns[positions]
    destination = np.full(geometry.shape[:2], -1)
    destination[crop, slot] = positions
    mirror = np.zeros(destination.shape, np.bool_)
    mirror[crop, slot] = np.concatenate([params.flip for _, params in steps])[positions] == 1

    step, row = np.divmod(positions, batch)
    for number, mask in enumerate(done):
        mask[row[step == number]] = True
    return DecodeRun(*steps[0], np.repeat(images, slots_of), geometry, destination, mirror)
