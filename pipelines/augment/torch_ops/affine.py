"""The geometric operations in batched torch: Pillow's affine transform with bicubic resampling.

Every operation takes `images` uint8 [K, H, W, 3] and `arguments` float64 [K, 2] and returns new uint8 images of the
same shape on the same device. The center (x + .5, y + .5) of an output pixel is mapped to its source point; where that
lies outside the image the output is FILL. Nothing synchronizes with the host.

Source: Pillow's Geometry.c. Coordinates and interpolation are float64 in Pillow's order of operations, because a last
bit decides twice: whether a source point on the border is inside, and what the interpolated value is truncated to. The
usual sum of four weighted pixels falls just below the integer in flat areas, and would darken them by 1/255.
"""

import torch
from torch import Tensor

FILL = (124, 116, 104)
"""Color of what lies outside the image: ImageNet's mean, as timm rounds it."""


def shear_x(images: Tensor, arguments: Tensor) -> Tensor:
    """Take pixel (x, y) from (x + argument y, y): sheared along x about the top left."""
    x, y = _centers(images)
    return _resample_x(images, x + _per_image(arguments[:, 0]) * y)


def shear_y(images: Tensor, arguments: Tensor) -> Tensor:
    """Take pixel (x, y) from (x, y + argument x): sheared along y about the top left."""
    return shear_x(images.transpose(1, 2), arguments).transpose(1, 2)


def translate_x(images: Tensor, arguments: Tensor) -> Tensor:
    """Take pixel (x, y) from (x + argument W, y): moved to the left for positive arguments."""
    x, _ = _centers(images)
    return _resample_x(images, x + _per_image(arguments[:, 0] * images.shape[2]))


def translate_y(images: Tensor, arguments: Tensor) -> Tensor:
    """Take pixel (x, y) from (x, y + argument H): moved up for positive arguments."""
    return translate_x(images.transpose(1, 2), arguments).transpose(1, 2)


def rotate(images: Tensor, arguments: Tensor) -> Tensor:
    """Turn about the center; `arguments` are cosine and sine of the (counter-clockwise negative) angle in radians."""
    cosine, sine = _per_image(arguments[:, 0]), _per_image(arguments[:, 1])
    height, width = images.shape[1:3]
    x, y = _centers(images)
    shift_x = cosine * (-width / 2) + sine * (-height / 2) + width / 2
    shift_y = -sine * (-width / 2) + cosine * (-height / 2) + height / 2
    return _resample(images, cosine * x + sine * y + shift_x, -sine * x + cosine * y + shift_y)


def _per_image(values: Tensor) -> Tensor:
    """[K] as [K, 1, 1]."""
    return values.view(-1, 1, 1)


def _centers(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel centers x as float64 [1, W] and y as [H, 1]."""
    height, width = images.shape[1:3]
    x, y = (torch.arange(side, device=images.device, dtype=torch.float64) + 0.5 for side in (width, height))
    return x.unsqueeze(0), y.unsqueeze(1)


def _resample_x(images: Tensor, x: Tensor) -> Tensor:
    """Interpolate along x alone, where the source row is exactly the output row (Pillow's 2-D result is the same).

    Args:
        images: uint8 [K, H, W, 3].
        x: source points, float64 [K, H or 1, W].
    """
    planes = images.permute(0, 3, 1, 2).contiguous()
    taps, fraction = _taps(x, planes.shape[3])
    values = [planes.gather(3, tap.unsqueeze(1).expand(planes.shape)).double() for tap in taps]
    return _finish(_cubic(values, fraction.unsqueeze(1)), (x >= 0) & (x < planes.shape[3]))


def _resample(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Interpolate in both directions, first along x.

    Args:
        images: uint8 [K, H, W, 3].
        x: source points, float64 [K, H, W].
        y: source points, float64 [K, H, W].
    """
    height, width = images.shape[1:3]
    planes = images.permute(0, 3, 1, 2).flatten(2)  # [K, 3, H * W]
    columns, fraction_x = _taps(x, width)
    rows, fraction_y = _taps(y, height)
    lines = []
    for row in rows:
        points = [(row * width + column).flatten(1).unsqueeze(1).expand(planes.shape) for column in columns]
        values = [planes.gather(2, point).double().unflatten(2, (height, width)) for point in points]
        lines.append(_cubic(values, fraction_x.unsqueeze(1)))
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return _finish(_cubic(lines, fraction_y.unsqueeze(1)), inside)


def _taps(source: Tensor, size: int) -> tuple[list[Tensor], Tensor]:
    """Indices of the four pixels around each source point, clamped to the image, and its distance from the second."""
    first = (source - 0.5).floor()
    return [(first + step).clamp(0, size - 1).long() for step in (-1, 0, 1, 2)], source - 0.5 - first


def _cubic(values: list[Tensor], fraction: Tensor) -> Tensor:
    """Interpolate between the second and third of four values: Keys' cubic with a = -1 (Geometry.c, BICUBIC).

    Pillow's resize has a = -1/2; its transform does not.
    """
    v1, v2, v3, v4 = values
    p2 = v3 - v1
    p3 = (v1 - v2).mul_(2).add_(v3).sub_(v4)
    p4 = (v2 - v1).sub_(v3).add_(v4)
    return (p4 * fraction).add_(p3).mul_(fraction).add_(p2).mul_(fraction).add_(v2)


def _finish(values: Tensor, inside: Tensor) -> Tensor:
    """Clip and truncate float64 [K, 3, H, W], fill what is not `inside` [K, H or 1, W]; uint8 [K, H, W, 3]."""
    planes = values.clamp_(0, 255).to(torch.uint8)
    for channel, value in enumerate(FILL):
        planes[:, channel].masked_fill_(~inside, value)
    return planes.permute(0, 2, 3, 1)
