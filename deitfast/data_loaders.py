"""A recipe's view of a data set: its training and validation loaders."""

import numpy as np
import torch

from deitfast.config.recipe import Recipe
from deitfast.runtime import Runtime
from pipelines.batch import Loader
from pipelines.errors import UserError
from pipelines.loaders.factory import open_loader
from pipelines.rng.sampler import EvalSampler, SamplerSpec, TrainSampler, group_size, stratified_subset
from pipelines.storage.dataset import Dataset

LARGEST_EVALUATION_BATCH = 1024
"""Images of a rank's batch in evaluation, at most: larger ones only take memory."""


def open_training(dataset: Dataset, recipe: Recipe, runtime: Runtime) -> Loader:
    """Return this rank's loader of the training split.

    Raises:
        UserError: the batch does not divide among the ranks, or the split is too small for it.
    """
    sampler = training_sampler(dataset, recipe, runtime, recipe.train.batch)
    reader = dataset.split("train")
    return open_loader(reader, recipe.augment, recipe.loader, sampler, train=True, device=runtime.device)


def training_sampler(
    dataset: Dataset, recipe: Recipe, runtime: Runtime, batch: int, *, include_partial: bool = False
) -> TrainSampler:
    """Return what decides this rank's training rows; raises as `open_training`.

    Args:
        dataset: the data set.
        recipe: its seed, repeats, groups and share of the images.
        runtime: rank and world.
        batch: views of a step over all ranks.
        include_partial: also those groups that do not fill a batch, and every view only once: for a teacher.
    """
    reader, augment = dataset.split("train"), recipe.augment
    if batch % (runtime.world * recipe.train.accumulate):
        raise UserError(
            f"train.batch {batch} does not divide among {runtime.world} processes x "
            f"train.accumulate {recipe.train.accumulate}"
        )
    return TrainSampler(
        SamplerSpec(
            samples=reader.num_samples,
            batch=batch,
            seed=augment.seed,
            repeats=augment.repeats,
            group=group_size(augment, batch // runtime.world),
            rank=runtime.rank,
            world=runtime.world,
            views=0 if include_partial else recipe.distill.views,
            subset=training_subset(dataset, recipe),
            include_partial=include_partial,
        )
    )


def training_subset(dataset: Dataset, recipe: Recipe) -> np.ndarray | None:
    """Return the indices, int64, of the training images that the recipe uses; None: all."""
    if recipe.train.fraction == 1:
        return None
    return stratified_subset(dataset.split("train").labels, recipe.train.fraction, recipe.augment.seed)


def open_split(dataset: Dataset, split: str, recipe: Recipe, runtime: Runtime) -> Loader:
    """Return this rank's evaluation loader of a split: every image once over all ranks, the rest masked."""
    reader = dataset.split(split)
    share = -(-reader.num_samples // runtime.world)  # a larger batch would be padding
    batch = max(1, min(recipe.train.batch // runtime.world, LARGEST_EVALUATION_BATCH, share))
    sampler = EvalSampler(reader.num_samples, batch, rank=runtime.rank, world=runtime.world)
    return open_loader(reader, recipe.augment, recipe.loader, sampler, train=False, device=runtime.device)


def typical_side(dataset: Dataset) -> int:
    """Return the median of the training images' shorter sides, in pixels."""
    reader = dataset.split("train")
    shorter = torch.minimum(torch.as_tensor(reader.heights), torch.as_tensor(reader.widths))
    return int(shorter.median())
