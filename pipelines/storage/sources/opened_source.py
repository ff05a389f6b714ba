"""A source that has been opened: every image carries a locator that reads itself, in any process."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from pipelines.errors import UserError
from pipelines.files import explain_os_error
from pipelines.storage.entry import Entry, Source

Progress = Callable[[str, int, int], None]
"""Told now and then: what is being done, how much is done, of how much (0: unknown)."""
PREFIX = "unpacked-"
LOCK = "in-use.lock"
_locks: dict[str, int] = {}
"""Lock files held open by this process, by private folder: after a kill the folder is known to be nobody's."""


class Locator(Protocol):
    """Where one image comes from. Picklable and without open files, so that worker processes can share it."""

    def read(self) -> bytes | np.ndarray:
        """Return an encoded file, or raw pixels as uint8 [H, W, 3]. Raises OSError if that is impossible."""
        ...


@dataclass(frozen=True)
class OpenedSource(Source):
    """A source whose entries' `where` are locators. Close it when the last image has been read."""

    notes: tuple[str, ...] = ()
    """What the user should know: parts that are missing or left out."""
    unpacked: str = ""
    """Private folder of files unpacked from compressed archives; empty: none were."""

    def read(self, entry: Entry) -> bytes | np.ndarray:
        """Return the encoded file's bytes, or raw pixels as uint8 [H, W, 3]. Raises OSError if it cannot be read."""
        return entry.where.read()

    def close(self) -> None:
        """Delete what was unpacked. May be called twice; to be called by the process that opened the source."""
        discard(self.unpacked)


@dataclass
class Workspace:
    """What opening a source may use besides the source itself: room on disk, and an ear for progress."""

    scratch: Path | None = None
    """Folder to unpack in; None: the system's temporary folder."""
    progress: Progress = lambda what, done, total: None
    """Called every few thousand files or few megabytes."""
    notes: list[str] = field(default_factory=list)
    """Becomes the source's notes."""
    unpacked: str = ""
    """The private folder, once something was unpacked."""

    def new_file(self, name: str) -> Path:
        """Return a path for a new file in this source's private folder, which appears with its first file."""
        if not self.unpacked:
            with explain_os_error(self.scratch or tempfile.gettempdir()):
                if self.scratch is not None:
                    self.scratch.mkdir(parents=True, exist_ok=True)
                    _clear_leftovers(self.scratch)
                self.unpacked = tempfile.mkdtemp(prefix=PREFIX, dir=self.scratch)
                _locks[self.unpacked] = _lock(Path(self.unpacked), os.O_CREAT)
        return Path(self.unpacked) / name

    def close(self) -> None:
        """Delete what was unpacked: for openings that fail."""
        discard(self.unpacked)


def discard(unpacked: str) -> None:
    """Delete a private folder that this process has made; anything else is left alone."""
    if unpacked in _locks:
        shutil.rmtree(unpacked, ignore_errors=True)
        os.close(_locks.pop(unpacked))


def _lock(folder: Path, flags: int = 0) -> int:
    """Return the open lock file of a private folder. Raises OSError where a living process holds it."""
    file = os.open(folder / LOCK, os.O_RDWR | flags)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if not flags:
            os.close(file)
            raise  # of one's own new folder, it only means that this file system has no locks
    return file


def _clear_leftovers(scratch: Path) -> None:
    """Delete private folders whose process was killed: nobody holds their locks any more."""
    for folder in scratch.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):
            lock = _lock(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def refuse_fraction(where: str, val_fraction: float, folder: str) -> None:
    """Raise a UserError where a validation fraction is asked for although there is a validation split."""
    if val_fraction:
        raise UserError(
            f"{where} has a validation split already",
            expected="a validation fraction only where there is none",
            found=f"{folder} and a fraction of {val_fraction:g}",
            remedy="leave the fraction out",
        )
