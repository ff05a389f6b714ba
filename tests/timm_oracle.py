"""timm's own RandAugment on Pillow images: what the operations are held against."""

import platform
from unittest.mock import patch

import numpy as np
from PIL import Image
from timm.data import auto_augment

FILL = (124, 116, 104)
POLICY = auto_augment.rand_augment_transform(
    "rand-m9-mstd0.5-inc1", {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
)
NAMES = ("none", *(operation.name.removesuffix("Increasing").removesuffix("Rel") for operation in POLICY.ops))
"""timm's order, under the names that `pipelines.draws.OPERATIONS` uses."""
ROUNDING = 0 if platform.machine() == "x86_64" else 1
"""Largest difference allowed: elsewhere Pillow's compiler may fuse multiplications and additions."""


def arguments(name: str, magnitude: float) -> tuple[float, ...]:
    """Return what timm's operation would be called with at |magnitude| with the sign of `magnitude`."""
    drawn = POLICY.ops[NAMES.index(name) - 1]
    with patch.object(auto_augment, "_randomly_negate", lambda level: -level if magnitude < 0 else level):
        return drawn.level_fn(abs(magnitude), drawn.hparams) if drawn.level_fn else ()


def apply(name: str, image: np.ndarray, magnitude: float) -> np.ndarray:
    """Apply timm's operation to uint8 [H, W, 3] at |magnitude| with the sign of `magnitude`."""
    if name == "Posterize" and arguments(name, magnitude) == (0,):
        return np.zeros_like(image)  # Pillow refuses what timm draws here; no bit kept means black
    drawn = POLICY.ops[NAMES.index(name) - 1]
    hparams = {key: value for key, value in drawn.hparams.items() if key != "magnitude_std"}
    operation = auto_augment.AugmentOp(drawn.name, prob=1.0, magnitude=abs(magnitude), hparams=hparams)  # pyright: ignore[reportArgumentType]
    with patch.object(auto_augment, "_randomly_negate", lambda level: -level if magnitude < 0 else level):
        return np.asarray(operation(Image.fromarray(image)))
