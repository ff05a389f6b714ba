"""What a converted split offers to a reader, however it is stored: all that loaders know of storage."""

import contextlib
import mmap
import os
import weakref
import zlib
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from pipelines.errors import DeitfastError
from pipelines.files import TOO_MANY_FILES, os_remedy

JPEG, RAW = 0, 1
"""What a sample's bytes are: an encoded JPEG, or uint8 [height, width, 3]."""
REMEDY = "convert the dataset again, or copy the file again from where it is whole"


class ByteRange(NamedTuple):
    """Where a sample's bytes lie, as they are stored."""

    file: Path
    offset: int
    size: int


class MappedFile:
    """A file's bytes, through a read-only memory map.

    Touching a page that is gone, because the file was cut meanwhile, would end the process with SIGBUS; so each view is
    compared with the size that the file has now. A file that another one replaced by name stays readable.

    Raises:
        DeitfastError: the file is missing, empty or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._close_fd = weakref.finalize(self, os.close, self._fd)
            self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        except ValueError:  # mmap's word for a file of no bytes
            raise DeitfastError(f"{path}: empty", remedy=REMEDY) from None
        except OSError as error:
            raise _unreadable(path, error) from None
        self.bytes = np.frombuffer(self._map, dtype=np.uint8)
        """uint8 [size], read-only; `view` is the safe way to what may be gone."""

    @property
    def descriptor(self) -> int:
        """The open file's descriptor, for code that reads instead. Raises ValueError once it is closed."""
        if not self._close_fd.alive:
            raise ValueError(f"{self.path}: this reader is closed")
        return self._fd

    def view(self, start: int, size: int) -> np.ndarray:
        """Return some bytes, read-only uint8 [size].

        Raises:
            DeitfastError: the file has been cut since it was opened.
        """
        if (now := os.fstat(self._fd).st_size) < start + size:
            raise DeitfastError(
                f"{self.path}: was cut while it was being read",
                expected=f"{len(self.bytes):,} bytes, as when it was opened",
                found=f"{now:,} bytes",
                remedy="put the whole file back (or convert again), then go on from the last checkpoint with --resume",
            )
        return self.bytes[start : start + size]

    def close(self) -> None:
        """Let go of the file; the map goes with its last view. May be called twice."""
        self._close_fd()
        self.bytes = np.zeros(0, np.uint8)
        with contextlib.suppress(BufferError):  # views are out there
            self._map.close()


def _unreadable(path: Path, error: OSError) -> DeitfastError:
    if isinstance(error, FileNotFoundError):
        return DeitfastError(f"{path}: no such file", remedy=REMEDY)
    many = "let a process open more files (`ulimit -n`), or convert to larger shards (--shard-size)"
    remedy = many if error.errno in TOO_MANY_FILES else os_remedy(error)
    return DeitfastError(f"{path}: cannot be read: {error.strerror}", remedy=remedy)


class Reader(Protocol):
    """Random access to the samples of one split. Opening it has checked that its files belong to its index."""

    path: Path
    """The file, or the folder of files, that was opened."""
    num_samples: int
    labels: np.ndarray
    """int64 [N]."""
    heights: np.ndarray
    """int32 [N], pixels."""
    widths: np.ndarray
    """int32 [N], pixels."""
    modes: np.ndarray
    """uint8 [N]: JPEG or RAW."""
    sizes: np.ndarray
    """int64 [N]: bytes that `sample` returns."""
    has_crcs: bool
    """Whether samples have a CRC32: FFCV writes none."""
    crcs: np.ndarray
    """uint32 [N]: CRC32 of these bytes; their number in a file that FFCV wrote, which has none."""
    file_size: int
    """Bytes of the files that hold the images."""
    index_crc32: int
    """CRC32 of the index: everything here but the images."""

    def sample(self, index: int) -> np.ndarray:
        """Return one sample's bytes, read-only uint8 [size]; those of a JPEG are a view of the file.

        Raises:
            DeitfastError: what is stored there is damaged so badly that it has no such bytes.
        """
        ...

    def read_verified(self, index: int) -> np.ndarray:
        """Return `sample(index)` once its CRC32, if there is one, is right.

        Raises:
            DeitfastError: the bytes are not those that were written; the message names the file and the sample.
        """
        ...

    def location(self, index: int) -> ByteRange:
        """Return where a sample is stored."""
        ...

    def stored_in(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return open file descriptors and offsets, int64 [n] each, at which `sizes` bytes are what `sample` returns.

        A descriptor is -1 for samples whose bytes are in no file as they are.
        """
        ...

    def close(self) -> None:
        """Let go of the files. Views already handed out stay valid; may be called twice."""
        ...


def damaged(reader: Reader, index: int, expected: str, found: str) -> DeitfastError:
    """Return the error that says that a sample is not what was written."""
    return DeitfastError(
        f"{reader.location(index).file}: sample {index} is damaged",
        expected=expected,
        found=found,
        remedy="`deitfast verify` lists everything damaged; then " + REMEDY,
    )


def compare_crc(reader: Reader, index: int, data: np.ndarray) -> np.ndarray:
    """Return `data`, a sample's bytes, once they have its CRC32.

    Raises:
        DeitfastError: they have another one.
    """
    found = zlib.crc32(data.data)
    if found != reader.crcs[index]:
        expected = f"CRC32 {reader.crcs[index]:08x} over {len(data):,} bytes at {reader.location(index).offset:,}"
        raise damaged(reader, index, expected, f"CRC32 {found:08x}")
    return data
