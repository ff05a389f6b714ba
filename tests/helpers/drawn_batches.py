"""Batches of noise with drawn parameters that are valid and cover everything."""

import numpy as np
import torch

from pipelines.batch import Batch
from pipelines.rng.policies import OPERATIONS
from pipelines.rng.view_params import COLUMNS, ViewParams


def empty(rows: int) -> ViewParams:
    """Parameters that do nothing."""
    params = ViewParams(np.zeros((rows, sum(COLUMNS.values())), np.int32))
    params.mix_index[:] = np.arange(rows)
    params.lam[:] = 65536
    return params


def drawn(rng: np.random.Generator, rows: int, size: int) -> ViewParams:
    """Draw parameters that are valid, cover everything, and follow no recipe."""
    params = empty(rows)
    params.sample[:] = rng.integers(0, 2**31, rows)
    params.view[:] = rng.integers(0, 2**31, rows)
    params.flip[:] = rng.integers(0, 2, rows)
    params.operation[:] = rng.integers(0, len(OPERATIONS), (rows, 2)) * (rng.random((rows, 2)) < 0.8)
    params.magnitude[:] = rng.integers(-10 * 65536, 10 * 65536 + 1, (rows, 2))
    params.jitter[:] = rng.integers(0, len(OPERATIONS), (rows, 3)) * (rng.random((rows, 3)) < 0.4)
    params.factor[:] = rng.integers(-10 * 65536, 10 * 65536 + 1, (rows, 3))
    params.mix_index[:] = rng.permutation(rows)
    params.lam[:] = rng.integers(0, 65537, rows)
    for name, share in (("erase", 0.5), ("cutmix_bbox", 0.5)):
        corners = np.sort(rng.integers(0, size + 1, (rows, 2, 2)), axis=1)
        boxes = np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0]], axis=1)
        params[name][:] = boxes * (rng.random((rows, 1)) < share)
    return params


def batch_of(images: np.ndarray, params: ViewParams) -> Batch:
    rows = len(images)
    labels = torch.arange(rows) * 7 % 10
    return Batch(torch.from_numpy(images), labels, torch.arange(rows) < rows - 1, params)


def drawn_batch(seed: int, rows: int = 12, size: int = 32) -> Batch:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (rows, size, size, 3), dtype=np.uint8)
    images[::2] //= 3
    return batch_of(images, drawn(rng, rows, size))
