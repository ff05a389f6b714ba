"""The resident loader: small images of one size, decoded once, kept on the device; a batch is one gather."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.device import explain_oom, to_device
from pipelines.errors import DeitfastError, UserError
from pipelines.loaders.batch_plan import CHUNK, BatchPlan
from pipelines.loaders.geometry import Geometry
from pipelines.loaders.host import Codec, decode_window
from pipelines.loaders.prefetch import PrefetchingLoader
from pipelines.loaders.resample import resample
from pipelines.rng.sampler import Rows
from pipelines.storage.reader import Reader

OUTSIDE = 1 << 20
"""Offset of a frame that lies outside of every image."""


class ResidentLoader(PrefetchingLoader):
    """Holds the split as uint8 [N, H, W, 3] on the device (CIFAR-10's 50,000 images: 154 MB).

    Its pixels are `reference`'s bit for bit: crops are copies, and `resample` rounds as PIL does.
    """

    name = "resident"

    def __init__(self, plan: BatchPlan, codec: Callable[[], Codec]) -> None:
        self.plan, self.steps_per_epoch = plan, plan.sampler.steps_per_epoch
        images, self._damaged = decode_all(plan, codec)
        with explain_oom("the images that the resident loader keeps there", "--loader cpu keeps none"):
            self.images: Tensor = images.to(plan.device)

    def close(self) -> None:
        """Release the images' memory."""
        self.images = self.images.new_empty((0, *self.images.shape[1:]))  # a slice would keep all of them alive

    def _batches(self, epoch: int, start_step: int, stop: Event) -> Iterator[Batch]:
        for rows, params in self.plan.draws(epoch, start_step):
            size, interpolation = self.plan.augment.size, self.plan.interpolation
            crops = gather(self.images, rows, Geometry.of(params), size, interpolation)
            skipped = np.flatnonzero(rows.valid & np.isin(rows.samples, list(self._damaged)))
            for sample in rows.samples[skipped].tolist():
                self.plan.bad.record(sample, self._damaged[sample])
            yield self.plan.batch(crops, rows, params, skipped)


def common_size(reader: Reader) -> tuple[int, int] | None:
    """Return the height and width that all images of a split share, or None."""
    heights, widths = reader.heights, reader.widths
    same = len(heights) > 0 and (heights == heights[0]).all() and (widths == widths[0]).all()
    return (int(heights[0]), int(widths[0])) if same else None


def decode_all(plan: BatchPlan, codec: Callable[[], Codec]) -> tuple[Tensor, dict[int, DeitfastError]]:
    """Decode a split to uint8 [N, H, W, 3] on the host; return it with the errors of images that are skipped.

    Raises:
        UserError: its images differ in size.
        DeitfastError: a sample is damaged.
    """
    size = common_size(plan.reader)
    if size is None:
        raise UserError(
            f"the resident loader cannot hold {plan.reader.path}",
            expected="images of one size",
            found=f"{len(set(zip(plan.reader.heights.tolist(), plan.reader.widths.tolist(), strict=True)))} sizes",
            remedy="choose another loader: --loader cpu",
        )
    images = torch.empty(plan.reader.num_samples, *size, 3, dtype=torch.uint8)
    out, damaged = images.numpy(), dict[int, DeitfastError]()

    def fill(start: int) -> None:
        own = codec()
        for sample in range(start, min(start + 8 * CHUNK, len(out))):
            try:
                out[sample] = decode_window(plan, own, sample, 0, 0, *size)
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

    One copy carries the indices to the device, and the host waits for nothing. Rows that are not valid are black.
    """
    copies_only = not geometry.crop_box[:, :2].any() and bool((geometry.crop_box[:, 2:] == geometry.resized).all())
    offset = np.where(rows.valid[:, None], geometry.offset, OUTSIDE)
    columns = np.column_stack([rows.samples, np.arange(len(offset)), geometry.crop_box, geometry.resized, offset])
    chosen, own, window, resized, offset = (
        part.squeeze(1) for part in to_device(torch.from_numpy(columns), images.device).split([1, 1, 4, 2, 2], dim=1)
    )
    if copies_only:
        return view_through_frame(images, chosen, resized, offset, size)
    stretched = resample(images[chosen], window, resized, int(geometry.resized.max()), interpolation)
    return view_through_frame(stretched, own, resized, offset, size)


def view_through_frame(images: Tensor, chosen: Tensor, extent: Tensor, offset: Tensor, size: int) -> Tensor:
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
