"""timm's own operations on Pillow images, and torchvision's color jitter: the reference of the operations."""

import platform
from unittest.mock import patch

import numpy as np
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import functional

FILL = (124, 116, 104)
HPARAMS = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
"""What timm's create_transform passes on for the DeiT recipe."""
RANDAUGMENT = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", dict(HPARAMS))
AUTOAUGMENT = auto_augment.auto_augment_transform("original", dict(HPARAMS))

TIMMS = {operation.name.removesuffix("Increasing").removesuffix("Rel"): operation.name for operation in RANDAUGMENT.ops}
TIMMS |= {f"{name}Original": name for name in ("Solarize", "Color", "Contrast", "Sharpness")}
TIMMS["PosterizeOriginal"] = "PosterizeOriginal"
"""timm's name of an operation by that in `pipelines.rng.policies.OPERATIONS`."""
OURS = {theirs: ours for ours, theirs in TIMMS.items()}
JITTER = {
    "JitterBrightness": functional.adjust_brightness,
    "JitterContrast": functional.adjust_contrast,
    "JitterSaturation": functional.adjust_saturation,
}
NAMES = (*TIMMS, *JITTER)

ROUNDING = 0 if platform.machine() == "x86_64" else 1
"""Largest difference allowed: elsewhere Pillow's compiler may fuse multiplications and additions."""


def arguments(name: str, magnitude: float) -> tuple[float, ...]:
    """Return what the operation would be called with at |magnitude| with the sign of `magnitude`."""
    if name in JITTER:
        return (magnitude,)
    level_fn = auto_augment.LEVEL_TO_ARG[TIMMS[name]]
    with _signed(magnitude):
        return level_fn(abs(magnitude), HPARAMS) if level_fn else ()


def apply(name: str, image: np.ndarray, magnitude: float) -> np.ndarray:
    """Apply the operation to uint8 [H, W, 3] at |magnitude| with the sign of `magnitude`."""
    if name in JITTER:
        return np.asarray(JITTER[name](Image.fromarray(image), magnitude))
    if name == "Posterize" and arguments(name, magnitude) == (0,):
        return np.zeros_like(image)  # Pillow refuses what timm draws here; no bit kept means black
    operation = auto_augment.AugmentOp(TIMMS[name], prob=1.0, magnitude=abs(magnitude), hparams=HPARAMS)  # pyright: ignore[reportArgumentType]
    with _signed(magnitude):
        return np.asarray(operation(Image.fromarray(image)))


def _signed(magnitude: float):
    """Make timm negate what it negates at random just where the magnitude is negative."""
    return patch.object(auto_augment, "_randomly_negate", lambda level: -level if magnitude < 0 else level)
