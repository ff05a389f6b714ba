"""Random erasing: boxes of standard normal noise, made on the device as a function of (seed, sample, view, pixel)."""

from functools import lru_cache

import torch
from torch import Tensor

from pipelines.rng import distributions, draws
from pipelines.rng.packed_spec import UNIT, pack
from pipelines.spec import AugmentSpec


def erase(images: Tensor, boxes: Tensor, samples: Tensor, views: Tensor, spec: AugmentSpec, count: int) -> None:
    """Fill each row's box with N(0, 1) noise per pixel and channel, in place.

    The noise is a multiple of 2^-16, the same bits on every device, and does not depend on the box
    (`draws.erase_noise`).

    Args:
        images: normalized float32 [B, S, S, 3].
        boxes: top, left, height, width: int64 [B, 4]; height 0 where nothing is erased.
        samples: int64 [B].
        views: int64 [B].
        spec: gives the seed.
        count: pixels in all boxes together, known on the host, so that it need not wait for the device.
    """
    top, left, height, width = boxes.unbind(1)
    areas = height * width
    row = torch.repeat_interleave(torch.arange(len(areas), device=areas.device), areas, output_size=count)
    within = torch.arange(count, device=areas.device) - (areas.cumsum(0) - areas)[row]
    y = top[row] + within // width[row]
    x = left[row] + within % width[row]
    pixels = y * images.shape[2] + x
    noise = draws.erase_noise(samples[row], views[row], pixels, pack(spec), normal_table(images.device))
    images[row, y, x] = torch.stack(noise, dim=-1).float() / UNIT


@lru_cache(maxsize=8)
def normal_table(device: torch.device) -> Tensor:
    """Return `distributions.normal_table()`, int32 [4097], kept on the device, as copying it would wait."""
    return torch.tensor(distributions.normal_table(), dtype=torch.int32, device=device)
