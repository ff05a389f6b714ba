"""Loaders and batches in one call, for training loops and programs outside deitfast."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from pipelines.batch import Batch, Loader
from pipelines.loaders.codecs.pillow import PillowCodec
from pipelines.loaders.factory import open_loader
from pipelines.loaders.geometry import Geometry, by_image
from pipelines.loaders.host import resize_crop
from pipelines.rng.sampler import EvalSampler, SamplerSpec, TrainSampler, group_size
from pipelines.rng.view_params import draw_eval
from pipelines.spec import AugmentSpec, LoaderSpec
from pipelines.storage.dataset import Dataset

CPU = torch.device("cpu")


def train_loader(
    dataset: Dataset,
    spec: AugmentSpec,
    *,
    batch: int,
    loader: LoaderSpec | None = None,
    device: torch.device = CPU,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Open a loader of the training split: batches to be handed to `augment_batch`.

    Args:
        dataset: an open data set.
        spec: size, crops and augmentation; its seed and the epoch decide every batch.
        batch: images of one step over all ranks; a multiple of `world`, and of `world * spec.mix_group` if images are
            mixed.
        loader: which loader, and how many threads; None: what suits the data and the device.
        device: where batches go.
        rank: this process, from 0.
        world: number of processes; each gets its own part of every batch.

    Raises:
        UserError: the numbers do not fit each other or the data set; the message says which to change.
    """
    reader = dataset.split("train")
    group = group_size(spec, batch // world)
    sampler = TrainSampler(
        SamplerSpec(
            samples=reader.num_samples,
            batch=batch,
            seed=spec.seed,
            repeats=spec.repeats,
            group=group,
            rank=rank,
            world=world,
        )
    )
    return open_loader(reader, spec, loader or LoaderSpec(), sampler, train=True, device=device)


def eval_loader(
    dataset: Dataset,
    spec: AugmentSpec,
    *,
    batch: int,
    split: str = "val",
    loader: LoaderSpec | None = None,
    device: torch.device = CPU,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Open a loader that gives every image of a split once, cropped as the recipe evaluates; not shuffled.

    Args:
        dataset: an open data set.
        spec: size, evaluation crop and normalization.
        batch: images of one step on each rank; the last batch is filled up with rows whose `valid` is False.
        split: name of the split.
        loader: which loader, and how many threads; None: what suits the data and the device.
        device: where batches go.
        rank: this process, from 0.
        world: number of processes.

    Raises:
        UserError: there is no such split, or the loader does not work here.
    """
    reader = dataset.split(split)
    sampler = EvalSampler(reader.num_samples, batch, rank, world)
    return open_loader(reader, spec, loader or LoaderSpec(), sampler, train=False, device=device)


def batch_of_images(images: Sequence[Image.Image], spec: AugmentSpec) -> Batch:
    """Return pictures as the batch that evaluation would make of them: `augment_batch(..., train=False)` takes it.

    Args:
        images: pictures of any size and mode, as PIL opens them.
        spec: size and evaluation crop, such as a run's `recipe.augment`.

    Returns:
        Crops, uint8 [N, S, S, 3], resized by Pillow; labels are 0.
    """
    pixels = [np.asarray(image.convert("RGB")) for image in images]
    rows = EvalSampler(len(pixels), len(pixels)).rows(0, 0)
    params = draw_eval(spec, rows, *np.array([image.shape[:2] for image in pixels]).T)
    crops = np.zeros((len(pixels), spec.size, spec.size, 3), np.uint8)
    codec = PillowCodec(spec.eval_interpolation)
    for wanted in by_image(rows, Geometry.of(params)):
        top, left, height, width = wanted.window
        for crop in wanted.crops:
            resize_crop(codec, pixels[wanted.sample][top : top + height, left : left + width], crop, crops)
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    return Batch(torch.as_tensor(crops), labels, torch.ones(len(pixels), dtype=torch.bool), params)
