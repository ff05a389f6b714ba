"""Data to measure on: photographs and small images, given or drawn, repeated until an epoch is long enough."""

import io
import tarfile
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.errors import UserError
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.dataset import Dataset
from pipelines.storage.entry import Entry, InMemory
from pipelines.storage.reader import ByteRange, Reader
from tools.parity.pictures import photograph

SUFFIXES = (".jpeg", ".jpg")
SIDES = ((375, 500), (500, 375), (333, 500), (500, 500))
"""Height and width of drawn photographs, in pixels: ImageNet's most frequent ones."""
QUALITY = 92
"""Of drawn photographs: some 100 KB each, as ImageNet's."""
FEW = 200
"""Images up to which converting them is not worth processes of its own."""
CIFAR_SIDE, CIFAR_CLASSES = 32, 10


class RepeatedReader:
    """A split whose images come again and again under new numbers, so that an epoch is as long as a real one's."""

    def __init__(self, reader: Reader, times: int) -> None:
        self._reader, self._own = reader, reader.num_samples
        self.path, self.file_size, self.index_crc32 = reader.path, reader.file_size, reader.index_crc32
        self.num_samples, self.has_crcs = reader.num_samples * times, reader.has_crcs
        self.labels, self.heights, self.widths = (
            np.tile(column, times) for column in (reader.labels, reader.heights, reader.widths)
        )
        self.modes, self.sizes, self.crcs = (
            np.tile(column, times) for column in (reader.modes, reader.sizes, reader.crcs)
        )

    def sample(self, index: int) -> np.ndarray:
        """See `Reader`."""
        return self._reader.sample(index % self._own)

    def read_verified(self, index: int) -> np.ndarray:
        """See `Reader`."""
        return self._reader.read_verified(index % self._own)

    def location(self, index: int) -> ByteRange:
        """See `Reader`."""
        return self._reader.location(index % self._own)

    def stored_in(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Reader`."""
        return self._reader.stored_in(samples % self._own)

    def close(self) -> None:
        """See `Reader`."""
        self._reader.close()


class RepeatedDataset(Dataset):
    """A data set whose splits are repeated to some length."""

    def __init__(self, plain: Dataset, least: dict[str, int]) -> None:
        super().__init__(plain.path, plain.spec)
        self.plain, self._least = plain, least

    def _open_split(self, name: str) -> Reader:
        reader = self.plain.split(name)
        return RepeatedReader(reader, max(1, self._least.get(name, 0) // reader.num_samples))

    def close(self) -> None:
        """Close both."""
        super().close()
        self.plain.close()


def open_photos(
    data: Path | None,
    images: Path | None,
    drawn: int,
    classes: int,
    folder: Path,
    least: dict[str, int],
    sides: tuple[tuple[int, int], ...] = SIDES,
) -> tuple[RepeatedDataset, str]:
    """Return a data set of large JPEGs, and what it is in words.

    Args:
        data: a converted data set; or None.
        images: a folder or a tar of JPEGs; or None: `drawn` photographs are drawn.
        drawn: how many.
        classes: of the data set, as its images have none.
        folder: where images are converted to.
        least: images of each split that the data set is repeated to.
        sides: of drawn photographs.
    """
    if data is not None:
        dataset = Dataset.open(data)
        what = f"{dataset.spec.name} at {data}"
    else:
        files = jpegs(images) if images else draw_photographs(drawn, sides)
        dataset = _converted(files, classes, folder / "photos")
        size = sum(map(len, files)) / len(files) / 1000
        what = f"{len(files)} {'JPEGs of ' + str(images) if images else 'drawn photographs'}, {size:.0f} KB on average"
    again = max(1, least["train"] // dataset.split("train").num_samples)
    return RepeatedDataset(dataset, least), f"{what}, {again} times" if again > 1 else what


def open_small(data: Path | None, drawn: int, folder: Path, least: dict[str, int]) -> tuple[RepeatedDataset, str]:
    """Return a data set of CIFAR's size, `data` or `drawn` images of noise, and what it is in words."""
    if data is not None:
        dataset = Dataset.open(data)
        return RepeatedDataset(dataset, {}), f"{dataset.spec.name} at {data}"
    pixels = np.random.default_rng(0).integers(0, 256, (drawn, CIFAR_SIDE, CIFAR_SIDE, 3), dtype=np.uint8)
    dataset = _converted(list(pixels), CIFAR_CLASSES, folder / "small")
    return RepeatedDataset(dataset, least), f"{drawn} images of noise, repeated to {least['train']:,}"


def jpegs(source: Path) -> list[bytes]:
    """Return the JPEGs of a folder, at any depth, or of a tar.

    Raises:
        UserError: there are none, or there is nothing.
    """
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
        found = [path.read_bytes() for path in paths]
    elif source.is_file():
        try:
            with tarfile.open(source) as archive:
                members = [each for each in archive if each.isfile() and each.name.lower().endswith(SUFFIXES)]
                found = [file.read() for each in members if (file := archive.extractfile(each))]
        except tarfile.TarError as error:
            raise UserError(f"{source} is no tar", found=str(error)) from error
    else:
        raise UserError(f"{source} not found", expected="a folder or a tar of JPEGs")
    if not found:
        raise UserError(f"{source} holds no JPEGs", expected=f"files called *{', *'.join(SUFFIXES)}")
    return found


def draw_photographs(count: int, sides: tuple[tuple[int, int], ...] = SIDES) -> list[bytes]:
    """Draw JPEGs with the spectrum of photographs, grain included."""
    rng, files = np.random.default_rng(0), []
    for number in range(count):
        pixels = photograph(rng, *sides[number % len(sides)])
        noisy = (pixels + rng.normal(0, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=QUALITY, subsampling=2)
        files.append(buffer.getvalue())
    return files


def _converted(images: Sequence[bytes | np.ndarray], classes: int, folder: Path) -> Dataset:
    """Convert images to a data set, some of them several times if there are fewer than classes; both splits alike."""
    entries = [
        Entry(f"image {at}", at % classes, image, len(image) if isinstance(image, bytes) else image.nbytes)
        for at, image in enumerate(islice(cycle(images), max(len(images), classes)))
    ]
    names = tuple(f"class {number:04d}" for number in range(classes))
    source = InMemory("folder", "images to measure with", names, {"train": entries, "val": entries})
    convert(source, folder, ConvertOptions(skip_bad=True, workers=1 if len(entries) <= FEW else 0))
    return Dataset.open(folder)
