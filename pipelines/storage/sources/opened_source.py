"""A source that has been opened: every image carries a locator that reads itself, in any process."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pipelines.errors import UserError
from pipelines.files import explain_os_error, file_lock
from pipelines.storage.entry import Entry, Source

ListingProgress = Callable[[str, int, int], None]
"""Called now and then with what is being done, how much is done, and of how much (0: unknown)."""
PREFIX = "unpacked-"
"""Names of private folders begin so."""
_locks: dict[str, ExitStack] = {}
"""Locks of this process by private folder: a folder that no process holds is left over from a killed one."""


class Locator(Protocol):
    """Where one image comes from. Picklable and without open files, so that worker processes can share it."""

    def read(self) -> bytes | np.ndarray:
        """Return an encoded file, or raw pixels as uint8 [H, W, 3].

        Raises:
            OSError: it cannot be read, which stops a conversion.
            BadImageError: there is no image, which a conversion may skip.
        """
        ...


@dataclass(frozen=True)
class OpenedSource(Source):
    """A source whose entries' `where` are locators. Close it when the last image has been read."""

    notes: tuple[str, ...] = ()
    """What the user should know: parts that are missing or left out."""
    unpacked: str = ""
    """Private folder of files unpacked from compressed archives; empty: none were."""

    def read(self, entry: Entry) -> bytes | np.ndarray:
        """Return the encoded file's bytes, or raw pixels as uint8 [H, W, 3]; raises as `Locator.read`."""
        return entry.where.read()

    def close(self) -> None:
        """Delete what was unpacked. May be called twice; to be called by the process that opened the source."""
        discard(self.unpacked)


@dataclass
class Workspace:
    """What opening a source may use besides the source itself: a folder to unpack in, and a callback for progress."""

    scratch: Path | None = None
    """Folder to unpack in, never part of the source itself; None: the system's temporary folder."""
    progress: ListingProgress = lambda what, done, total: None
    """Called every few thousand files or few megabytes."""
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
                _locks[self.unpacked] = lock = ExitStack()
                lock.enter_context(file_lock(Path(self.unpacked), "conversion"))
        return Path(self.unpacked) / name

    def close(self) -> None:
        """Delete what was unpacked: for openings that fail."""
        discard(self.unpacked)


def discard(unpacked: str) -> None:
    """Delete a private folder that this process has made; anything else is left alone."""
    if unpacked in _locks:
        shutil.rmtree(unpacked, ignore_errors=True)
        _locks.pop(unpacked).close()


def _clear_leftovers(scratch: Path) -> None:
    """Delete private folders whose process was killed: no process holds their locks any more."""
    for folder in scratch.glob(PREFIX + "*"):
        with suppress(UserError), file_lock(folder, "conversion"):
            shutil.rmtree(folder, ignore_errors=True)
