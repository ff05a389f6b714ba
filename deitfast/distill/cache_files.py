"""The data of a teacher cache: the parts that it is filled with, and the finished table.

Everything is checked where it is read: a damaged or edited file is a DeitfastError that names it.
"""

import re
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from deitfast.distill.cache_manifest import ABSENT, Manifest, damaged, explain_read_error
from pipelines.files import atomic_write

TARGETS, PARTS = "targets.npy", "parts"
PART_NAME = re.compile(r"(\d{5})-[0-9a-f]{32}\.part")
"""A part's file name: the first view of its pass, and a number of its own."""


def is_present(targets: np.ndarray) -> np.ndarray:
    """Return which targets, of dtype `TargetSpec.record`, are there: bool of their shape."""
    return _labels(targets, 0) != ABSENT


def table_header(manifest: Manifest) -> bytes:
    """Return the header of targets.npy: .npy format 1.0, `record` [views, samples], as numpy 2 pads it.

    It is written here and not by numpy, so that a file can be compared with it to the byte and nothing of it parsed.
    """
    shape, descr = (manifest.views, manifest.samples), npy.dtype_to_descr(manifest.targets.record)
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (21 - len(str(manifest.views)))
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def check_table(folder: Path, manifest: Manifest) -> None:
    """Check the header and the size of targets.npy. Raises DeitfastError."""
    path, header = folder / TARGETS, table_header(manifest)
    try:
        with explain_read_error(path), path.open("rb") as file:
            found, size = file.read(len(header)), path.stat().st_size
    except FileNotFoundError:
        raise damaged(path, "the targets of a complete cache", "no file") from None
    if found != header:
        raise damaged(path, f"a header of {manifest.views} x {manifest.samples} targets", "another one")
    if size != len(header) + manifest.bytes:
        raise damaged(path, f"{len(header) + manifest.bytes:,} bytes", f"{size:,}")


def read_table(folder: Path, manifest: Manifest, first: int) -> np.ndarray:
    """Return the pass that begins with view `first` out of targets.npy: `record` [repeats, samples].

    It is read, not mapped: a file that is cut while it is mapped kills the process.

    Raises:
        DeitfastError: what is read is not what was written; the message names file and view.
    """
    check_table(folder, manifest)
    path, shape = folder / TARGETS, (manifest.repeats, manifest.samples)
    row, start = manifest.bytes // manifest.views, len(table_header(manifest))
    with explain_read_error(path):
        rows = np.fromfile(path, manifest.targets.record, shape[0] * shape[1], offset=start + first * row)
    if rows.size != shape[0] * shape[1]:
        raise damaged(path, f"{manifest.repeats} views from view {first}", "it ends before")
    rows = rows.reshape(shape)
    for view, targets in enumerate(rows, first):
        expected, found = manifest.crc32[view], zlib.crc32(targets.data)
        if found != expected:
            raise damaged(path, f"CRC32 {expected:08x} of view {view}", f"{found:08x}")
    _check_labels(path, rows, manifest)
    return rows


def write_table(folder: Path, manifest: Manifest, passes: Iterator[np.ndarray]) -> tuple[int, ...]:
    """Write targets.npy, pass by pass, and return each view's CRC32."""
    crc32 = list[int]()
    with atomic_write(folder / TARGETS) as file:
        file.write(table_header(manifest))
        for rows in passes:
            crc32 += [zlib.crc32(row.data) for row in rows]
            file.write(rows.data)
    return tuple(crc32)


def first_views(folder: Path) -> set[int]:
    """Return the first views of those passes that have parts."""
    return {int(match[1]) for path in (folder / PARTS).glob("*.part") if (match := PART_NAME.fullmatch(path.name))}


def write_part(folder: Path, manifest: Manifest, first: int, entries: np.ndarray) -> None:
    """Write `TargetSpec.entry` [n], of views of the pass that begins with view `first`, as a new part.

    A part is the entries' bytes and, in 4 more, the CRC32 of their dtype and of them.
    """
    with atomic_write(folder / PARTS / f"{first:05d}-{uuid.uuid4().hex}.part") as file:
        content = entries.tobytes()
        file.write(content + _part_crc32(content, manifest).to_bytes(4, "little"))


def read_parts(folder: Path, manifest: Manifest, first: int) -> np.ndarray:
    """Return what the parts have of the pass that begins with view `first`: `record` [repeats, samples].

    Raises:
        FileNotFoundError: a part was removed meanwhile.
        DeitfastError: a part is damaged, or belongs to another cache.
    """
    with explain_read_error(folder / PARTS):
        rows = np.zeros((manifest.repeats, manifest.samples), manifest.targets.record)
        _labels(rows)[:] = ABSENT
        for path in sorted((folder / PARTS).glob(f"{first:05d}-*.part")):
            if PART_NAME.fullmatch(path.name):
                entries = _read_part(path, manifest, first)
                rows[entries["view"] - first, entries["sample"]] = entries["target"]
    return rows


def _read_part(path: Path, manifest: Manifest, first: int) -> np.ndarray:
    """Return a part's `TargetSpec.entry` [n]; raises as `read_parts`."""
    with explain_read_error(path):
        content = path.read_bytes()
    content, stored = content[:-4], int.from_bytes(content[-4:], "little")
    remedy = "delete this file and run `deitfast teach` again: it fills what is missing"
    entry = manifest.targets.entry
    if len(content) % entry.itemsize or stored != _part_crc32(content, manifest):
        raise damaged(path, f"CRC32 {stored:08x}", f"{_part_crc32(content, manifest):08x}", remedy)
    entries = np.frombuffer(content, entry)
    views, last = entries["view"], first + manifest.repeats - 1
    if ((views < first) | (views > last)).any() or (entries["sample"] >= manifest.samples).any():
        expected = f"targets of views {first} to {last} of {manifest.samples} images"
        raise damaged(path, expected, "those of other views or images", remedy)
    _check_labels(path, entries["target"], manifest)
    return entries


def _part_crc32(content: bytes, manifest: Manifest) -> int:
    return zlib.crc32(content, zlib.crc32(repr(manifest.targets.entry.descr).encode()))


def _labels(targets: np.ndarray, k: int | None = None) -> np.ndarray:
    """Return the labels of targets of dtype `record`, as a view; of soft ones all k or the one of index `k`."""
    if targets.dtype.names is None:
        return targets
    return targets["label"] if k is None else targets["label"][..., k]


def _check_labels(path: Path, targets: np.ndarray, manifest: Manifest) -> None:
    labels = _labels(targets)
    if ((labels >= manifest.classes) & (labels != ABSENT)).any():
        raise damaged(path, f"labels below {manifest.classes}", f"{labels[labels != ABSENT].max()}")
