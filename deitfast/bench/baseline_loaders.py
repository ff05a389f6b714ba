"""Other projects' loaders, from stored bytes to crops at the recipe's size, on the device."""

import io
import itertools
import multiprocessing
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from deitfast.bench.timing import BenchCase
from deitfast.bench.workbench import Workbench
from pipelines.errors import pluralize
from pipelines.spec import AugmentSpec
from pipelines.storage.dataset import open_reader
from pipelines.storage.reader import RAW, Reader
from pipelines.workers import usable_cores

TRIES = 5
"""Tries at one image: newer Pillow refuses a posterize to no bits, which timm's recipe draws once in 700 images."""
WORKER_BATCH = 64
"""Images of a worker process's batch at most: DeiT's on one GPU."""
LONG_EPOCH = 1 << 16
"""Images of FFCV's epochs here: small data sets are repeated, so that measurements meet no end of an epoch."""
CROPS_ONLY = "it makes random resized crops, and this recipe pads images instead"


class SkipError(Exception):
    """Why a baseline was not measured."""


def module(name: str) -> Any:
    """Import a baseline's module, untyped."""
    return import_module(name)


def package_version(distribution: str) -> str:
    """Return the whole name and the version of the first installed distribution whose name starts so."""
    named = (found for found in metadata.distributions() if found.name.startswith(distribution))
    return next((f"{found.name} {found.version}" for found in named), "")


