"""Fixtures that every test file may use: data sets, made once, and a watch over threads."""

import threading
from collections.abc import Iterator
from pathlib import Path

import betons
import numpy as np
import pytest
from betons import photo, write_beton
from images import MemorySource, drawn, encoded, entries, jpeg, odd_images, rotated_jpeg
from PIL import Image

from pipelines.storage.beton import BetonReader
from pipelines.storage.convert import convert


@pytest.fixture(scope="session")
def odd() -> dict[str, bytes]:
    """One image file of each kind."""
    return odd_images()


def _jpegs(count: int, seed: int) -> list[bytes]:
    """JPEGs with sides of 20 to 400 px; some grey, progressive, rotated by EXIF, at full chroma resolution."""
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
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dataset of 40 JPEGs (32 train, 8 val) of odd sizes in 4 classes."""
    splits = {"train": entries(_jpegs(32, 100), classes=4), "val": entries(_jpegs(8, 200), classes=4)}
    folder = tmp_path_factory.mktemp("data") / "tiny"
    convert(MemorySource(classes=("ant", "bee", "cat", "dog"), splits=splits), folder, workers=1)
    return folder


@pytest.fixture(scope="session")
def tiny_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dataset of raw 32 x 32 images (80 train, 20 val) in 10 classes."""
    train = [drawn(32, 32, number) for number in range(80)]
    val = [drawn(32, 32, 1000 + number) for number in range(20)]
    splits = {"train": entries(train, classes=10, names="t#{}"), "val": entries(val, classes=10, names="v#{}")}
    folder = tmp_path_factory.mktemp("data") / "small"
    convert(MemorySource("cifar10", classes=tuple("abcdefghij"), splits=splits), folder, workers=1)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> BetonReader:
    """29 images of odd sizes: JPEGs of all subsamplings, some progressive, one turned by EXIF, three stored raw."""
    rng, images = np.random.default_rng(0), []
    for index in range(29):
        image = photo(rng, int(rng.integers(24, 150)), int(rng.integers(24, 150)))
        options = {"subsampling": index % 3, "progressive": index % 5 == 0}
        images.append((image, None if index % 10 == 9 else betons.jpeg(image, **options)))
    turned = Image.Exif()
    turned[0x0112] = 6
    images[1] = (images[1][0], betons.jpeg(images[1][0], exif=turned))
    return write_beton(tmp_path_factory.mktemp("photos") / "photos.beton", images)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> BetonReader:
    """29 images of 32 x 32, every fifth a JPEG."""
    rng, images = np.random.default_rng(1), []
    for index in range(29):
        image = photo(rng, 32, 32)
        images.append((image, betons.jpeg(image) if index % 5 == 0 else None))
    return write_beton(tmp_path_factory.mktemp("small") / "small.beton", images)


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    """Fail a test that leaves a thread behind."""
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not left, f"threads left behind: {left}"
