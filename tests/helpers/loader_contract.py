"""How tests of loaders open them, damage what they read, and wait for them."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.batch import Loader
from pipelines.loaders import factory
from pipelines.loaders.factory import available, open_loader
from pipelines.rng.sampler import EvalSampler, SamplerSpec, TrainSampler
from pipelines.spec import AugmentSpec, LoaderSpec
from pipelines.storage.dataset import open_reader
from pipelines.storage.reader import Reader
from tests.helpers.stored_images import jpeg, photo, write_split

CPU = torch.device("cpu")
REASONS = available()
LOADERS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(REASONS[name]), reason=REASONS[name] or "works here"))
    for name in factory.NAMES
]
SIZE, BATCH = 32, 12
RESIZED = AugmentSpec(size=SIZE, crop="resized", repeats=3, mix_group=4, seed=7)
PADDED = AugmentSpec(size=SIZE, crop="padded", repeats=2, mix_group=4, seed=7)


def open_train(
    name: str,
    reader: Reader,
    spec: AugmentSpec,
    rank: int = 0,
    world: int = 1,
    device: torch.device = CPU,
    **more: object,
) -> Loader:
    sampler = TrainSampler(
        SamplerSpec(
            samples=reader.num_samples,
            batch=BATCH * world,
            seed=spec.seed,
            repeats=spec.repeats,
            group=spec.mix_group,
            rank=rank,
            world=world,
        )
    )
    return open_loader(reader, spec, loader_spec(name, more), sampler, train=True, device=device)


def open_eval(
    name: str,
    reader: Reader,
    spec: AugmentSpec,
    rank: int = 0,
    world: int = 1,
    device: torch.device = CPU,
    **more: object,
) -> Loader:
    sampler = EvalSampler(reader.num_samples, BATCH, rank, world)
    return open_loader(reader, spec, loader_spec(name, more), sampler, train=False, device=device)


def loader_spec(name: str, more: dict) -> LoaderSpec:
    return LoaderSpec(**{"name": name, "workers": 2, **more})


def write_photos(path: Path) -> Reader:
    """29 images of odd sizes: JPEGs of all subsamplings, some progressive, one turned by EXIF, three stored raw."""
    rng, images = np.random.default_rng(0), []
    for index in range(29):
        image = photo(rng, int(rng.integers(24, 150)), int(rng.integers(24, 150)))
        options = {"subsampling": index % 3, "progressive": index % 5 == 0}
        images.append((image, None if index % 10 == 9 else jpeg(image, **options)))
    turned = Image.Exif()
    turned[0x0112] = 6
    images[1] = (images[1][0], jpeg(images[1][0], exif=turned))
    return write_split(path, images)


def write_small(path: Path) -> Reader:
    """29 images of 32 x 32, every fifth a JPEG."""
    rng, images = np.random.default_rng(1), []
    for index in range(29):
        image = photo(rng, 32, 32)
        images.append((image, jpeg(image) if index % 5 == 0 else None))
    return write_split(path, images)


def damaged(reader: Reader, folder: Path, sample: int) -> Reader:
    """Copy a split with one bit of one sample flipped."""
    path = folder / f"damaged{reader.path.suffix}"
    (shutil.copytree if reader.path.is_dir() else shutil.copy)(reader.path, path)
    place = reader.location(sample)
    file = path / place.file.name if path.is_dir() else path
    content = bytearray(file.read_bytes())
    content[place.offset + place.size // 2] ^= 1
    file.write_bytes(content)
    return open_reader(path)


def within(seconds: float, work: Callable[[], object]) -> BaseException | None:
    """Run `work` in a thread and return what it raised; fail instead of hanging."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"no answer within {seconds} s"
    return raised[0] if raised else None
