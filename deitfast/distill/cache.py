"""A teacher's targets by (view, sample): filled once, then read instead of asking the teacher.

A view is a function of (seed, sample, view number), and so is what a teacher in evaluation mode says of it. A cache is
a folder:

    manifest.json   what the targets are and everything that they are a function of; once complete, a CRC32 a view
    parts/          while it fills: targets with their (view, sample), each part a file of its own with its CRC32
    targets.npy     once complete: [views, samples] of 2 bytes each (hard), or of top-k records (soft)

Parts appear whole or not at all (temporary name, fsync, rename) and under unique names, so any number of processes may
write, and be killed, at any moment: several trainings may fill one cache. Once every view is answered the parts become
`targets.npy`, and the manifest that says so is published last; a process that still holds answers of its own finds the
table and reads on from there. The result depends on the targets alone: not on who wrote them, in which order, or how
often they were interrupted.
"""

import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.lib import format as npy

from deitfast.distill.cache_files import (
    ABSENT,
    PARTS,
    TARGETS,
    Manifest,
    damaged,
    is_cache,
    is_present,
    open_table,
    parts,
    publish,
    read_manifest,
    read_part,
    write_part,
    writing_cache,
)
from pipelines.errors import DeitfastError, UserError
from pipelines.files import LOCK, PARTIAL, atomic_write, file_lock

Found = TypeVar("Found")


