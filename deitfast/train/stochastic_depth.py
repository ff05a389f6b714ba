"""What a training step drops: residual branches and activations, as functions of where the run is.

A row's branches depend on (seed, epoch, sample, view) alone, as its augmentation does: so any number of ranks and
micro-batches learns the same, and so does a run that was resumed. They are drawn on the host and are an input of the
model: a CUDA graph would repeat, or have to be told about, what is drawn inside of it.
"""

from collections.abc import Sequence

import numpy as np

from pipelines.rng import philox
from pipelines.rng.view_params import ViewParams


def draw_kept(rates: Sequence[float], params: ViewParams, epoch: int, seed: int) -> np.ndarray:
    """Return which rows keep which residual branches, bool [B, branches].

    Args:
        rates: probability of each branch to be dropped (`VisionTransformer.drop_rates`).
        params: what was drawn for the rows; gives their samples and views.
        epoch: from 0; views may come back in another epoch, and what is dropped does not.
        seed: `train.seed`.
    """
    blocks = -(-len(rates) // 4)
    sample, view = params.sample.astype(np.int64), params.view.astype(np.int64)
    block = (epoch * blocks + np.arange(blocks))[:, None]
    words = np.stack(philox.philox(sample, view, philox.DEPTH, block, *philox.key_words(seed)), 1)
    dropped = (
        words.reshape(4 * blocks, -1)[: len(rates)] < np.array([philox.threshold(rate) for rate in rates])[:, None]
    )
    return np.ascontiguousarray(~dropped.T)


def dropout_seed(params: ViewParams, epoch: int, seed: int) -> int:
    """Return 63 bits to seed torch's generator with, of which dropout draws: another for each rank and step."""
    sample, view = params.sample[:1].astype(np.int64), params.view[:1].astype(np.int64)
    high, low, _, _ = philox.philox(sample, view, philox.DROPOUT, np.array([epoch]), *philox.key_words(seed))
    return int(philox.sort_key(high, low)[0])
