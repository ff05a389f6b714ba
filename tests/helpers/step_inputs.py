"""A batch and targets for one training step, and a mode that fails where the host would wait for the device."""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deitfast.config.recipe import Recipe
from pipelines.batch import Batch
from pipelines.rng.sampler import Rows
from pipelines.rng.view_params import draw_train

ROWS, CLASSES = 16, 10
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2", "bincount")
"""Operators whose result, or its shape, the host has to know."""


class NoWaiting(TorchDispatchMode):
    """Fails where a GPU would be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for given in args
            if isinstance(given, (list, tuple))
            for index in given
        )
        assert name not in WAITS, f"{func} waits for the device"
        assert not masked, f"{func} with a mask waits for the device"
        return func(*args, **(kwargs or {}))


def batch_for(recipe: Recipe) -> Batch:
    rng = np.random.default_rng(0)
    size, samples = recipe.augment.size, np.arange(ROWS)
    rows = Rows(samples, samples * 0, samples // 8, samples * 0, samples[::-1], samples >= 0)
    params = draw_train(recipe.augment, rows, np.full(ROWS, size), np.full(ROWS, size))
    images = torch.from_numpy(rng.integers(0, 256, (ROWS, size, size, 3), dtype=np.uint8))
    return Batch(images, torch.arange(ROWS) % CLASSES, torch.ones(ROWS, dtype=torch.bool), params)


def targets(mode: str) -> torch.Tensor | None:
    if mode == "none":
        return None
    return torch.arange(ROWS) % CLASSES if mode == "hard" else torch.randn(ROWS, CLASSES)