class StoredImages(TorchDataset):
    """A split's images through a transform, as a map-style torch dataset that workers may unpickle."""

    def __init__(self, path: Path, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.path, self.transform = path, transform
        self._reader: Reader | None = None

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return the transformed image, float32 [3, S, S], and its label."""
        if self._reader is None:  # in the worker: a memory map does not travel
            self._reader = open_reader(self.path)
        image = stored_image(self._reader, index)
        for attempt in itertools.count(1):
            try:
                return self.transform(image), int(self._reader.labels[index])
            except ValueError:
                if attempt == TRIES:
                    raise
        raise AssertionError


def stored_image(reader: Reader, index: int) -> Image.Image:
    """Return a stored image as PIL sees it."""
    data = reader.sample(index)
    if reader.modes[index] == RAW:
        return Image.fromarray(data.reshape(int(reader.heights[index]), int(reader.widths[index]), 3))
    return Image.open(io.BytesIO(data.tobytes())).convert("RGB")


class EndlessSampler(Sampler):
    """Random permutations one after the other, so that no epoch ends in a measurement."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[int]:
        """Yield indices for ever."""
        rng = np.random.default_rng(0)
        while True:
            yield from rng.permutation(self._samples).tolist()


def deit_transform(spec: AugmentSpec) -> Callable[[Image.Image], torch.Tensor]:
    """Return timm's transform with the reference code's arguments (facebookresearch/deit: main.py, datasets.py)."""
    from torchvision.transforms import RandomCrop

    transform = module("timm.data").create_transform(
        input_size=spec.size,
        is_training=True,
        color_jitter=0.3,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    if spec.crop == "padded":
        transform.transforms[0] = RandomCrop(spec.size, padding=spec.padding)
    return transform


@dataclass(frozen=True)
class WorkerBatches:
    """The batches of a DataLoader's worker processes, without end."""

    batches: Iterator[list[torch.Tensor]]
    """float32 [size, 3, S, S] and labels int64 [size], on the host."""
    size: int
    prefetched: int
    """Batches that may have been made beforehand."""
    workers: int
    pids: list[int]
    what: str


def timm_batches(bench: Workbench, stack: ExitStack) -> WorkerBatches:
    """Open the loader of the DeiT reference code: PIL, timm's transform, a worker process a core."""
    before = set(multiprocessing.active_children())
    workers, batch = usable_cores(), min(bench.recipe.train.batch, WORKER_BATCH)
    loader = DataLoader(
        StoredImages(bench.reader.path, deit_transform(bench.recipe.augment)),
        batch_size=batch,
        sampler=EndlessSampler(bench.reader.num_samples),
        num_workers=workers,
        pin_memory=bench.runtime.device.type == "cuda",
        multiprocessing_context="spawn",  # this process has threads, whose locks a fork would inherit locked
    )
    batches: Any = iter(loader)
    started = [child for child in multiprocessing.active_children() if child not in before]
    stack.callback(_end_workers, batches)
    pids = [child.pid for child in started if child.pid]
    what = f"decode, crop, flip, RandAugment, normalize, erase; {pluralize(workers, 'process')}"
    return WorkerBatches(batches, batch, (loader.prefetch_factor or 1) * workers, workers, pids, what)


def timm_dataloader(bench: Workbench, stack: ExitStack) -> BenchCase:
    """Open that loader, its batches copied to the device."""
    return loading_alone(timm_batches(bench, stack), bench.runtime.device)


def loading_alone(loaded: WorkerBatches, device: torch.device) -> BenchCase:
    """Return taking a batch to the device and doing nothing with it."""

    def take() -> None:
        next(loaded.batches)[0].to(device, non_blocking=True)

    return BenchCase(
        "",
        loaded.what,
        None,
        loaded.size,
        take,
        prefetched=loaded.prefetched + loaded.workers,
        worker_batches=loaded.workers,
        worker_pids=lambda: loaded.pids,
    )


def _end_workers(batches: Any) -> None:
    batches._shutdown_workers()  # torch has no public way to end an endless iteration


def ffcv_stock(bench: Workbench, stack: ExitStack) -> BenchCase:
    """Open FFCV's Loader with its own random resized crop, over the very file."""
    _require_crops(bench)
    if bench.reader.path.is_dir():
        raise SkipError("FFCV reads one .beton file, and this split is in shards")
    ours = module("pipelines.loaders.ffcv")  # keeps FFCV from setting torch's threads
    with ours.quiet():
        fields, loaders, to_tensor = (
            module("ffcv.fields"),
            module("ffcv.loader"),
            module("ffcv.transforms").ToTensor,
        )
        size, reader, batch = bench.recipe.augment.size, bench.reader, bench.recipe.train.batch
        loader = loaders.Loader(
            str(reader.path),
            batch_size=batch,
            num_workers=usable_cores(),
            os_cache=True,
            order=loaders.OrderOption.RANDOM,
            drop_last=True,
            indices=np.tile(np.arange(reader.num_samples), -(-LONG_EPOCH // reader.num_samples)),
            pipelines={
                "image": [fields.rgb_image.RandomResizedCropRGBImageDecoder((size, size)), to_tensor()],
                "label": [fields.basics.IntDecoder(), to_tensor()],
            },
            batches_ahead=2,
        )

    def endless() -> Generator[Any]:
        while True:
            yield from loader

    batches = endless()
    stack.callback(batches.close)

    def take() -> None:
        next(batches)[0].to(bench.runtime.device, non_blocking=True)

    what = f"decode, crop (INTER_AREA); {pluralize(usable_cores(), 'thread')}"
    return BenchCase("", what, None, batch, take, prefetched=3)


def dali_stock(bench: Workbench, stack: ExitStack) -> BenchCase:
    """Open DALI's pipeline for ImageNet: random-crop decode and resize, on the GPU where there is one."""
    _require_crops(bench)
    if (bench.reader.modes == RAW).any():
        raise SkipError("it decodes image files, and these images are stored as raw pixels")
    dali = module("nvidia.dali")
    fn, types = module("nvidia.dali.fn"), module("nvidia.dali.types")
    spec, batch, reader = bench.recipe.augment, bench.recipe.train.batch, bench.reader
    cuda = bench.runtime.device.type == "cuda"

    def encoded() -> Iterator[list[np.ndarray]]:
        order = iter(EndlessSampler(reader.num_samples))
        while True:
            yield [reader.sample(index) for index in itertools.islice(order, batch)]

    @dali.pipeline_def(
        batch_size=batch, num_threads=usable_cores(), device_id=bench.runtime.device.index if cuda else None
    )
    def pipeline() -> Any:
        files = fn.external_source(source=encoded(), dtype=types.UINT8)
        images = fn.decoders.image_random_crop(
            files,
            device="mixed" if cuda else "cpu",
            output_type=types.RGB,
            random_area=spec.scale,
            random_aspect_ratio=spec.ratio,
            num_attempts=10,
        )
        return fn.resize(images, resize_x=spec.size, resize_y=spec.size, interp_type=types.INTERP_TRIANGULAR)

    built = pipeline()
    built.build()
    what = f"decode, crop (triangular) on the {'GPU' if cuda else 'CPU'}; {pluralize(usable_cores(), 'thread')}"
    return BenchCase("", what, None, batch, built.run, prefetched=3, on_device=cuda)


def _require_crops(bench: Workbench) -> None:
    if bench.recipe.augment.crop != "resized":
        raise SkipError(CROPS_ONLY)
