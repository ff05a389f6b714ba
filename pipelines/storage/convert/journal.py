"""Remembers how far a conversion got, so that it goes on after being killed at any moment."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from pipelines.files import write_all
from pipelines.storage.formats.beton_writer import RECORD

BLOCK = struct.Struct("<4sIII")  # magic, records, bytes of the reasons' JSON, CRC32 of both
MAGIC = b"blk1"


class Journal:
    """A file of blocks, each sealed by its CRC32: records of entries dealt with, in the source's order.

    A block is appended only after the data it speaks of is on the disk. The first torn block and all after it are
    dropped on opening, as are blocks that speak of data which the disk lost.

    Args:
        path: the journal's file; started over unless it carries `key`.
        key: names the conversion: its source's listing, its options, the versions of its codecs.
        data_size: size of the data file; None accepts every block (the data file is finished).
    """

    def __init__(self, path: Path, key: str, data_size: int | None) -> None:
        self.path = path
        self.records = np.zeros(0, dtype=RECORD)
        """RECORD [n]: what was on disk at opening."""
        self.reasons: dict[int, str] = {}
        """Why entries were skipped, by number of the entry."""
        self._head = json.dumps({"conversion": key}).encode() + b"\n"
        self._pending: list[tuple] = []
        self._pending_reasons: dict[int, str] = {}
        self._blocks: list[np.ndarray] = []
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._load(data_size)

    def add(self, record: tuple, number: int, reason: str) -> None:
        """Note one entry (a RECORD as a tuple; `reason` if it was skipped). Not on disk before `flush`."""
        self._pending.append(record)
        if reason:
            self._pending_reasons[number] = reason

    def flush(self) -> None:
        """Append what was noted as one block and have it on the disk. The data must be there already."""
        if not self._pending:
            return
        records = np.array(self._pending, dtype=RECORD)
        reasons = json.dumps(self._pending_reasons).encode()
        body = records.tobytes() + reasons
        block = BLOCK.pack(MAGIC, len(records), len(reasons), zlib.crc32(body)) + body
        write_all(self._fd, block)
        os.fsync(self._fd)
        self._blocks.append(records)
        self.reasons |= self._pending_reasons
        self._pending, self._pending_reasons = [], {}

    def all_records(self) -> np.ndarray:
        """Return RECORD [n] of everything flushed, of this run and those before."""
        return np.concatenate([self.records, *self._blocks])

    def close(self) -> None:
        """Close the file; what was not flushed is forgotten. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _load(self, data_size: int | None) -> None:
        content = self.path.read_bytes()
        if not content.startswith(self._head):
            os.ftruncate(self._fd, 0)
            write_all(self._fd, self._head)
            return
        blocks, position = [self.records], len(self._head)
        while (read := _read_block(content, position)) is not None:
            records, reasons, end = read
            stored = records[records["stored"]]
            if data_size is not None and len(stored) and int(stored["offset"][-1] + stored["size"][-1]) > data_size:
                break
            blocks.append(records)
            self.reasons |= reasons
            position = end
        self.records = np.concatenate(blocks)
        os.ftruncate(self._fd, position)
        os.lseek(self._fd, position, os.SEEK_SET)


def _read_block(content: bytes, position: int) -> tuple[np.ndarray, dict[int, str], int] | None:
    """Return the block at `position` and where it ends, or None for a torn one or none."""
    if len(content) < position + BLOCK.size:
        return None
    magic, count, length, crc = BLOCK.unpack_from(content, position)
    start = position + BLOCK.size
    middle, end = start + count * RECORD.itemsize, start + count * RECORD.itemsize + length
    if magic != MAGIC or len(content) < end or zlib.crc32(memoryview(content)[start:end]) != crc:
        return None
    reasons = {int(number): reason for number, reason in json.loads(content[middle:end]).items()}
    return np.frombuffer(content, dtype=RECORD, count=count, offset=start), reasons, end
