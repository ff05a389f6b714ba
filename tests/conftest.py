"""Fixtures that every test file may use: data sets, made once for all processes, and a watch over threads."""

import os

# Before torch is imported: a pool of threads costs tensors as small as the tests' more than it gives.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from PIL import Image

from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.formats.format import shards
from pipelines.storage.reader import Reader
from tests.helpers.loader_contract import write_photos, write_small
from tests.helpers.sample_images import (
    MemorySource,
    drawn,
    encoded,
    entries,
    jpeg,
    mixed_source,
    odd_images,
    rotated_jpeg,
)

settings.register_profile("deitfast", deadline=None)  # how long an example takes says more about the machine's load
settings.load_profile("deitfast")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function (name, make) -> folder that calls `make(folder)` once, whichever of xdist's processes is first.

    The folder is read-only by agreement: a test that changes files copies it.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = base / "shared" / name, base / "shared" / f"{name}.made"
        made.parent.mkdir(exist_ok=True)
        with FileLock(made.with_suffix(".lock")):
            if not made.exists():
                make(folder)
                made.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def odd() -> dict[str, bytes]:
    """One image file of each kind."""
    return odd_images()


def _jpegs(count: int, seed: int) -> list[bytes]:
    """JPEGs with sides of 20 to 400 px; some gray, progressive, rotated by EXIF, at full chroma resolution."""
    rng = np.random.default_rng(seed)
    files = []
    for number in range(count):
        height, width = (int(side) for side in np.exp(rng.uniform(np.log(20), np.log(400), 2)))
        match number % 8:
            case 3:
                files.append(encoded(Image.fromarray(drawn(height, width, seed + number)).convert("L"), quality=85))
            case 5:
                files.append(jpeg(height, width, seed + number, progressive=True))
            case 6:
                files.append(rotated_jpeg(height, width, seed + number))
            case _:
                files.append(jpeg(height, width, seed + number, subsampling=2 * (number % 2)))
    return files


@pytest.fixture(scope="session")
def tiny_dataset(shared_folder) -> Path:
    """Folder of a dataset of 40 JPEGs (32 train, 8 val) of odd sizes in 4 classes."""

    def make(folder: Path) -> None:
        splits = {"train": entries(_jpegs(32, 100), classes=4), "val": entries(_jpegs(8, 200), classes=4)}
        convert(MemorySource(classes=("ant", "bee", "cat", "dog"), splits=splits), folder, ConvertOptions(workers=1))

    return shared_folder("tiny", make)


@pytest.fixture(scope="session")
def tiny_small(shared_folder) -> Path:
    """Folder of a dataset of raw 32 x 32 images (80 train, 20 val) in 10 classes."""

    def make(folder: Path) -> None:
        train = [drawn(32, 32, number) for number in range(80)]
        val = [drawn(32, 32, 1000 + number) for number in range(20)]
        splits = {"train": entries(train, classes=10, names="t#{}"), "val": entries(val, classes=10, names="v#{}")}
        convert(MemorySource("cifar10", classes=tuple("abcdefghij"), splits=splits), folder, ConvertOptions(workers=1))

    return shared_folder("small", make)


@pytest.fixture(scope="session")
def mixed_shards(odd: dict[str, bytes], shared_folder) -> Path:
    """Folder of a dataset of odd images (40 train, ten of them stored raw, 4 val) in a dozen shards."""
    return shared_folder(
        "mixed", lambda folder: convert(mixed_source(odd), folder, ConvertOptions(workers=1, form=shards(20_000)))
    )


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """`write_photos` in a .beton."""
    return write_photos(tmp_path_factory.mktemp("photos") / "photos.beton")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """`write_small` in a .beton."""
    return write_small(tmp_path_factory.mktemp("small") / "small.beton")


@pytest.fixture(autouse=True)
def tests_of_a_gpu(request: pytest.FixtureRequest) -> None:
    """Skip what needs a GPU where there is none."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def formats_that_a_loader_reads(request: pytest.FixtureRequest) -> None:
    """Skip what a test over loaders and formats asks of a loader that does not read the format."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("name") == "ffcv" and parameters.get("suffix") == ".wds":
        pytest.skip("FFCV reads no shards")


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    """Fail a test that leaves a thread behind."""
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not left, f"threads left behind: {left}"
