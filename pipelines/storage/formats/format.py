"""The formats that a split can be written in, and all that conversion does differently for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from pipelines.errors import UserError
from pipelines.storage.entry import Entry
from pipelines.storage.formats.beton import BetonReader
from pipelines.storage.formats.beton_writer import BetonWriter
from pipelines.storage.formats.wds import physical_order
from pipelines.storage.formats.wds_reader import ShardReader
from pipelines.storage.formats.wds_writer import ShardWriter, remove_folder, shards_end, with_png
from pipelines.storage.reader import Reader
from pipelines.storage.transcode import EncodedImage

SHARD_SIZE = 1_000_000_000
"""Bytes of a shard, at most: some 9,000 of ImageNet's images, so 140 shards in all."""
SMALLEST_SHARD = 10_000


class Writer(Protocol):
    """Appends samples to an unfinished split; goes on where an earlier one was killed."""

    end: int
    """Bytes written so far, by this writer and those before it."""

    def append(self, sample: EncodedImage, label: int) -> int:
        """Write one sample and return where its bytes are, for the journal."""
        ...

    def sync(self) -> None:
        """Have everything written so far on the disk before returning."""
        ...

    def finish(self, records: np.ndarray) -> None:
        """Write the index of RECORD [n]; afterward the split is whole and on the disk."""
        ...

    def close(self) -> None:
        """Leave what is written as it is. May be called twice."""
        ...


@dataclass(frozen=True)
class Format:
    """How a split is stored: as a file or a folder, `path` below, unfinished under a name of its own."""

    suffix: str
    """Of the split's file, or folder, after the split's name."""
    stored: Callable[[EncodedImage], EncodedImage]
    """Give a sample the bytes that are stored of it; picklable, for the workers."""
    written: Callable[[Path], int]
    """Tell how many bytes of data an unfinished split has (0: there is none), as the journal's offsets count them."""
    writer: Callable[[Path, Sequence[Entry], np.ndarray], Writer]
    """Open an unfinished split, that may get these entries, for writing behind RECORD [n]."""
    reader: Callable[[Path], Reader]
    """Open a split; raises DeitfastError where it is not whole."""
    order: Callable[[int], np.ndarray]
    """Give the order that so many entries are written in, int64 [n]."""
    remove: Callable[[Path], None]
    """Delete a split, if there is one."""
    options: dict[str, int] = field(default_factory=dict)
    """What the bytes depend on besides the images, for dataset.json."""


def beton() -> Format:
    """Return the format of one `.beton` file a split."""
    return Format(
        suffix=".beton",
        stored=_as_it_is,
        written=lambda path: path.stat().st_size if path.exists() else 0,
        writer=lambda path, entries, done: BetonWriter(path, len(entries), sum(e.size for e in entries), done),
        reader=BetonReader,
        order=np.arange,
        remove=lambda path: path.unlink(missing_ok=True),
    )


def shards(size: int = SHARD_SIZE) -> Format:
    """Return the format of a folder of WebDataset tar shards a split.

    Args:
        size: bytes of a shard, at most (but for a sample that alone is larger).

    Raises:
        UserError: shards would be too small.
    """
    if size < SMALLEST_SHARD:
        raise UserError("shards are too small", expected=f"{SMALLEST_SHARD:,} bytes or more", found=f"{size:,}")
    return Format(
        suffix=".wds",
        stored=with_png,
        written=shards_end,
        writer=lambda path, entries, done: ShardWriter(path, size, done),
        reader=ShardReader,
        order=physical_order,
        remove=remove_folder,
        options={"shard_size": size},
    )


def named_format(name: str, shard_size: int | None = None) -> Format:
    """Return the format beton, or wds with shards of `shard_size` bytes (None: SHARD_SIZE).

    Raises:
        UserError: there is no such format, or a size where there are no shards.
    """
    match name:
        case "beton" if shard_size is None:
            return beton()
        case "beton":
            raise UserError("--shard-size without shards", remedy="--format wds, or leave --shard-size out")
        case "wds":
            return shards(SHARD_SIZE if shard_size is None else shard_size)
        case _:
            raise UserError(f"there is no format {name}", expected="beton, wds")


def _as_it_is(sample: EncodedImage) -> EncodedImage:
    return sample
