"""The resident loader: small images of one size, decoded once, kept on the device; a batch is one gather."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.errors import Mistake
from pipelines.loaders.assemble import CHUNK, Codec, Geometry, Plan, decoded
from pipelines.loaders.prefetch import prefetched
from pipelines.loaders.resample import resample
from pipelines.storage.reader import Reader


class ResidentLoader:
    """Holds the split as uint8 [N, H, W, 3] on the device (CIFAR-10's 50,000 images: 154 MB).

    Its pixels are `reference`'s bit for bit: crops are copies, and `resample` rounds as PIL does.
    """

    name = "resident"

    def __init__(self, plan: Plan, codec: Callable[[], Codec]) -> None:
        self.plan, self.steps_per_epoch = plan, plan.sampler.steps_per_epoch
        self.images: Tensor = load(plan, codec).to(plan.device)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` from `start_step` on; see `pipelines.batch.Loader`."""
        return prefetched(lambda: self._batches(epoch, start_step), self.plan.spec.prefetch, self.plan.device)

    def close(self) -> None:
        """Let go of the images."""
        self.images = self.images[:0]

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        for step in range(start_step, self.steps_per_epoch):
            rows, params = self.plan.draw(epoch, step)
            crops = gather(self.images, rows.samples, Geometry.of(params), self.plan.augment.size)
            if not rows.valid.all():
                crops[torch.from_numpy(~rows.valid).to(crops.device)] = 0
            yield self.plan.batch(crops, rows, params)


def one_size(reader: Reader) -> tuple[int, int] | None:
    """Return the height and width that all images of a split share, or None."""
    heights, widths = reader.heights, reader.widths
    same = len(heights) > 0 and (heights == heights[0]).all() and (widths == widths[0]).all()
    return (int(heights[0]), int(widths[0])) if same else None


def load(plan: Plan, codec: Callable[[], Codec]) -> Tensor:
    """Decode a whole split to uint8 [N, H, W, 3] on the host.

    Raises:
        Mistake: its images differ in size.
        Failure: a sample is damaged.
    """
    size = one_size(plan.reader)
    if size is None:
        raise Mistake(
            f"the resident loader cannot hold {plan.reader.path}",
            expected="images of one size",
            found=f"{len(set(zip(plan.reader.heights.tolist(), plan.reader.widths.tolist(), strict=True)))} sizes",
            remedy="choose another loader: --set loader.name=cpu",
        )
    images = torch.empty(plan.reader.num_samples, *size, 3, dtype=torch.uint8)
    out = images.numpy()

    def fill(start: int) -> None:
        own = codec()
        for sample in range(start, min(start + 8 * CHUNK, len(out))):
            out[sample] = decoded(plan, own, sample, 0, 0, *size)

    with ThreadPoolExecutor(plan.workers) as pool:
        for _ in pool.map(fill, range(0, len(out), 8 * CHUNK)):
            pass
    return images


def gather(images: Tensor, samples: np.ndarray, geometry: Geometry, size: int) -> Tensor:
    """Return a batch's crops, uint8 [B, S, S, 3], from images uint8 [N, H, W, 3], all on one device."""
    device = images.device
    chosen = torch.from_numpy(samples).to(device)
    window, resized, offset = (
        torch.from_numpy(x).to(device) for x in (geometry.window, geometry.resized, geometry.offset)
    )
    if (geometry.window[:, :2] == 0).all() and (geometry.window[:, 2:] == geometry.resized).all():
        return framed(images, chosen, resized, offset, size)
    stretched = resample(images[chosen], window, resized, int(geometry.resized.max()))
    return framed(stretched, torch.arange(len(samples), device=device), resized, offset, size)


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
