"""Operations and the whole way from crops to the model's input, against timm with Pillow and a plain reading."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from pipelines.augment.chain import augment
from pipelines.augment.torch_ops import ops
from pipelines.batch import Batch
from pipelines.rng.packed_spec import UNIT
from pipelines.rng.policies import AUTOAUGMENT, OPERATIONS
from pipelines.rng.view_params import ViewParams
from pipelines.spec import AugmentSpec
from tools.parity import plain, timm_ops
from tools.parity.check import Check, compare
from tools.parity.pictures import pictures

RANDAUGMENTS = (9.0, -9.0, 8.37, -9.61, 10.0)
JITTERS = (0.7, 0.85, 1.0, 1.13, 1.3)
EXTREME_SIZES = ((1, 1), (1, 9), (3, 3), (29, 20), (33, 65))
FLOAT_ALLOWED = 1e-5 if timm_ops.ROUNDING == 0 else 1 / 255 / 0.224


def magnitudes(name: str) -> tuple[float, ...]:
    """Return magnitudes to try an operation at: what its policy draws, both signs."""
    if name.startswith("Jitter"):
        return JITTERS
    levels = {float(level) for sub_policy in AUTOAUGMENT for step, _, level in sub_policy if step == name}
    signed = [*levels, *(-level for level in levels)]
    return (*signed,) if name.endswith("Original") else (*RANDAUGMENTS, *signed)


def operations(crops: np.ndarray) -> Iterator[Check]:
    """Compare every operation on crops, uint8 [N, S, S, 3], and on made-up extremes of odd sizes."""
    extremes = [np.stack(list(pictures(*size).values())) for size in EXTREME_SIZES]
    for name in ops.TABLE:
        ours, theirs = [], []
        for images in (crops, *extremes):
            for magnitude in magnitudes(name):
                ours.append(_applied(name, images, magnitude))
                theirs.append(np.stack([timm_ops.apply(name, image, magnitude) for image in images]))
        yield compare(name, ours, theirs, timm_ops.ROUNDING)
    yield policy()


def policy() -> Check:
    """Compare AutoAugment's sub-policies with timm's: operations by index, probabilities and magnitudes."""
    indices = {name: index for index, name in enumerate(OPERATIONS)}
    ours = [(indices[name], chance, level) for sub_policy in AUTOAUGMENT for name, chance, level in sub_policy]
    steps = [step for sub_policy in timm_ops.AUTOAUGMENT.policy for step in sub_policy]
    return compare("sub-policies", ours, [(indices[timm_ops.OURS[s.name]], s.prob, s.magnitude) for s in steps], 0)


def chain(crops: np.ndarray, params: dict[str, ViewParams]) -> Iterator[Check]:
    """Compare normalization, erasing and mixing one by one, and each policy's whole way.

    Args:
        crops: uint8 [N, S, S, 3].
        params: what was drawn for the crops under each policy, by name; "RandAugment" is one of them.
    """
    spec = AugmentSpec(size=crops.shape[1])
    drawn = params["RandAugment"]
    boxed = drawn.cutmix_bbox[:, 2] > 0
    parts = {
        "normalize": only(drawn, ()),
        "flip": only(drawn, ("flip",)),
        "erase": only(drawn, ("erase",)),
        f"MixUp, {np.sum(~boxed)} images": only(drawn, ("mix_index", "lam"), ~boxed),
        f"CutMix, {np.sum(boxed)} images": only(drawn, ("mix_index", "lam", "cutmix_bbox"), boxed),
    }
    for name, some in (parts | {f"all of it, {name}": drawn for name, drawn in params.items()}).items():
        batch = _batch(crops, some)
        ours = augment(batch, spec, dtype=torch.float32, train=True).pixels.permute(0, 2, 3, 1).numpy()
        yield compare(name, ours, plain.augmented(batch, spec), FLOAT_ALLOWED)
    halved = replace(spec, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))
    batch = _batch(crops, drawn)
    ours = augment(batch, halved, dtype=torch.float32, train=False).pixels.permute(0, 2, 3, 1).numpy()
    yield compare("evaluation, another mean", ours, plain.normalized(crops, halved), FLOAT_ALLOWED)


def only(params: ViewParams, names: tuple[str, ...], rows: np.ndarray | None = None) -> ViewParams:
    """Return parameters that keep nothing but some columns, of some rows."""
    kept = ViewParams(np.zeros_like(params.table))
    kept.sample[:], kept.view[:] = params.sample, params.view
    kept.mix_index[:], kept.lam[:] = np.arange(len(params)), UNIT
    rows = np.ones(len(params), np.bool_) if rows is None else rows
    for name in names:
        kept[name][rows] = params[name][rows]
    return kept


def _applied(name: str, images: np.ndarray, magnitude: float) -> np.ndarray:
    batch = torch.from_numpy(images.copy())
    arguments = torch.from_numpy(ops.arguments(name, np.full(len(images), magnitude)))
    ops.apply(name, batch, torch.arange(len(images)), arguments)
    return batch.numpy()


def _batch(crops: np.ndarray, params: ViewParams) -> Batch:
    labels = torch.arange(len(crops))
    return Batch(torch.from_numpy(crops.copy()), labels, labels >= 0, params)