class TeacherCache:
    """An open cache: read by rows of views, written through `add` and `flush`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._added: list[np.ndarray] = []
        self._table = open_table(folder, manifest) if manifest.crc32 else None

    @classmethod
    def create(cls, folder: Path, manifest: Manifest) -> "TeacherCache":
        """Start an empty cache, or open the one that another process has just started.

        Raises:
            UserError: there is something else in the folder, or the numbers do not fit the format.
            DeitfastError: the disk is full or not writable.
        """
        if manifest.views >= 2**16 or manifest.views % manifest.repeats:
            expected = f"a multiple of {manifest.repeats} (augment.repeats), at most {2**16 - 1}"
            raise UserError(f"a cache of {manifest.views} views of an image", expected=expected)
        with writing_cache(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with file_lock(folder, "process", wait=True):
                if not is_cache(folder):
                    if any(file.name not in (PARTS, LOCK) and file.suffix != PARTIAL for file in folder.iterdir()):
                        remedy = "give the name of a new folder"
                        raise UserError(f"{folder} is not empty and no teacher cache", remedy=remedy)
                    (folder / PARTS).mkdir(exist_ok=True)
                    publish(folder, manifest)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> "TeacherCache":
        """Open a cache, complete or not.

        Raises:
            UserError: there is none, or one of another version.
            DeitfastError: its manifest or the shape of its targets is damaged.
        """
        return cls(folder, read_manifest(folder))

    @property
    def complete(self) -> bool:
        """Whether every target is there, in targets.npy."""
        return self._table is not None

    def rows(self, first: int) -> np.ndarray:
        """Return the targets of the pass that begins with view `first`, [repeats, samples] of `record`, in memory.

        Raises:
            DeitfastError: what is read is not what was written; the message names the file.
        """
        found = self._unless_finished(lambda: self._filled(first)[0])
        if found is not None:
            return found
        assert self._table is not None
        rows = np.array(self._table[first : first + self.manifest.repeats])
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
        """Write what was added since the last time as one part a pass; nothing, if another process has finished.

        Raises:
            DeitfastError: the disk is full or not writable.
        """
        if self._added:
            entries = np.concatenate(self._added)
            passes = entries["view"] // self.manifest.repeats
            with writing_cache(self.folder):
                try:
                    for number in np.unique(passes):
                        write_part(self.folder, int(number) * self.manifest.repeats, entries[passes == number])
                except FileNotFoundError:  # the parts' folder is gone
                    self._require_finished()
        self._added.clear()

    def finish(self) -> bool:
        """Make the parts into targets.npy if every view is answered; return whether the cache is complete.

        One process does so at a time; the next one finds it done.

        Raises:
            DeitfastError: a part is damaged, or the disk is full.
        """
        with writing_cache(self.folder), file_lock(self.folder, "process", wait=True):
            if not self._finished_by_now():
                if not self._every_pass_has_parts():
                    return False
                try:
                    publish(self.folder, replace(self.manifest, crc32=self._write_table()))
                except _UnansweredError:
                    return False
                self._finished_by_now()
            shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        return True

    def count(self) -> int:
        """Return how many targets are there."""

        def counted() -> int:
            return sum(int(self._filled(first)[1].sum()) for first in {first for _, first in parts(self.folder)})

        there = self._unless_finished(counted)
        return self.manifest.views * self.manifest.targets_per_view if there is None else there

    def require_whole(self) -> None:
        """Read everything, to meet damage now and not in the epoch that needs it (a second or two for .77 GB).

        Raises:
            DeitfastError: as `rows`.
        """
        for first in range(0, self.manifest.views, self.manifest.repeats):
            self.rows(first)

    def check(self) -> Iterator[tuple[int, str]]:
        """Read everything; yield (views read, "" or what is damaged) after each pass."""
        for first in range(0, self.manifest.views, self.manifest.repeats):
            done, problem = first + self.manifest.repeats, ""
            try:
                self.rows(first)
            except DeitfastError as error:
                problem = str(error)
            yield done, problem

    def _write_table(self) -> tuple[int, ...]:
        """Write targets.npy out of the parts and return each view's CRC32."""
        manifest, crcs = self.manifest, list[int]()
        with atomic_write(self.folder / TARGETS) as file:
            shape = (manifest.views, manifest.samples)
            descr = npy.dtype_to_descr(manifest.targets.record)
            npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
            for first in range(0, manifest.views, manifest.repeats):
                rows, counts = self._filled(first)
                if (counts != manifest.targets_per_view).any():
                    raise _UnansweredError
                for row in rows:
                    crcs.append(zlib.crc32(row.tobytes()))
                    file.write(row.tobytes())
        return tuple(crcs)

    def _unless_finished(self, read: Callable[[], Found]) -> Found | None:
        """Return what `read` finds in the parts; None where the table has taken their place, before or meanwhile.

        Another process deletes the parts once the cache is complete, and not before: so that is asked after reading.
        """
        if self.complete:
            return None
        try:
            found = read()
        except FileNotFoundError:
            self._require_finished()
            return None
        return None if self._finished_by_now() else found

    def _finished_by_now(self) -> bool:
        """Open the finished table if there is one by now, whoever made it; return whether there is."""
        if not self.complete and (manifest := read_manifest(self.folder)).crc32:
            self.manifest, self._table = manifest, open_table(self.folder, manifest)
        return self.complete

    def _require_finished(self) -> None:
        """Open the finished table of another process, as parts are gone. Raises DeitfastError if there is none."""
        if not self._finished_by_now():
            raise damaged(self.folder / PARTS, "a folder of parts, or the finished table", "neither")

    def _filled(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a pass's targets [repeats, samples] out of the parts, and how many each view has, int64 [repeats]."""
        spec = self.manifest.targets
        rows = np.zeros((self.manifest.repeats, self.manifest.samples), spec.record)
        labels = rows if spec.kind == "hard" else rows["label"]
        labels[:] = ABSENT
        for path, view in parts(self.folder):
            if view == first:
                entries = read_part(path, self.manifest)
                rows[entries["view"] - first, entries["sample"]] = entries["target"]
        return rows, is_present(rows).sum(1)

    def _every_pass_has_parts(self) -> bool:
        return len({first for _, first in parts(self.folder)}) == self.manifest.views // self.manifest.repeats


class _UnansweredError(Exception):
    """A view is not complete yet."""
