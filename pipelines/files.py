"""Files that are there whole or not at all, whatever happens while they are written; folders with one writer."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import DeitfastError, UserError

log = logging.getLogger(__name__)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path`, on the disk, when the block ends; not if it ends in an error.

    Raises:
        OSError: the disk is full or not writable; `path` is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def writing(what: Path | str, remedy: str = "free some space, check the rights, or write elsewhere") -> Iterator[None]:
    """Turn a full or read-only disk into a DeitfastError that names what could not be written, and why."""
    try:
        yield
    except OSError as error:
        raise DeitfastError(f"cannot write {what}", found=str(error), remedy=remedy) from error


def sync_folder(folder: Path) -> None:
    """Have the folder's entries (after a rename) on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Make the folder and keep other processes of this kind out of it; the lock goes with the process.

    Args:
        folder: where it writes.
        what: what it is, for whoever comes second ("conversion").

    Raises:
        UserError: another one is writing there, or it can be no folder.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone(folder, wait=False))
        except BlockingIOError:
            raise UserError(f"{folder}: another {what} is writing here", remedy="wait for it, or stop it") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be the output folder: {error.strerror}") from None
        yield


@contextmanager
def alone(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Let one process at a time into the block, where the file system knows locks; a kill opens it again.

    Raises:
        BlockingIOError: another process is in there, and this one does not `wait`.
        OSError: there is no such folder.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:  # some network file systems have no locks
            log.debug("%s: not locked: %s", folder, error.strerror)
        yield
    finally:
        os.close(handle)
