"""The recipe as one would write it down for one image after the other, in float64."""

import numpy as np

from pipelines.batch import Batch
from pipelines.rng import draws
from pipelines.rng.packed_spec import UNIT, pack, tables_for
from pipelines.rng.policies import OPERATIONS
from pipelines.rng.view_params import ViewParams
from pipelines.spec import AugmentSpec
from tools.parity import timm_ops


def augmented(batch: Batch, spec: AugmentSpec) -> np.ndarray:
    """Return what `pipelines.augment.chain.augment` should make of a training batch: float64 [B, S, S, 3]."""
    params = batch.params
    ready = [_single(image, params, row, spec) for row, image in enumerate(batch.images.numpy())]
    mixed = []
    for row, image in enumerate(ready):
        partner, lam = ready[params.mix_index[row]], params.lam[row] / UNIT
        top, left, height, width = params.cutmix_bbox[row]
        if height:
            image = image.copy()
            image[top : top + height, left : left + width] = partner[top : top + height, left : left + width]
        else:
            image = image * lam + partner * (1 - lam)
        mixed.append(image)
    return np.stack(mixed)


def normalized(image: np.ndarray, spec: AugmentSpec) -> np.ndarray:
    """Return (pixel / 255 - mean) / std."""
    return (image / 255 - np.array(spec.mean)) / np.array(spec.std)


def _single(image: np.ndarray, params: ViewParams, row: int, spec: AugmentSpec) -> np.ndarray:
    """Flip, operations, normalization and erasing of one row."""
    if params.flip[row]:
        image = image[:, ::-1]
    for indices, magnitudes in (("operation", "magnitude"), ("jitter", "factor")):
        for index, magnitude in zip(params[indices][row], params[magnitudes][row], strict=True):
            if index:
                image = timm_ops.apply(OPERATIONS[index], image, magnitude / UNIT)
    image = normalized(image, spec)
    top, left, height, width = params.erase[row].astype(np.int64)
    y, x = np.mgrid[top : top + height, left : left + width]
    sample, view = int(params.sample[row]), int(params.view[row])
    noise = draws.erase_noise(sample, view, y * image.shape[1] + x, pack(spec), tables_for(spec).normal)
    image[y, x] = np.stack(noise, axis=-1) / UNIT
    return image
