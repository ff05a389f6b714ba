"""The resident loader: small images of one size, decoded once, kept on the device; a batch is one gather."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.device import explain_oom, to_device
from pipelines.errors import DeitfastError, UserError
from pipelines.loaders.geometry import Geometry
from pipelines.loaders.host import CHUNK, Codec, Plan, decoded
from pipelines.loaders.prefetch import prefetched
from pipelines.loaders.resample import resample
from pipelines.rng.sampler import Rows
from pipelines.storage.reader import Reader

OUT_OF_SIGHT = 1 << 20
"""Offset of a frame that sees nothing of any image."""


class ResidentLoader:
    """Holds the split as uint8 [N, H, W, 3] on the device (CIFAR-10's 50,000 images: 154 MB).

    Its pixels are `reference`'s bit for bit: crops are copies, and `resample` rounds as PIL does.
    """

    name = "resident"

    def __init__(self, plan: Plan, codec: Callable[[], Codec]) -> None:
        self.plan, self.steps_per_epoch = plan, plan.sampler.steps_per_epoch
        images, self._damaged = load(plan, codec)
        with explain_oom("the images that the resident loader keeps there", "--set loader.name=cpu keeps none"):
            self.images: Tensor = images.to(plan.device)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` from `start_step` on; see `pipelines.batch.Loader`."""
        return prefetched(lambda: self._batches(epoch, start_step), self.plan.spec.prefetch, self.plan.device)

    def close(self) -> None:
        """Let go of the images."""
        self.images = self.images.new_empty((0, *self.images.shape[1:]))  # a slice would hold all of them

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        for step in range(start_step, self.steps_per_epoch):
            rows, params = self.plan.draw(epoch, step)
            size, interpolation = self.plan.augment.size, self.plan.interpolation
            crops = gather(self.images, rows, Geometry.of(params), size, interpolation)
            skipped = np.flatnonzero(rows.valid & np.isin(rows.samples, list(self._damaged)))
            for sample in rows.samples[skipped].tolist():
                self.plan.bad.meet(sample, self._damaged[sample])
            yield self.plan.batch(crops, rows, params, skipped)


def one_size(reader: Reader) -> tuple[int, int] | None:
    """Return the height and width that all images of a split share, or None."""
    heights, widths = reader.heights, reader.widths
    same = len(heights) > 0 and (heights == heights[0]).all() and (widths == widths[0]).all()
    return (int(heights[0]), int(widths[0])) if same else None


def load(plan: Plan, codec: Callable[[], Codec]) -> tuple[Tensor, dict[int, DeitfastError]]:
    """Decode a whole split to uint8 [N, H, W, 3] on the host, with what is wrong with images that are to be skipped.

    Raises:
        UserError: its images differ in size.
        DeitfastError: a sample is damaged.
    """
    size = one_size(plan.reader)
    if size is None:
        raise UserError(
            f"the resident loader cannot hold {plan.reader.path}",
            expected="images of one size",
            found=f"{len(set(zip(plan.reader.heights.tolist(), plan.reader.widths.tolist(), strict=True)))} sizes",
            remedy="choose another loader: --set loader.name=cpu",
        )
    images = torch.empty(plan.reader.num_samples, *size, 3, dtype=torch.uint8)
    out, damaged = images.numpy(), dict[int, DeitfastError]()

    def fill(start: int) -> None:
        own = codec()
        for sample in range(start, min(start + 8 * CHUNK, len(out))):
            try:
                out[sample] = decoded(plan, own, sample, 0, 0, *size)
            except DeitfastError as failure:
                if not plan.spec.skip_bad:
                    raise
                damaged[sample] = failure
                out[sample] = 0

    with ThreadPoolExecutor(plan.workers) as pool:
        for _ in pool.map(fill, range(0, len(out), 8 * CHUNK)):
            pass
    return images, damaged


def gather(images: Tensor, rows: Rows, geometry: Geometry, size: int, interpolation: str = "bicubic") -> Tensor:
    """Return a batch's crops, uint8 [B, S, S, 3], from images uint8 [N, H, W, 3], on their device.

    One copy carries what the device must know, and the host waits for nothing. Rows that are not valid are black.
    """
    whole = not geometry.crop_box[:, :2].any() and bool((geometry.crop_box[:, 2:] == geometry.resized).all())
    offset = np.where(rows.valid[:, None], geometry.offset, OUT_OF_SIGHT)
    columns = np.column_stack([rows.samples, np.arange(len(offset)), geometry.crop_box, geometry.resized, offset])
    chosen, own, window, resized, offset = (
        part.squeeze(1) for part in to_device(torch.from_numpy(columns), images.device).split([1, 1, 4, 2, 2], dim=1)
    )
    if whole:
        return framed(images, chosen, resized, offset, size)
    stretched = resample(images[chosen], window, resized, int(geometry.resized.max()), interpolation)
    return framed(stretched, own, resized, offset, size)


def framed(images: Tensor, chosen: Tensor, extent: Tensor, offset: Tensor, size: int) -> Tensor:
    """Return uint8 [B, S, S, 3]: what an S x S frame at `offset` sees of each chosen image, black outside `extent`.

    Args:
        images: uint8 [N, H, W, 3].
        chosen: int64 [B], indices into `images`.
        extent: int64 [B, 2], height and width of the part of each image that counts, from its top left corner.
        offset: int64 [B, 2], top and left of the frame; may be negative or reach over the edge.
        size: S.
    """
    steps = torch.arange(size, device=images.device)
    ys, xs = offset[:, :1] + steps, offset[:, 1:] + steps  # [B, S]
    inside_y, inside_x = (ys >= 0) & (ys < extent[:, :1]), (xs >= 0) & (xs < extent[:, 1:])
    ys, xs = ys.clamp(0, images.shape[1] - 1), xs.clamp(0, images.shape[2] - 1)
    seen = images[chosen[:, None, None], ys[:, :, None], xs[:, None, :]]
    return seen * (inside_y[:, :, None] & inside_x[:, None, :]).unsqueeze(-1)
