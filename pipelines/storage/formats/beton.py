"""FFCV's dataset file, version 2: its layout, and a reader of two fields (image, label) that copies nothing.

Layout, little-endian: header; one descriptor a field; one metadata row a sample; zeros up to a page boundary; pages of
image data, no sample crossing from one page into the next; the allocation table (sample, offset, size) up to the end
of the file. Page n of FFCV is the bytes from n x page size on, counted from the start of the file.

Our own files have a CRC32 a sample as well: among the zeros behind the metadata, where FFCV does not look, `CRC_MAGIC`
and uint32 [samples]. A file without it is one that FFCV wrote.
"""

import zlib
from pathlib import Path

import numpy as np

from pipelines.errors import DeitfastError
from pipelines.storage.reader import JPEG, RAW, REMEDY, ByteRange, MappedFile, compare_crc

VERSION = 2
MIN_PAGE = 1 << 21
MAX_PAGE = 1 << 31  # the header holds the page size in 32 bits

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("offset", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("size", "<u8")])

IMAGE_FIELD, INT_FIELD = 2, 1  # FFCV's type identifiers of RGBImageField and IntField
FIELDS = np.array([(IMAGE_FIELD, b"image", b""), (INT_FIELD, b"label", b"")], dtype=FIELD)
CRC_MAGIC = b"deitfast-crc32-1"
PREAMBLE = HEADER.itemsize + FIELDS.nbytes
"""Bytes before the first sample's metadata."""


def metadata_end(samples: int) -> int:
    """Return the first byte after the metadata of so many samples."""
    return PREAMBLE + samples * SAMPLE.itemsize


def index_end(samples: int) -> int:
    """Return the first byte after the metadata and the CRC32s of so many samples."""
    return metadata_end(samples) + len(CRC_MAGIC) + samples * 4


