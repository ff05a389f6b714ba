"""Writes a .beton file sample by sample, so that it can be continued after any interruption."""

import os
from pathlib import Path

import numpy as np

from pipelines.errors import DeitfastError
from pipelines.files import write_all
from pipelines.storage.formats.beton import (
    ALLOCATION,
    CRC_MAGIC,
    FIELDS,
    HEADER,
    MAX_PAGE,
    MIN_PAGE,
    SAMPLE,
    VERSION,
    index_end,
)
from pipelines.storage.transcode import EncodedImage

USUAL_PAGE = 1 << 23  # FFCV's default; a smaller page wastes more at its end
SMALL_DATASET = 1 << 28

RECORD = np.dtype(
    [
        ("stored", "?"), ("mode", "u1"), ("kind", "<u2"), ("width", "<u2"), ("height", "<u2"),
        ("label", "<u4"), ("crc32", "<u4"), ("size", "<u4"), ("offset", "<u8"),
    ]
)  # fmt: skip
"""What is known about one entry of a source once it is dealt with; `stored` is False for a skipped one."""


def _up(value: int, unit: int) -> int:
    """Round up to a multiple of unit."""
    return -(-value // unit) * unit


class BetonWriter:
    """Appends samples to the data region of an unfinished .beton file; the index is written last.

    Where a sample goes depends only on the sizes of those before it. A sample larger than the page doubles the page
    size until it fits: what lies inside a page also lies inside one twice as long, so nothing has to move.

    Args:
        path: the unfinished file; created if missing.
        planned: samples at most; the data region starts on the first page after the metadata of so many.
        expected_bytes: about how many bytes of image data will come (small datasets get small pages).
        done: RECORD [n] of what the file already holds; everything after it is cut off.
    """

    def __init__(self, path: Path, planned: int, expected_bytes: int, done: np.ndarray) -> None:
        self.path = path
        self.page_size = MIN_PAGE if expected_bytes < SMALL_DATASET else USUAL_PAGE
        self.end = index_end(planned)  # first free byte
        stored = done[done["stored"]]
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if len(stored):
            self._grow(int(stored["size"].max()))
            self.end = int(stored["offset"][-1]) + int(stored["size"][-1])
        else:
            self.end = _up(self.end, self.page_size)
            os.ftruncate(self._fd, 0)  # nothing of an older attempt may show through the gaps
        os.ftruncate(self._fd, self.end)

    def append(self, sample: EncodedImage, label: int) -> int:
        """Write one sample's bytes and return their offset; what else is known of it goes into the index."""
        data = sample.data
        self._grow(len(data))
        if self.end // self.page_size != (self.end + len(data) - 1) // self.page_size:
            self.end = _up(self.end, self.page_size)
        offset = self.end
        write_all(self._fd, data, offset)
        self.end += len(data)
        return offset

    def sync(self) -> None:
        """Have everything written so far on the disk before returning."""
        os.fsync(self._fd)

    def finish(self, records: np.ndarray) -> None:
        """Write header, metadata, CRC32s and allocation table of RECORD [n]; the file is then whole, on the disk."""
        stored = records[records["stored"]]
        table = _up(self.end, self.page_size)  # whole pages: FFCV reads no less
        header = np.array((VERSION, len(FIELDS), self.page_size, len(stored), table), dtype=HEADER)
        metadata, table_rows = np.zeros(len(stored), dtype=SAMPLE), np.zeros(len(stored), dtype=ALLOCATION)
        for name in ("mode", "width", "height", "offset"):
            metadata["image"][name] = stored[name]
        metadata["label"] = stored["label"]
        crcs = CRC_MAGIC + stored["crc32"].astype("<u4").tobytes()
        table_rows["sample"] = np.arange(len(stored))
        table_rows["offset"], table_rows["size"] = stored["offset"], stored["size"]
        os.ftruncate(self._fd, self.end)
        write_all(self._fd, table_rows.tobytes(), table)
        write_all(self._fd, header.tobytes() + FIELDS.tobytes() + metadata.tobytes() + crcs, 0)
        self.sync()

    def close(self) -> None:
        """Close the file as it is. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _grow(self, size: int) -> None:
        if size > MAX_PAGE:
            raise DeitfastError(
                f"{self.path}: a sample of {size:,} bytes does not fit the format", expected=f"at most {MAX_PAGE:,}"
            )
        while self.page_size < size:
            self.page_size *= 2
