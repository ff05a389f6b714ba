"""PIL's bicubic and bilinear resize for a whole batch on any device, each image with its own window and scale."""

import torch
from torch import Tensor

PRECISION_BITS = 22
"""PIL's weights for 8-bit images are integers of 32 - 8 - 2 bits (Pillow, src/libImaging/Resample.c)."""


def resample(images: Tensor, window: Tensor, resized: Tensor, side: int, interpolation: str = "bicubic") -> Tensor:
    """Crop and resize each image as `PIL.Image.crop` and `resize` do, width first, bit for bit.

    The two passes are products with each image's own matrix of weights. Weights and pixels are integers, and their
    sums stay below 2^31: float64 holds them exactly (Apple's GPUs have float32 only, and may differ by one level).

    Args:
        images: uint8 [B, H, W, 3].
        window: int64 [B, 4]: top, left, height, width.
        resized: int64 [B, 2]: height and width of each result.
        side: height and width of the returned tensor, at least the largest of `resized`.
        interpolation: bicubic or bilinear.

    Returns:
        uint8 [B, side, side, 3]; undefined beyond each row's `resized`.
    """
    count, height, width, channels = images.shape
    across = weights(window[:, 1], window[:, 3], resized[:, 1], width, side, interpolation)  # [B, side, W]
    down = weights(window[:, 0], window[:, 2], resized[:, 0], height, side, interpolation)  # [B, side, H]
    columns = images.permute(0, 2, 1, 3).reshape(count, width, height * channels)
    columns = rounded(across @ columns.to(across.dtype)).view(count, side, height, channels)
    lines = columns.permute(0, 2, 1, 3).reshape(count, height, side * channels)
    return rounded(down @ lines).view(count, side, side, channels).to(torch.uint8)


def rounded(sums: Tensor) -> Tensor:
    """Return weighted sums as pixel values: half up, within 0 and 255."""
    return ((sums + 2 ** (PRECISION_BITS - 1)) / 2**PRECISION_BITS).floor_().clamp_(0, 255)


def weights(
    start: Tensor, length: Tensor, resized: Tensor, pixels: int, side: int, interpolation: str = "bicubic"
) -> Tensor:
    """Return PIL's weights x 2^22 along one axis, [B, side, pixels], whole numbers.

    PIL's `precompute_coeffs`: output i has its center at (i + .5) scale in the window; the filter is stretched by
    scale where it shrinks; its support is cut to whole pixels and to the window; weights are made to sum to 1.
    """
    kernel, support = KERNELS[interpolation]
    dtype = torch.float32 if start.device.type == "mps" else torch.float64
    scale = (length / resized.to(dtype))[:, None, None]
    stretch = scale.clamp(min=1)
    steps = torch.arange(side, device=start.device, dtype=dtype)[None, :, None]
    places = torch.arange(pixels, device=start.device, dtype=dtype)[None, None, :] - start[:, None, None]
    center = (steps + 0.5) * scale
    first = (center - support * stretch + 0.5).trunc().clamp(min=0)
    last = torch.minimum((center + support * stretch + 0.5).trunc(), length[:, None, None].to(dtype))
    inside = (places >= first) & (places < last)
    raw = kernel((places - center + 0.5) / stretch) * inside
    raw = raw / raw.sum(-1, keepdim=True)
    return (raw * 2**PRECISION_BITS + 0.5 * raw.sign()).trunc()


def bicubic(x: Tensor) -> Tensor:
    """Return Keys' cubic with a = -.5, PIL's `bicubic_filter`, at x."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((x - 5) * x + 8) * x * -0.5 + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def triangle(x: Tensor) -> Tensor:
    """Return 1 - |x| within 1, PIL's `bilinear_filter`, at x."""
    return (1 - x.abs()).clamp(min=0)


KERNELS = {"bicubic": (bicubic, 2), "bilinear": (triangle, 1)}
"""The filters, and how far from its center each reaches."""
