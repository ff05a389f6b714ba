"""A teacher's targets by (view, sample): computed once, then read instead of running the teacher.

A view is a function of (seed, sample, view number), and so is what a teacher in evaluation mode says of it. A cache is
a folder:

    manifest.json   what the targets are and everything that they depend on; once complete, a CRC32 of each view
    parts/          while it is filled: targets with their (view, sample), each part a file of its own with its CRC32
    targets.npy     once complete: [views, samples] of 2 bytes each (hard), or of top-k records (soft)

Any number of processes may fill one cache, and be killed, at any moment. Parts appear completely or not at all and
under names of their own. Once every target is there, one process at a time (by a lock) makes the parts into
`targets.npy`, then publishes the manifest that says so, and then removes the parts. The result depends on the targets
alone: not on which process wrote them, in which order, or how often it was interrupted.
"""

import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from deitfast.distill.cache_files import (
    PARTS,
    check_table,
    first_views,
    is_present,
    read_parts,
    read_table,
    write_part,
    write_table,
)
from deitfast.distill.cache_manifest import (
    MANIFEST,
    MOST_VIEWS,
    Manifest,
    TargetSpec,
    damaged,
    explain_write_error,
    is_cache,
    read_manifest,
    write_manifest,
)
from deitfast.runtime import Runtime
from pipelines.errors import DeitfastError, UserError
from pipelines.files import LOCK, PARTIAL, file_lock


class TeacherCache:
    """An open cache; `complete` and `manifest` follow what other processes do with it when something is read."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Wrap what `open` has checked."""
        self.folder, self.manifest = folder, manifest

    @classmethod
    def create(cls, folder: Path, manifest: Manifest) -> "TeacherCache":
        """Start an empty cache, or open the one that another process has just started.

        Raises:
            UserError: there is something else in the folder, or the numbers do not fit the format.
            DeitfastError: the disk is full or not writable.
        """
        if manifest.views > MOST_VIEWS or manifest.views % manifest.repeats:
            expected = f"a multiple of {manifest.repeats} (augment.repeats), at most {MOST_VIEWS:,}"
            raise UserError(f"a cache of {manifest.views} views of an image", expected=expected)
        with explain_write_error(folder), file_lock(folder, "process", wait=True):
            if not is_cache(folder):
                if any(file.name not in (PARTS, LOCK) and file.suffix != PARTIAL for file in folder.iterdir()):
                    remedy = "give the name of a new folder"
                    raise UserError(f"{folder} is not empty and not a teacher cache", remedy=remedy)
                (folder / PARTS).mkdir(exist_ok=True)
                write_manifest(folder, manifest)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> "TeacherCache":
        """Open a cache, complete or not.

        Raises:
            UserError: there is none, or one of another version.
            DeitfastError: its manifest or the shape of its targets is damaged.
        """
        cache = cls(folder, read_manifest(folder))
        if cache.complete:
            check_table(folder, cache.manifest)
        elif not (folder / PARTS).is_dir() and not cache.refresh():
            raise damaged(folder / PARTS, "the parts of a cache that is not complete", "no folder")
        return cache

    @property
    def complete(self) -> bool:
        """Whether every target was there, in targets.npy, when the manifest was last read."""
        return bool(self.manifest.crc32)

    @property
    def spec(self) -> TargetSpec:
        """What is stored of a target."""
        return self.manifest.targets

    @property
    def repeats(self) -> int:
        """Views of a pass."""
        return self.manifest.repeats

    def refresh(self) -> bool:
        """Read the manifest again if it says not complete: another process may have finished. Return `complete`."""
        if not self.complete:
            self.manifest = read_manifest(self.folder)
        return self.complete

    def read_pass(self, first: int) -> np.ndarray:
        """Return the targets of the pass that begins with view `first`: `record` [repeats, samples], in memory.

        Raises:
            DeitfastError: what is read is not what was written; the message names the file.
        """
        rows = None
        if not self.complete:
            with suppress(FileNotFoundError):  # a process that finishes the cache removes the parts
                rows = read_parts(self.folder, self.manifest, first)
        if self.refresh():
            return read_table(self.folder, self.manifest, first)
        if rows is None:
            raise damaged(self.folder / PARTS, "the parts that were there a moment ago", "one less")
        return rows

    def write(self, views: np.ndarray, samples: np.ndarray, targets: np.ndarray) -> None:
        """Write targets as one part for each pass; nothing, if another process has finished the cache.

        Args:
            views: int [n].
            samples: int [n].
            targets: `record` [n].

        Raises:
            DeitfastError: the disk is full or not writable.
        """
        entries = np.zeros(len(views), self.spec.entry)
        entries["view"], entries["sample"], entries["target"] = views, samples, targets
        passes = entries["view"] // self.repeats
        with explain_write_error(self.folder):
            try:
                for number in np.unique(passes):
                    write_part(self.folder, self.manifest, int(number) * self.repeats, entries[passes == number])
            except FileNotFoundError:
                if not self.refresh():
                    raise

    def finish(self) -> bool:
        """Make the parts into targets.npy if every target is there; return whether the cache is complete.

        Raises:
            DeitfastError: a part is damaged, or the disk is full.
        """
        with explain_write_error(self.folder), file_lock(self.folder, "process", wait=True):
            if not self.refresh():
                if self.count() < self.manifest.total:
                    return False
                passes = (read_parts(self.folder, self.manifest, first) for first in self.passes)
                write_manifest(
                    self.folder, replace(self.manifest, crc32=write_table(self.folder, self.manifest, passes))
                )
                self.refresh()
            shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        return True

    def remove_leftovers(self) -> None:
        """Remove the parts of a complete cache, left by a process that was killed; not where nothing can be written."""
        if self.complete and (self.folder / PARTS).exists():
            with suppress(DeitfastError):
                self.finish()

    @property
    def passes(self) -> range:
        """The first view of every pass."""
        return range(0, self.manifest.views, self.repeats)

    def count(self) -> int:
        """Return how many targets are there."""
        if self.refresh():
            return self.manifest.total
        there = sum(int(is_present(self.read_pass(first)).sum()) for first in sorted(first_views(self.folder)))
        return self.manifest.total if self.refresh() else there

    def check(self) -> Iterator[tuple[int, str]]:
        """Read everything; yield (views read, "" or what is damaged) after each pass.

        A manifest whose checksum is right may still have been edited: while there is no table, whose CRC32s it holds,
        it is compared with the parts.
        """
        for first in self.passes:
            problem = ""
            try:
                self._require_possible(first, self.read_pass(first))
            except DeitfastError as error:
                problem = str(error)
            yield first + self.repeats, problem

    def _require_possible(self, first: int, rows: np.ndarray) -> None:
        """Raise a DeitfastError where a pass has more targets than the manifest says, or there are parts of no pass."""
        path, most = self.folder / MANIFEST, self.manifest.targets_per_view
        for view, count in enumerate(is_present(rows).sum(1).tolist(), first):
            if count > most:
                raise damaged(path, f"at least {count:,} targets a view, as view {view} has them", f"{most:,}")
        strays = first_views(self.folder) - set(self.passes)
        if strays and first == self.passes[0]:
            views, repeats = self.manifest.views, self.repeats
            found = f"{views} views in passes of {repeats}"
            raise damaged(path, f"a pass that begins with view {max(strays)}, of which there are parts", found)

    def require_intact(self) -> None:
        """Read everything, to meet damage now and not in the epoch that needs it (a second or two for .77 GB).

        Raises:
            DeitfastError: as `read_pass`.
        """
        for first in self.passes:
            self.read_pass(first)


