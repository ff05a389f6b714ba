"""A teacher's targets by (view, sample): filled once, then read instead of asking the teacher.

A view is a function of (seed, sample, view number), and so is what a teacher in evaluation mode says of it. A cache is
a folder:

    manifest.json   what the targets are and everything that they are a function of; once complete, a CRC32 a view
    parts/          while it fills: targets with their (view, sample), each part a file of its own with its CRC32
    targets.npy     once complete: [views, samples] of 2 bytes each (hard), or of top-k records (soft)

Parts appear whole or not at all (temporary name, fsync, rename), under names that never meet, so any number of
processes may write at any moment and be killed at any moment. When every view is answered the parts become
`targets.npy`, and the manifest that says so is published last. The result depends on the targets alone: not on who
wrote them, in which order, or how often they were interrupted.
"""

import shutil
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from pipelines.cache_files import (
    ABSENT,
    MANIFEST,
    PARTS,
    TARGETS,
    Manifest,
    damaged,
    open_table,
    parts,
    present,
    publish,
    read_manifest,
    read_part,
    write_part,
    writing,
)
from pipelines.errors import Failure, Mistake
from pipelines.files import whole_file


class TeacherCache:
    """An open cache: read by rows of views, written through `add` and `flush`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._added: list[np.ndarray] = []
        self._table = open_table(folder, manifest) if manifest.crc32 else None

    @classmethod
    def create(cls, folder: Path, manifest: Manifest) -> "TeacherCache":
        """Start an empty cache.

        Raises:
            Mistake: there is something else in the folder, or the numbers do not fit the format.
            Failure: the disk is full or not writable.
        """
        if folder.exists() and {file.name for file in folder.iterdir()} - {PARTS, f"{MANIFEST}.partial"}:
            raise Mistake(f"{folder} is not empty and no teacher cache", remedy="give the name of a new folder")
        if manifest.views >= 2**16 or manifest.views % manifest.repeats:
            expected = f"a multiple of {manifest.repeats} (augment.repeats), at most {2**16 - 1}"
            raise Mistake(f"a cache of {manifest.views} views of an image", expected=expected)
        with writing(folder):
            (folder / PARTS).mkdir(parents=True, exist_ok=True)
            publish(folder, manifest)
        return cls(folder, manifest)

    @classmethod
    def open(cls, folder: Path) -> "TeacherCache":
        """Open a cache, complete or not.

        Raises:
            Mistake: there is none, or one of another version.
            Failure: its manifest or the shape of its targets is damaged.
        """
        return cls(folder, read_manifest(folder))

    @property
    def complete(self) -> bool:
        """Whether every target is there, in targets.npy."""
        return self._table is not None

    def rows(self, first: int, count: int) -> np.ndarray:
        """Return the targets of `count` views from `first` on, [count, samples] of `record`, in memory.

        Raises:
            Failure: what is read is not what was written; the message names the file.
        """
        if self._table is None:
            return self._filled(first, count)[0]
        rows = np.array(self._table[first : first + count])
        for view, row in enumerate(rows, first):
            if zlib.crc32(row.tobytes()) != self.manifest.crc32[view]:
                raise damaged(self.folder / TARGETS, f"CRC32 {self.manifest.crc32[view]:08x} of view {view}", "another")
        return rows

    def add(self, views: np.ndarray, samples: np.ndarray, targets: np.ndarray) -> None:
        """Keep answers, all of views of one pass, for the next `flush`.

        Args:
            views: int [n].
            samples: int [n].
            targets: `record` [n].
        """
        entries = np.zeros(len(views), self.manifest.targets.entry)
        entries["view"], entries["sample"], entries["target"] = views, samples, targets
        self._added.append(entries)

    def flush(self) -> None:
        """Write what was added since the last time as one part a pass.

        Raises:
            Failure: the disk is full or not writable.
        """
        if not self._added:
            return
        entries = np.concatenate(self._added)
        passes = entries["view"] // self.manifest.repeats
        with writing(self.folder):
            for number in np.unique(passes):
                write_part(self.folder, int(number) * self.manifest.repeats, entries[passes == number])
        self._added.clear()

    def finish(self) -> bool:
        """Make the parts into targets.npy if every view is answered; return whether the cache is complete.

        One process may do so at a time; others keep adding, or read what is there.

        Raises:
            Failure: a part is damaged, or the disk is full.
        """
        if self.complete:
            shutil.rmtree(self.folder / PARTS, ignore_errors=True)  # left behind by a kill at the last moment
            return True
        if not self._every_pass_has_parts():
            return False
        manifest, path = self.manifest, self.folder / TARGETS
        crcs: list[int] = []
        with writing(self.folder):
            try:
                with whole_file(path) as file:
                    shape = (manifest.views, manifest.samples)
                    npy.write_array_header_1_0(file, _header(shape, manifest.targets.record))
                    for first in range(0, manifest.views, manifest.repeats):
                        rows, counts = self._filled(first, manifest.repeats)
                        if (counts != manifest.answered).any():
                            raise _UnansweredError
                        for row in rows:
                            crcs.append(zlib.crc32(row.tobytes()))
                            file.write(row.tobytes())
            except _UnansweredError:
                return False
            self.manifest = replace(manifest, crc32=tuple(crcs))
            publish(self.folder, self.manifest)
            shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        self._table = open_table(self.folder, self.manifest)
        return True

    def answers(self) -> int:
        """Return how many targets are there."""
        if self.complete:
            return self.manifest.views * self.manifest.answered
        firsts = range(0, self.manifest.views, self.manifest.repeats)
        there = {first for _, first in parts(self.folder)}
        return sum(int(self._filled(first, self.manifest.repeats)[1].sum()) for first in firsts if first in there)

    def require_whole(self) -> None:
        """Read everything: damage is better met now than in the epoch that needs it (a second or two for .77 GB).

        Raises:
            Failure: as `rows`.
        """
        for first in range(0, self.manifest.views, self.manifest.repeats):
            self.rows(first, self.manifest.repeats)

    def check(self) -> Iterator[tuple[int, str]]:
        """Read everything; yield (views read, "" or what is damaged) after each pass."""
        for first in range(0, self.manifest.views, self.manifest.repeats):
            done, problem = first + self.manifest.repeats, ""
            try:
                self.rows(first, self.manifest.repeats)
            except Failure as error:
                problem = str(error)
            yield done, problem

    def _filled(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a pass's targets [count, samples] out of the parts, and how many each view has, int64 [count]."""
        spec = self.manifest.targets
        rows = np.zeros((count, self.manifest.samples), spec.record)
        labels = rows if spec.kind == "hard" else rows["label"]
        labels[:] = ABSENT
        for path, view in parts(self.folder):
            if view == first - first % self.manifest.repeats:
                entries = read_part(path, self.manifest)
                own = (entries["view"] >= first) & (entries["view"] < first + count)
                rows[entries["view"][own] - first, entries["sample"][own]] = entries["target"][own]
        return rows, present(rows).sum(1)

    def _every_pass_has_parts(self) -> bool:
        return len({first for _, first in parts(self.folder)}) == -(-self.manifest.views // self.manifest.repeats)


class _UnansweredError(Exception):
    """A view is not complete yet."""


def _header(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    return {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