class BetonReader:
    """A `reader.Reader` of one .beton file, through a read-only memory map.

    Opening checks the whole index (header, fields, metadata, allocation table) for consistency, so that no later
    access can leave the file; image data is compared with its CRC32 only by `read_verified`.

    Args:
        path: the file.

    Raises:
        DeitfastError: the file is missing, cut, longer than its index says, or not a .beton with these two fields.
    """

    num_samples: int
    page_size: int
    labels: np.ndarray
    """int64 [N]."""
    heights: np.ndarray
    """int32 [N], pixels."""
    widths: np.ndarray
    """int32 [N], pixels."""
    modes: np.ndarray
    """uint8 [N]: JPEG or RAW."""
    offsets: np.ndarray
    """int64 [N]: first byte of the sample in the file."""
    sizes: np.ndarray
    """int64 [N]: bytes of the sample."""
    crcs: np.ndarray
    """uint32 [N]: CRC32 of these bytes; of a file that FFCV wrote, their number instead."""
    has_crcs: bool
    """Whether samples can be compared with their CRC32."""
    index_crc32: int
    """CRC32 of header, field descriptors, metadata, CRC32s and allocation table, in this order."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._closed = False
        self._file = MappedFile(self.path)
        self._bytes = self._file.bytes
        self.file_size = len(self._bytes)
        header = self._read_header()
        self.num_samples, self.page_size, table = int(header["samples"]), int(header["page_size"]), int(header["table"])
        start, end = metadata_end(self.num_samples), index_end(self.num_samples)
        metadata = self._bytes[PREAMBLE:start].view(SAMPLE)
        self.has_crcs = self._bytes[start : start + len(CRC_MAGIC)].tobytes() == CRC_MAGIC
        table_rows = self._bytes[table:].view(ALLOCATION)
        table_rows = table_rows if self.has_crcs else np.sort(table_rows, order="sample")  # FFCV's workers take turns
        self._check_allocation(metadata, table_rows, table)
        self._load_columns(metadata, table_rows)
        if self.has_crcs:
            self.crcs = self._bytes[start + len(CRC_MAGIC) : end].copy().view("<u4")
        self._check_values()
        crc = zlib.crc32(self._bytes[: end if self.has_crcs else start].data)
        self.index_crc32 = zlib.crc32(self._bytes[table:].data, crc)

    def sample(self, index: int) -> np.ndarray:
        """Return the stored bytes of one sample: a read-only uint8 view [size] of the file."""
        if self._closed:
            raise ValueError(f"{self.path}: this reader is closed")
        return self._file.view(int(self.offsets[index]), int(self.sizes[index]))

    def read_verified(self, index: int) -> np.ndarray:
        """Return `sample(index)` once its CRC32, if there is one, is right. Raises DeitfastError."""
        return compare_crc(self, index, self.sample(index)) if self.has_crcs else self.sample(index)

    def location(self, index: int) -> ByteRange:
        """Return where a sample is stored."""
        return ByteRange(self.path, int(self.offsets[index]), int(self.sizes[index]))

    def stored_in(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return descriptors and offsets of samples' bytes; see `Reader`."""
        return np.full(len(samples), self._file.descriptor), self.offsets[samples]

    def close(self) -> None:
        """Let go of the file. Views already handed out stay valid; may be called twice."""
        self._closed = True
        self._bytes = np.zeros(0, dtype=np.uint8)
        self._file.close()

    def _damaged(self, expected: str, found: str) -> DeitfastError:
        return DeitfastError(f"{self.path}: not a whole .beton file", expected=expected, found=found, remedy=REMEDY)

    def _require(self, holds: bool, expected: str, found: object) -> None:
        if not holds:
            raise self._damaged(expected, str(found))

    def _read_header(self) -> np.void:
        self._require(self.file_size >= PREAMBLE, f"at least {PREAMBLE} bytes", f"{self.file_size} bytes")
        header = self._bytes[: HEADER.itemsize].view(HEADER)[0]
        self._require(header["version"] == VERSION, f"format version {VERSION}", header["version"])
        page, samples, table = int(header["page_size"]), int(header["samples"]), int(header["table"])
        allowed = MIN_PAGE <= page <= MAX_PAGE and page & (page - 1) == 0
        self._require(allowed, f"a page size that is a power of two from {MIN_PAGE} on", page)
        self._require(header["fields"] == len(FIELDS), f"{len(FIELDS)} fields", header["fields"])
        fields = self._bytes[HEADER.itemsize : PREAMBLE].view(FIELD)
        same = (fields["type"] == FIELDS["type"]).all() and (fields["name"] == FIELDS["name"]).all()
        found = ", ".join(f"{f['name'].decode('ascii', 'replace')} (type {f['type']})" for f in fields)
        self._require(bool(same), "fields image (type 2), label (type 1)", found)
        self._require(samples >= 1, "at least one sample", samples)
        size = table + samples * ALLOCATION.itemsize
        self._require(self.file_size == size, f"{size:,} bytes for {samples:,} samples", f"{self.file_size:,} bytes")
        self._require(metadata_end(samples) <= table, "the allocation table after the metadata", f"at byte {table:,}")
        return header

    def _check_allocation(self, metadata: np.ndarray, table_rows: np.ndarray, table: int) -> None:
        """Check that every sample lies between metadata and table, alone, in order and inside one page."""
        n, limit = self.num_samples, np.uint64(table)
        numbered = (table_rows["sample"] == np.arange(n, dtype=np.uint64)).all()
        self._require(bool(numbered), "an allocation table in the samples' order", "another order")
        agree = (table_rows["offset"] == metadata["image"]["offset"]).all()
        self._require(bool(agree), "metadata and allocation table that agree", "different offsets")
        bounded = (table_rows["offset"] <= limit) & (table_rows["size"] <= limit) & (table_rows["size"] > 0)
        self._require(bool(bounded.all()), "samples inside the file", f"sample {int(np.argmin(bounded))} outside it")
        offsets, sizes = table_rows["offset"].astype(np.int64), table_rows["size"].astype(np.int64)
        ends = offsets + sizes
        order = np.argsort(offsets, kind="stable")
        starts = np.empty(n, np.int64)
        starts[order] = np.concatenate([[index_end(n) if self.has_crcs else metadata_end(n)], ends[order][:-1]])
        apart = (offsets >= starts) & (ends <= table)
        self._require(bool(apart.all()), "samples one after the other", f"sample {int(np.argmin(apart))} overlaps")
        whole = offsets // self.page_size == (ends - 1) // self.page_size
        self._require(bool(whole.all()), "each sample inside one page", f"sample {int(np.argmin(whole))} crosses pages")

    def _load_columns(self, metadata: np.ndarray, table_rows: np.ndarray) -> None:
        """Keep the index as contiguous columns."""
        image = metadata["image"]
        self.labels = metadata["label"].astype(np.int64)
        self.heights, self.widths = image["height"].astype(np.int32), image["width"].astype(np.int32)
        self.modes = image["mode"].astype(np.uint8)
        self.offsets, self.sizes = table_rows["offset"].astype(np.int64), table_rows["size"].astype(np.int64)
        self.crcs = self.sizes.astype(np.uint32)

    def _check_values(self) -> None:
        """Check what the metadata says about each image."""
        known = (self.modes == JPEG) | (self.modes == RAW)
        self._require(bool(known.all()), "images stored as JPEG (0) or raw (1)", f"mode {int(self.modes.max())}")
        sides = np.minimum(self.heights, self.widths)
        self._require(bool((sides > 0).all()), "images with a height and a width", "a side of 0 pixels")
        pixels = self.heights.astype(np.int64) * self.widths * 3
        full = (self.modes == JPEG) | (self.sizes == pixels)
        self._require(bool(full.all()), "raw images of height x width x 3 bytes", "another size")
        self._require(bool((self.labels >= 0).all()), "labels from 0 on", f"label {int(self.labels.min())}")