def is_shared(folder: Path, runtime: Runtime) -> bool:
    """Return whether all ranks see the same place for a cache that need not be there; every rank must call it."""
    if not runtime.several_machines:
        return True
    seen = runtime.broadcast_from_rank0(folder.parent / f"{uuid.uuid4().hex}{PARTIAL}")
    if runtime.is_main_process:
        seen.parent.mkdir(parents=True, exist_ok=True)
        seen.touch()
    try:
        runtime.barrier()
        return not any(runtime.max_over_ranks([not seen.exists()]))
    finally:
        if runtime.is_main_process:
            seen.unlink(missing_ok=True)
            with suppress(OSError):  # there are caches in it
                seen.parent.rmdir()


def require_shared(folder: Path, runtime: Runtime) -> None:
    """Check that all ranks see the cache in `folder`: the same folder, or copies of a complete cache.

    Raises:
        UserError: they do not. A cache that is not complete is filled by all ranks together, in one place.
    """
    if runtime.world == 1:
        return
    host, crc32, name = runtime.broadcast_from_rank0(
        (socket.gethostname(), read_manifest(folder).crc32, f"{uuid.uuid4().hex}{PARTIAL}")
        if runtime.is_main_process
        else ("", (), "")
    )
    seen = folder / PARTS / name  # written by rank 0 while the cache is not complete
    try:
        if runtime.is_main_process and not crc32:
            seen.touch()
        runtime.barrier()
        there = is_cache(folder)
        if not (there and (read_manifest(folder).crc32 == crc32 if crc32 else seen.exists())):
            raise UserError(
                f"rank {runtime.rank} on {socket.gethostname()} does not see the teacher cache of rank 0 on {host}",
                expected=f"{folder} on a file system that all machines share, or a copy of a complete cache on each",
                found="a folder of its own" if there else "no cache",
                remedy="fill it on one machine (deitfast teach) and copy it to the same path on all, "
                "or run the teacher in the loop: --cache none",
            )
        runtime.barrier()
    finally:
        if runtime.is_main_process:
            seen.unlink(missing_ok=True)


class MemoryCache:
    """A complete cache in memory, the same rows for every pass: to measure what reading targets costs a step."""

    complete = True

    def __init__(self, spec: TargetSpec, repeats: int, samples: int) -> None:
        """Make every target class 0."""
        self.spec, self.repeats = spec, repeats
        self._rows = np.zeros((repeats, samples), spec.record)

    def read_pass(self, first: int) -> np.ndarray:
        """See `TeacherCache`."""
        return self._rows

    def write(self, views: np.ndarray, samples: np.ndarray, targets: np.ndarray) -> None:
        """Store nothing: no target is missing."""
