"""Tars and zips: their members, by offset. Nothing is extracted.

A tar is indexed once and read by seeking. A compressed tar allows no seeking, so it is decompressed once into a plain
tar in the workspace (its unpacked size on disk, deleted when the source is closed).
"""

import bz2
import gzip
import lzma
import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from pipelines.errors import DeitfastError, UserError
from pipelines.storage.sources.members import DanglingLink, Extent, Listing, ZipMember, printable
from pipelines.storage.sources.opened_source import Workspace

Opener = Callable[..., Any]
COMPRESSIONS: dict[bytes, Opener] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
"""First bytes of the compressed files that can be unpacked, and how."""
REPORT_EVERY = 5000
FROM_DOS = 0
"""What a zip's member says that was written by a system whose names have no backslashes but as separators."""
LONGEST_LINK = 4096
"""Bytes of the longest path that a link in a zip may hold."""


def index_tar(tar: Extent, listing: Listing, workspace: Workspace) -> None:
    """List a tar's files. Links to members become those members; of equal names the last counts, as in extracting."""
    links: dict[str, str] = {}
    for member in _members(tar, listing.origin, workspace):
        name = normalized(member.name)
        if member.isdir():
            listing.folders.add(name)
        elif member.issym() or member.islnk():
            links[name] = normalized(posixpath.join(posixpath.dirname(name) * member.issym(), member.linkname))
        elif member.isreg() and not member.issparse():
            listing.files[name] = Extent(tar.path, member.offset_data, member.size)
            links.pop(name, None)
    _follow(links, listing)


def _members(tar: Extent, origin: Path, workspace: Workspace) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, or of several joined one behind the other.

    Raises:
        DeitfastError: it is cut short or damaged.
    """
    end = tar.offset + tar.size
    with open(tar.path, "rb") as file:
        if hasattr(os, "posix_fadvise"):  # headers lie far apart: reading ahead would read the whole archive
            os.posix_fadvise(file.fileno(), tar.offset, tar.size, os.POSIX_FADV_RANDOM)
        start, number = tar.offset, 0
        while start is not None:
            file.seek(start)
            archive = _open_tar(file, origin)
            for member in _members_of_one(archive, origin, end):
                if number % REPORT_EVERY == 0:
                    workspace.progress(f"indexing {printable(origin.name)}", member.offset, end)
                number += 1
                yield member
            file.seek(archive.offset)
            if archive.offset < end and any(file.read(tarfile.BLOCKSIZE)):  # next() ends quietly at nonsense
                raise damaged(origin, f"no tar header at byte {archive.offset}")
            start = _next_archive(file, archive.offset, end)


def _open_tar(file: IO[bytes], origin: Path) -> tarfile.TarFile:
    """Open the tar that begins at the file's position, or say what else the file seems to be."""
    start = file.tell()
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.TarError:
        file.seek(start)
        raise UserError(
            f"{printable(origin)} is no archive that can be read",
            expected="a folder, .tar, .tar.gz, .tar.bz2, .tar.xz or .zip",
            found=f"a file that begins with {file.read(8)!r}",
        ) from None
    except (Exception, MemoryError) as error:
        raise damaged(origin, f"a header at byte {start} with absurd numbers ({error})") from None


def _members_of_one(archive: tarfile.TarFile, origin: Path, end: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members up to the archive's end mark. Raises DeitfastError where a header lies."""
    while True:
        try:
            member = archive.next()
        except (Exception, MemoryError) as error:  # headers with absurd numbers lead to nearly any exception
            raise damaged(origin, str(error) or type(error).__name__) from None
        if member is None or member.offset >= end:
            return
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # else a kilobyte for each stays
        if member.size < 0 or (member.isreg() and member.offset_data + member.size > end):
            raise damaged(origin, f"{printable(member.name)} reaches beyond the end of the archive")
        yield member


def _next_archive(file: IO[bytes], start: int, end: int) -> int | None:
    """Return where a further tar follows the zeros that end one (`cat a.tar b.tar`), None where nothing does."""
    file.seek(position := start)
    while position < end and (block := file.read(min(1 << 20, end - position))):
        if rest := block.lstrip(b"\0"):
            position += len(block) - len(rest)
            return position - (position - start) % tarfile.BLOCKSIZE
        position += len(block)
    return None


def index_zip(path: Path, listing: Listing) -> None:
    """List a zip's files."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except OSError:
        raise
    except Exception as error:  # BadZipFile, but also what directories with absurd numbers lead to
        raise damaged(path, str(error) or type(error).__name__) from None
    if members and min(member.header_offset for member in members) > 0 and _begins_with_member(path):
        raise UserError(
            f"{printable(path)} is several zips joined, of which only the last can be listed",
            remedy="extract each by itself and give the folder",
        )
    links: dict[str, str] = {}
    for member in members:
        written = member.filename.replace("\\", "/") if member.create_system == FROM_DOS else member.filename
        name = normalized(written)
        if written.endswith("/"):
            listing.folders.add(name)
            continue
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{printable(path)}: {printable(name)} cannot be read",
                expected="members that are stored or deflated, without a password",
                found="a password" if member.flag_bits & 1 else f"compression method {member.compress_type}",
                remedy="extract the archive and give the folder",
            )
        file = ZipMember(
            os.fspath(path),
            member.header_offset,
            member.compress_size,
            member.file_size,
            member.compress_type,
            member.CRC,
        )
        if stat.S_ISLNK(member.external_attr >> 16) and member.file_size <= LONGEST_LINK:  # what it holds is a path
            target = os.fsdecode(_link_text(file, path))
            links[name] = normalized(posixpath.join(posixpath.dirname(name), target))
        else:
            listing.files[name] = file
    _follow(links, listing)


def _link_text(file: ZipMember, path: Path) -> bytes:
    try:
        return file.read()
    except OSError as error:
        raise damaged(path, str(error)) from None


def _begins_with_member(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _follow(links: dict[str, str], listing: Listing) -> None:
    """List an archive's links, given by name with the name that each leads to, as the members that they lead to."""
    for name, target in links.items():
        seen = {name}
        while target in links and target not in seen:
            seen.add(target)
            target = links[target]
        listing.files[name] = listing.files.get(target) or DanglingLink(name, target)


def decompress(path: Path, opener: Opener, workspace: Workspace) -> Path:
    """Unpack a compressed tar into a plain one in the workspace; return its path."""
    target, total = workspace.new_file("archive.tar"), path.stat().st_size
    try:
        with path.open("rb") as packed, opener(packed, "rb") as stream, target.open("wb") as file:
            while block := stream.read(1 << 22):
                file.write(block)
                workspace.progress(f"unpacking {printable(path.name)}", packed.tell(), total)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise damaged(path, str(error)) from None
    except OSError as error:
        if error.errno is None:  # bz2 says "Invalid data stream" this way
            raise damaged(path, str(error)) from None
        raise DeitfastError(
            f"{printable(path)} cannot be unpacked to {printable(target)}: {error.strerror}",
            expected="room for the unpacked archive",
            remedy="make room, or extract the archive elsewhere and give the folder",
        ) from None
    return target


def normalized(name: str) -> str:
    """Return a member's name without ./, //, .. and leading slashes: a name, never a path to follow."""
    return posixpath.normpath("/" + name).lstrip("/")


def damaged(path: Path, found: str) -> DeitfastError:
    """Return the error that says so; `found` is what its reader said."""
    return DeitfastError(
        f"{printable(path)} is damaged or was not downloaded to its end",
        found=found,
        remedy="compare its size and checksum with the publisher's and fetch it again",
    )
