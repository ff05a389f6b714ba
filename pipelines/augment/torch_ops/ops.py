"""The operations of RandAugment, AutoAugment and color jitter: what argument a magnitude means, and the function that
applies it.

Drawn magnitudes m are in 0..10, and negative where the sign was drawn negative; color jitter's are the factor itself.
The recipe's `rand-m9-mstd0.5-inc1` has the -Increasing and -Rel kinds of timm's operations, AutoAugment's policy the
others (-Original here). Arguments are computed on the host with timm's own arithmetic (float64), pixels on the device
with Pillow's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipelines.augment.torch_ops import affine, color
from pipelines.rng.packed_spec import UNIT
from pipelines.rng.view_params import ViewParams

SLOTS = {"operation": "magnitude", "jitter": "factor"}
"""Columns of the operations that an image may get, one after the other, and those of their magnitudes."""
PIXELS_AT_ONCE_CPU, PIXELS_AT_ONCE_GPU = 1 << 16, 1 << 22
"""Most pixels in one call of an operation, so that float64 temporaries fit a CPU's caches and little GPU memory."""


@dataclass(frozen=True)
class Operation:
    """One operation."""

    argument: Callable[[np.ndarray], np.ndarray]
    """Signed magnitudes float64 [K] to arguments float64 [K] or, where there are two, [K, 2]."""
    apply: Callable[[Tensor, Tensor], Tensor]
    """Images uint8 [K, H, W, 3] and arguments float64 [K, 2] to images, without a host synchronization."""


def _none(m: np.ndarray) -> np.ndarray:
    return np.zeros_like(m)


def _rotation(m: np.ndarray) -> np.ndarray:
    """+-3 m degrees as the cosine and sine that Image.rotate puts into its matrix, by the same libm and rounding."""
    radians = [-math.radians(degrees % 360.0) for degrees in (m / 10.0 * 30.0).tolist()]
    return np.array([(round(math.cos(a), 15), round(math.sin(a), 15)) for a in radians]).reshape(-1, 2)


def _bits(m: np.ndarray) -> np.ndarray:
    return 4 - np.trunc(np.abs(m) / 10.0 * 4)


def _bits_original(m: np.ndarray) -> np.ndarray:
    return np.trunc(np.abs(m) / 10.0 * 4) + 4


def _threshold(m: np.ndarray) -> np.ndarray:
    return 256 - np.minimum(256, np.trunc(np.abs(m) / 10.0 * 256))


def _threshold_original(m: np.ndarray) -> np.ndarray:
    return np.minimum(256, np.trunc(np.abs(m) / 10.0 * 256))


def _addend(m: np.ndarray) -> np.ndarray:
    return np.minimum(128, np.trunc(np.abs(m) / 10.0 * 110))


def _factor(m: np.ndarray) -> np.ndarray:
    return np.maximum(0.1, 1.0 + m / 10.0 * 0.9)


def _factor_original(m: np.ndarray) -> np.ndarray:
    return np.abs(m) / 10.0 * 1.8 + 0.1


def _itself(m: np.ndarray) -> np.ndarray:
    return m


def _shear(m: np.ndarray) -> np.ndarray:
    return m / 10.0 * 0.3


def _translation(m: np.ndarray) -> np.ndarray:
    return m / 10.0 * 0.45


TABLE = {
    "AutoContrast": Operation(_none, color.autocontrast),
    "Equalize": Operation(_none, color.equalize),
    "Invert": Operation(_none, color.invert),
    "Rotate": Operation(_rotation, affine.rotate),
    "Posterize": Operation(_bits, color.posterize),
    "Solarize": Operation(_threshold, color.solarize),
    "SolarizeAdd": Operation(_addend, color.solarize_add),
    "Color": Operation(_factor, color.color),
    "Contrast": Operation(_factor, color.contrast),
    "Brightness": Operation(_factor, color.brightness),
    "Sharpness": Operation(_factor, color.sharpness),
    "ShearX": Operation(_shear, affine.shear_x),
    "ShearY": Operation(_shear, affine.shear_y),
    "TranslateX": Operation(_translation, affine.translate_x),
    "TranslateY": Operation(_translation, affine.translate_y),
    "PosterizeOriginal": Operation(_bits_original, color.posterize),
    "SolarizeOriginal": Operation(_threshold_original, color.solarize),
    "ColorOriginal": Operation(_factor_original, color.color),
    "ContrastOriginal": Operation(_factor_original, color.contrast),
    "SharpnessOriginal": Operation(_factor_original, color.sharpness),
    "JitterBrightness": Operation(_itself, color.brightness),
    "JitterContrast": Operation(_itself, color.contrast),
    "JitterSaturation": Operation(_itself, color.color),
}
"""Every operation but 'none' by its name in `pipelines.rng.policies.OPERATIONS`."""


def used_slots(params: ViewParams) -> tuple[np.ndarray, np.ndarray]:
    """Return the operations in the K slots that any row of a batch uses, and their magnitudes.

    Returns:
        Indices into OPERATIONS, int32 [B, K], 0 for none; magnitudes as `arguments` takes them, float64 [B, K].
    """
    operations = np.concatenate([params[name] for name in SLOTS], axis=1)
    magnitudes = np.concatenate([params[name] for name in SLOTS.values()], axis=1)
    used = operations.any(0)
    return operations[:, used], magnitudes[:, used] / UNIT


def arguments(name: str, magnitudes: np.ndarray) -> np.ndarray:
    """Return an operation's arguments, computed on the host.

    Args:
        name: a key of TABLE.
        magnitudes: signed m in -10..10, or color jitter's factors, float64 [K].

    Returns:
        float64 [K, 2]; the second column is used by Rotate alone.
    """
    drawn = TABLE[name].argument(magnitudes)
    return drawn if drawn.ndim == 2 else np.stack([drawn, np.zeros_like(drawn)], axis=1)


def apply(name: str, images: Tensor, rows: Tensor, arguments: Tensor) -> None:
    """Apply one operation in place to some rows of a batch.

    Args:
        name: a key of TABLE.
        images: uint8 [B, H, W, 3].
        rows: int64 [K], each row once; their number is known to the host, so that nothing waits for the device.
        arguments: float64 [K, 2], one line per entry of `rows`.
    """
    pixels = PIXELS_AT_ONCE_CPU if images.device.type == "cpu" else PIXELS_AT_ONCE_GPU
    at_once = max(1, pixels // (images.shape[1] * images.shape[2]))
    for some, theirs in zip(rows.split(at_once), arguments.split(at_once), strict=True):
        images.index_copy_(0, some, TABLE[name].apply(images.index_select(0, some), theirs))
