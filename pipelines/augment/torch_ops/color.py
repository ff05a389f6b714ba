"""The color operations in batched torch, equal to Pillow's pixel for pixel.

Every operation takes `images` uint8 [K, H, W, 3] and `arguments` float64 [K, 2], of which it reads the first column at
most, and returns new uint8 images of the same shape on the same device. Nothing synchronizes with the host.
Sources: Pillow's ImageOps.py and ImageEnhance.py, Blend.c, Convert.c and Filter.c.
"""

import torch
from torch import Tensor

LUMA = (19595, 38470, 7471)
"""Shares of red, green and blue in a gray value, x 65536 (Convert.c, L24)."""


def autocontrast(images: Tensor, arguments: Tensor) -> Tensor:
    """Stretch each channel to 0..255. A channel of one value stays as it is."""
    low, high = _per_channel(images.amin((1, 2))), _per_channel(images.amax((1, 2)))  # [K, 3, 1]
    spread = (high - low).clamp(min=1)
    scale = torch.full_like(spread, 255) / spread  # a Python 255 / spread would round twice: 255 * (1 / spread)
    levels = torch.arange(256, device=images.device, dtype=torch.float64)
    stretched = (levels * scale + -low * scale).clamp(0, 255)
    return _look_up(images, torch.where(high > low, stretched, levels).to(torch.uint8))


def equalize(images: Tensor, arguments: Tensor) -> Tensor:
    """Flatten each channel's histogram by Pillow's integer table; too few distinct pixels leave a channel as it is."""
    counts = _histograms(images)  # [K, 3, 256]
    levels = torch.arange(256, device=images.device)
    brightest = ((counts > 0) * levels).amax(-1, keepdim=True)
    step = (counts.sum(-1, keepdim=True) - counts.gather(-1, brightest)) // 255
    below = counts.cumsum(-1) - counts
    flattened = (step // 2 + below) // step.clamp(min=1)
    return _look_up(images, torch.where(step > 0, flattened.clamp(max=255), levels).to(torch.uint8))


def invert(images: Tensor, arguments: Tensor) -> Tensor:
    """Return 255 - pixel."""
    return 255 - images


def posterize(images: Tensor, arguments: Tensor) -> Tensor:
    """Keep the highest `argument` bits, 0 to 8. At 0 bits all is black; Pillow refuses that where timm draws it."""
    mask = (255 << (8 - arguments[:, 0].long())) & 255
    return images & _per_image(mask).to(torch.uint8)


def solarize(images: Tensor, arguments: Tensor) -> Tensor:
    """Invert pixels from the threshold `argument`, 0 to 256, upwards."""
    return torch.where(images < _per_image(arguments[:, 0]).to(torch.int16), images, 255 - images)


def solarize_add(images: Tensor, arguments: Tensor) -> Tensor:
    """Add `argument`, 0 to 128, to pixels below 128 (so that none can pass 255)."""
    return torch.where(images < 128, images + _per_image(arguments[:, 0]).to(torch.uint8), images)


def color(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend from the gray image at factor 0 to the image at 1 and beyond."""
    return _blend(_gray(images).unsqueeze(-1), images, arguments)


def contrast(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend from the gray image's rounded mean at factor 0 to the image at 1 and beyond."""
    gray = _gray(images)
    mean = gray.sum((1, 2)).double() / (gray.shape[1] * gray.shape[2])
    return _blend(_per_image((mean + 0.5).floor()), images, arguments)


def brightness(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend from black at factor 0 to the image at 1 and beyond."""
    return _blend(images.new_zeros(()), images, arguments)


def sharpness(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend from the smoothed image (3 x 3, center 5/13, others 1/13) at factor 0; the outermost pixels stay."""
    sharpened = images.clone()
    if min(images.shape[1:3]) < 3:
        return sharpened
    pixels = images.to(torch.int16)
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    inner = pixels[:, 1:-1, 1:-1]
    weighted = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner
    # weighted/13 + .5 is never within 1/26 of an integer, so float32 truncates it as exact arithmetic does.
    smooth = (weighted.float() / 13 + 0.5).floor()
    sharpened[:, 1:-1, 1:-1] = _blend(smooth, inner, arguments)
    return sharpened


def _per_image(values: Tensor) -> Tensor:
    """[K] as [K, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)


def _per_channel(values: Tensor) -> Tensor:
    """[K, 3] as float64 [K, 3, 1]."""
    return values.double().unsqueeze(-1)


def _planes(images: Tensor) -> Tensor:
    """Channels as int64 rows [K, 3, H * W]."""
    return images.flatten(1, 2).transpose(1, 2).long()


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace every pixel by its entry in its channel's table: uint8 [K, 3, 256]."""
    return tables.gather(-1, _planes(images)).transpose(1, 2).reshape(images.shape)


def _histograms(images: Tensor) -> Tensor:
    """Count each channel's values: int64 [K, 3, 256]."""
    planes = _planes(images)
    counts = planes.new_zeros((len(images), 3, 256))
    return counts.scatter_add_(-1, planes, planes.new_ones(()).expand_as(planes))


def _gray(images: Tensor) -> Tensor:
    """Gray values as Pillow's convert("L") makes them: int32 [K, H, W]."""
    red, green, blue = (images[..., channel].int() * share for channel, share in enumerate(LUMA))
    return (red + green + blue + 0x8000) >> 16


def _blend(degenerate: Tensor, images: Tensor, arguments: Tensor) -> Tensor:
    """degenerate + factor (images - degenerate) in float32, clipped, then truncated (Blend.c)."""
    base = degenerate.float()
    # Two roundings, as in Pillow: a fused multiply-add (torch.lerp, addcmul on some devices) would differ now and then.
    change = (images - base).mul_(_per_image(arguments[:, 0]).float())
    return change.add_(base).clamp_(0, 255).to(torch.uint8)
