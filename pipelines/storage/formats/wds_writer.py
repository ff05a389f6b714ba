"""Writes a split as tar shards sample by sample, so that it can be continued after any interruption."""

import contextlib
import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.files import atomic_write, sync_folder, write_all
from pipelines.storage.formats.wds import (
    FRAME,
    INDEX,
    MAGIC,
    ROW,
    TRAILER,
    dali_file,
    dali_index,
    first_samples,
    frame,
    padded,
    physical_order,
    shard_file,
)
from pipelines.storage.reader import RAW
from pipelines.storage.transcode import EncodedImage


def with_png(sample: EncodedImage) -> EncodedImage:
    """Return a sample as shards hold it: raw pixels as a PNG, so that any program reads it; the CRC32 stays theirs."""
    if sample.mode != RAW:
        return sample
    buffer = io.BytesIO()
    Image.frombytes("RGB", (sample.width, sample.height), sample.data).save(buffer, "PNG")
    return replace(sample, data=buffer.getvalue())


class ShardWriter:
    """Appends samples to the last shard of an unfinished folder; DALI's indices and ours are written at the end.

    A shard is closed when the next sample would make it larger than `shard_size`, so where a sample goes depends only
    on the sizes of those before it. Offsets count through all shards, one after the other.

    Args:
        path: the unfinished folder; created if missing.
        shard_size: bytes of a shard, at most (but for a sample that alone is larger).
        done: RECORD [n] of what the shards already hold; everything after it is cut off.
    """

    def __init__(self, path: Path, shard_size: int, done: np.ndarray) -> None:
        self.path, self.shard_size = path, shard_size
        path.mkdir(exist_ok=True)
        stored = done[done["stored"]]
        self.end = 0
        """Bytes of all shards so far."""
        self._sample, self._shard, self._start = len(stored), 0, 0  # the next sample; its shard; where that begins
        if len(stored):
            starts, offset = _starts(path), int(stored["offset"][-1])
            self.end = padded(offset + int(stored["size"][-1]))
            self._shard = int(np.searchsorted(starts, offset, side="right")) - 1
            self._start = int(starts[self._shard])
        remove_shards(path, keep=self._shard + bool(len(stored)))
        self._fd = self._open()

    def append(self, sample: EncodedImage, label: int) -> int:
        """Write one sample and return its image's offset."""
        used, size = self.end - self._start, FRAME + padded(len(sample.data))
        if used and used + size + len(TRAILER) > self.shard_size:
            self._seal()
            self._start, self._shard = self.end, self._shard + 1
            self._fd = self._open()
        offset = self.end + FRAME
        before = frame(self._sample, label, sample.mode, len(sample.data))
        self._write((before + sample.data).ljust(size, b"\0"))
        self._sample += 1
        return offset

    def sync(self) -> None:
        """Have everything written so far on the disk before returning."""
        os.fsync(self._fd)

    def finish(self, records: np.ndarray) -> None:
        """Close the last shard and write the indices of RECORD [n], as written; the folder is then whole."""
        stored = records[records["stored"]]
        self._seal()
        starts = _starts(self.path)
        rows = np.zeros(len(stored), ROW)
        for name in ("size", "label", "height", "width", "mode", "crc32"):
            rows[name] = stored[name]
        offsets = stored["offset"].astype(np.int64)
        rows["shard"] = np.searchsorted(starts, offsets, side="right") - 1
        rows["offset"] = offsets - starts[rows["shard"]]
        logical = np.argsort(physical_order(len(records))[records["stored"]])
        firsts = first_samples(rows)
        for shard, part in enumerate(np.split(rows, firsts[1:])):
            with atomic_write(dali_file(shard_file(self.path, shard))) as file:
                file.write(dali_index(part, int(firsts[shard])))
        with atomic_write(self.path / INDEX) as file:
            file.write(MAGIC + rows[logical].tobytes())

    def close(self) -> None:
        """Close the shard as it is. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        """Open the current shard, cut to what is known of it, with the file's position at its end."""
        fd = os.open(shard_file(self.path, self._shard), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(fd, self.end - self._start)
        os.lseek(fd, 0, os.SEEK_END)
        sync_folder(self.path)
        return fd

    def _seal(self) -> None:
        """End the current shard, on the disk."""
        self._write(TRAILER)
        self.sync()
        self.close()

    def _write(self, data: bytes) -> None:
        write_all(self._fd, data)
        self.end += len(data)


def shards_end(path: Path) -> int:
    """Return the bytes of a folder's shards, up to the first one that is missing."""
    return sum(_sizes(path))


def remove_shards(path: Path, keep: int = 0) -> None:
    """Delete a folder's indices and its shards from number `keep` on, and nothing that is not of a shard writer."""
    for file in path.glob("*"):
        numbered = file.stem.isdigit() and file.suffix in (".tar", ".idx")
        kept = file.suffix == ".tar" and numbered and int(file.stem) < keep
        if (numbered and not kept) or file.name == INDEX:
            file.unlink()


def remove_folder(path: Path) -> None:
    """Delete a folder of shards, if there is one; files that no shard writer has made stay, and the folder then too."""
    remove_shards(path)
    with contextlib.suppress(OSError):
        path.rmdir()


def _sizes(path: Path) -> list[int]:
    sizes = []
    while (shard := shard_file(path, len(sizes))).exists():
        sizes.append(shard.stat().st_size)
    return sizes


def _starts(path: Path) -> np.ndarray:
    """Return where each shard begins when all are laid one after the other, int64 [shards]."""
    return np.cumsum([0, *_sizes(path)])[:-1]
