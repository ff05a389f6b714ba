"""Reads a split from its tar shards through our index, in any order; no JPEG is copied."""

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.errors import DeitfastError
from pipelines.storage.formats.wds import (
    BLOCK,
    EXTENSIONS,
    FRAME,
    INDEX,
    MAGIC,
    ROW,
    TRAILER,
    dali_file,
    dali_index,
    ends,
    first_samples,
    frame,
    padded,
    shard_file,
)
from pipelines.storage.reader import JPEG, REMEDY, ByteRange, MappedFile, compare_crc, damaged


class ShardReader:
    """A `reader.Reader` of a folder of shards, through read-only memory maps.

    Opening checks the index, and that each shard has its size and begins with its first sample: a shard that is
    missing, cut, or of another place is named. Raw pixels are decoded from their PNG at each access.

    Args:
        path: the split's folder.

    Raises:
        DeitfastError: the index or a shard is missing, damaged, or not what the index describes.
    """

    has_crcs = True
    labels: np.ndarray
    """int64 [N]."""
    heights: np.ndarray
    """int32 [N], pixels."""
    widths: np.ndarray
    """int32 [N], pixels."""
    modes: np.ndarray
    """uint8 [N]: JPEG or RAW."""
    sizes: np.ndarray
    """int64 [N]: bytes of the JPEG, or of the raw pixels that a PNG becomes."""
    crcs: np.ndarray
    """uint32 [N]: CRC32 of these bytes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._closed = False
        index = _read(self.path / INDEX)
        self.index_crc32 = zlib.crc32(index)
        self.rows = self._parse(index)
        """ROW [N]."""
        order = np.lexsort((self.rows["offset"], self.rows["shard"]))
        self.physical_rows = self.rows[order]
        """ROW [N], as the samples lie."""
        self.positions = np.empty(len(order), np.int64)
        """int64 [N]: which of `physical_rows` a sample is, and the number in its key."""
        self.positions[order] = np.arange(len(order))
        self._check_rows()
        self._load_columns()
        self.firsts = first_samples(self.physical_rows)
        """int64 [number of shards]: the position of each one's first sample."""
        lasts = np.append(self.firsts[1:], self.num_samples) - 1
        self.shard_sizes = ends(self.physical_rows)[lasts] + len(TRAILER)
        """int64 [number of shards]: bytes of each."""
        self.file_size = int(self.shard_sizes.sum())
        self._shards = self._open_shards()

    def sample(self, index: int) -> np.ndarray:
        """Return a JPEG as a view of its shard, or raw pixels decoded from their PNG: read-only uint8 [size].

        Raises:
            DeitfastError: the PNG is damaged.
        """
        stored = self._shard(index).view(int(self._offsets[index]), int(self._stored[index]))
        return stored if self.modes[index] == JPEG else self._pixels(index, stored)

    def read_verified(self, index: int) -> np.ndarray:
        """Return `sample(index)` once its CRC32 is right. Raises DeitfastError."""
        return compare_crc(self, index, self.sample(index))

    def location(self, index: int) -> ByteRange:
        """Return where a sample is stored."""
        shard = shard_file(self.path, int(self._numbers[index]))
        return ByteRange(shard, int(self._offsets[index]), int(self._stored[index]))

    def check_frame(self, index: int) -> None:
        """Check the bytes around a sample's image, and a PNG's own checksums: other programs need them right.

        Raises:
            DeitfastError: its headers, its label or its PNG are not those that were written.
        """
        _, start, size = self.location(index)
        shard = self._shard(index).bytes
        expected = frame(int(self.positions[index]), int(self.labels[index]), int(self.modes[index]), size)
        if shard[start - FRAME : start].tobytes() != expected or shard[start + size : start + padded(size)].any():
            text = f"the headers and the label ({self.labels[index]}) that were written"
            raise damaged(self, index, text, f"others in the {FRAME:,} bytes before or the padding after its image")
        if self.modes[index] != JPEG and not _is_whole_png(shard[start : start + size].tobytes()):
            raise damaged(self, index, "a PNG whose chunks have their CRC32", "another one in some chunk")

    def stored_in(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return descriptors and offsets of samples' bytes, those of PNGs left out; see `Reader`."""
        descriptors = np.array([shard.descriptor for shard in self._shards])[self._numbers[samples]]
        return np.where(self.modes[samples] == JPEG, descriptors, -1), self._offsets[samples]

    def close(self) -> None:
        """Let go of the shards. Views already handed out stay valid; may be called twice."""
        self._closed = True
        for shard in self._shards:
            shard.close()

    def _shard(self, index: int) -> MappedFile:
        if self._closed:
            raise ValueError(f"{self.path}: this reader is closed")
        return self._shards[self._numbers[index]]

    def _pixels(self, index: int, png: np.ndarray) -> np.ndarray:
        height, width = int(self.heights[index]), int(self.widths[index])
        expected = f"a PNG of {width} x {height} pixels"
        try:
            with Image.open(io.BytesIO(png.data), formats=("PNG",)) as image:
                pixels = np.asarray(image)
        except Exception as error:  # on damaged files Pillow's plugins raise nearly anything
            raise damaged(self, index, expected, str(error) or type(error).__name__) from None
        if pixels.shape != (height, width, 3):
            raise damaged(self, index, expected, f"an array of shape {pixels.shape}")
        return pixels.reshape(-1)

    def _parse(self, index: bytes) -> np.ndarray:
        size = len(index) - len(MAGIC)
        if not index.startswith(MAGIC) or size <= 0 or size % ROW.itemsize:
            raise self._corrupt_index(
                f"{MAGIC!r} and rows of {ROW.itemsize} bytes", f"{index[:16]!r} and {size:,} bytes"
            )
        return np.frombuffer(index, ROW, offset=len(MAGIC))

    def _check_rows(self) -> None:
        """Check that the samples lie one after the other as the writer lays them, and are what it stores."""
        rows = self.physical_rows
        shards = rows["shard"].astype(np.int64)
        steps = np.diff(shards, prepend=-1)
        before = np.where(steps == 1, 0, np.roll(ends(rows), 1))
        laid = ((steps == 0) | (steps == 1)) & (shards >= 0) & (rows["offset"] == before + FRAME) & (rows["size"] > 0)
        laid[0] &= steps[0] == 1
        known = np.isin(rows["mode"], list(EXTENSIONS)) & (rows["height"] > 0) & (rows["width"] > 0)
        if not (laid & known).all():
            raise self._corrupt_index(
                "samples one after the other", f"another place for sample {np.argmin(laid & known)}"
            )

    def _load_columns(self) -> None:
        """Keep the index as contiguous columns."""
        rows, self.num_samples = self.rows, len(self.rows)
        self.labels, self.modes = rows["label"].astype(np.int64), np.ascontiguousarray(rows["mode"])
        self.heights, self.widths = rows["height"].astype(np.int32), rows["width"].astype(np.int32)
        self.crcs = rows["crc32"].astype(np.uint32)
        self._numbers = rows["shard"].astype(np.int64)
        self._offsets, self._stored = rows["offset"].astype(np.int64), rows["size"].astype(np.int64)
        self.sizes = np.where(self.modes == JPEG, self._stored, self.heights.astype(np.int64) * self.widths * 3)

    def _corrupt_index(self, expected: str, found: str) -> DeitfastError:
        return DeitfastError(f"{self.path / INDEX}: not a whole index", expected=expected, found=found, remedy=REMEDY)

    def _open_shards(self) -> list[MappedFile]:
        """Return each shard.

        Raises:
            DeitfastError: at least one is not what the index describes; the first is described, the others are named.
        """
        shards, failures = [], []
        for number in range(len(self.firsts)):
            try:
                shards.append(self._open_shard(number))
            except DeitfastError as failure:
                failures.append((shard_file(self.path, number).name, failure))
        if not failures:
            return shards
        first, others = failures[0][1], [name for name, _ in failures[1:]]
        also = f"{len(others)} more wrong: {', '.join(others[:5])}" + (", ..." if len(others) > 5 else "")
        found = "; ".join([first.found] * bool(first.found) + [also] * bool(others))
        raise DeitfastError(first.problem, expected=first.expected, found=found, remedy=first.remedy)

    def _open_shard(self, number: int) -> MappedFile:
        path, size, sample = shard_file(self.path, number), int(self.shard_sizes[number]), int(self.firsts[number])
        row, file = self.physical_rows[sample], MappedFile(path)
        content = file.bytes
        begins = frame(sample, int(row["label"]), int(row["mode"]), int(row["size"]))
        found = content[:FRAME].tobytes()
        if len(content) != size or found != begins:
            raise DeitfastError(
                f"{path}: not the shard that {INDEX} describes",
                expected=f"{size:,} bytes, {_describe(begins)}",
                found=f"{len(content):,} bytes, {_describe(found)}",
                remedy=REMEDY,
            )
        return file


def shard_damages(reader: ShardReader) -> list[str]:
    """Return what is wrong with the files beside the samples: the ends of shards, DALI's indices, files too many."""
    damages = []
    parts = np.split(reader.physical_rows, reader.firsts[1:])
    for number, (first, rows) in enumerate(zip(reader.firsts.tolist(), parts, strict=True)):
        shard = shard_file(reader.path, number)
        if MappedFile(shard).bytes[-len(TRAILER) :].any():
            damages.append(f"{shard.name}: does not end as a tar file does")
        try:
            same = _read(dali_file(shard)) == dali_index(rows, first)
        except DeitfastError as failure:
            damages.append(failure.problem)
        else:
            damages += [] if same else [f"{dali_file(shard).name}: not DALI's index of {shard.name}"]
    known = {shard_file(reader.path, number) for number in range(len(reader.firsts))}
    extra = sorted(path.name for path in reader.path.glob("*.tar") if path not in known)
    return damages + [f"{name}: a shard that {INDEX} does not know" for name in extra]


def _describe(start: bytes) -> str:
    """Return what the first FRAME bytes of a shard say, human-readable."""
    try:
        digits, image = (tarfile.TarInfo.frombuf(start[at : at + BLOCK], "ascii", "replace") for at in (0, 2 * BLOCK))
    except tarfile.HeaderError:
        return f"beginning with {start[:16]!r}"
    label = start[BLOCK : 2 * BLOCK].rstrip(b"\0")[:20]
    return f"beginning with {digits.name} ({label!r}) and {image.name} ({image.size:,} bytes)"


def _is_whole_png(data: bytes) -> bool:
    """Say whether every chunk has its CRC32 and the last one ends the file. Pillow skips the checksums of pixels."""
    at, kind = 8, b""
    while kind != b"IEND" and at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        at = end
    return kind == b"IEND" and at == len(data) and data.startswith(b"\x89PNG\r\n\x1a\n")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DeitfastError(f"{path}: no such file", remedy=REMEDY) from None
    except OSError as error:
        raise DeitfastError(f"{path}: cannot be read: {error.strerror}") from error
