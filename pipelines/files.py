"""Files written atomically, folders with one writer at a time, and disk errors that name the file."""

import errno
import fcntl
import glob
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import DeitfastError, UserError

PARTIAL = ".partial"
"""Ending of files that are still being written."""
LOCK = ".lock"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path`, on the disk, when the block ends; not if it ends in an error.

    Each writer has a temporary file of its own, so of several at once the last one to finish wins and no reader ever
    sees a mixture. Temporary files of killed writers are removed here.

    Raises:
        OSError: the disk is full or not writable; `path` is as it was.
    """
    _remove_abandoned(path)
    with _open_partial(path) as file:
        partial = Path(file.name)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_all(fd: int, data: bytes, offset: int | None = None) -> None:
    """Write all of `data` to a descriptor, at `offset` or (None) at its position. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.write(fd, view) if offset is None else os.pwrite(fd, view, offset)
        view, offset = view[written:], None if offset is None else offset + written


@contextmanager
def explain_os_error(
    what: Path | str, remedy: str = "free some space, check the rights, or write elsewhere"
) -> Iterator[None]:
    """Turn a full or read-only disk into a DeitfastError that names what could not be written, and why."""
    try:
        yield
    except OSError as error:
        raise DeitfastError(f"cannot write {what}", found=str(error), remedy=os_remedy(error, remedy)) from error


def os_remedy(error: OSError, otherwise: str = "") -> str:
    """Return what to do about the system's refusal; `otherwise` where its number does not tell better."""
    if error.errno in TOO_MANY_FILES:
        return "let a process open more files (`ulimit -n`)"
    if error.errno == errno.ENOMEM:
        return "free some memory"
    if error.errno == errno.ENOENT:
        return "the file or its folder was moved or removed: put it back"
    if error.errno in DISK_FULL:
        return otherwise or "free some space"
    return otherwise or ("check the rights" if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else "")


def write_text(path: Path, text: str) -> None:
    r"""Write a text file atomically, what is no text in a file's name as \udcff; see `write_bytes`."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, making its folder where it is missing.

    Raises:
        DeitfastError: the disk is full or not writable.
    """
    with explain_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content)


def sync_folder(folder: Path) -> None:
    """Have the folder's entries (after a rename) on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def file_lock(folder: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Make `folder` and let one process at a time into the block; the lock ends with the process, however that ends.

    Args:
        folder: where the process writes.
        what: what the process is ("conversion"), for the message that another one gets.
        wait: wait for the other process instead of raising.

    Raises:
        UserError: another process holds the lock (its number and host are named), or this can be no output folder.
        DeitfastError: the disk is full.
    """
    from filelock import FileLock, Timeout  # 70 ms, which no worker process needs

    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holder = _holder(path)
        lock = FileLock(path)
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        found = f"it is {_holder(path) or holder or 'a process that does not say which'}"
        raise UserError(
            f"{folder}: another {what} is writing here", found=found, remedy="wait for it, or stop it"
        ) from None
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DeitfastError(f"{folder}: no room to write: {error.strerror}", remedy="free some space") from None
        raise UserError(f"{folder}: cannot be the output folder: {error.strerror}") from None
    try:
        with suppress(OSError):  # a full disk; the lock holds all the same
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is gone and makes another
        lock.release()


def _holder(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()[:200]
    except OSError:
        return ""


def _open_partial(path: Path) -> BinaryIO:
    """Return a new file next to `path`, locked for as long as it is open."""
    while True:
        file = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}").open("xb")
        with suppress(OSError):  # some network file systems have no locks: abandoned files stay there
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another writer took it for abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files for `path` whose writers are gone: nothing holds their locks."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.????????{PARTIAL}"):
        with suppress(OSError), partial.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()
