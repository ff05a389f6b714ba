"""Folders, tars and zips seen alike: the names of their files, and where the bytes of each lie.

Nothing is extracted. A tar is indexed once by offset and read by seeking. A compressed tar allows no seeking, so it
is decompressed once into a plain tar in the workspace (its unpacked size on disk, deleted when the source is closed).
"""

import bz2
import gzip
import lzma
import os
import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pipelines.errors import DeitfastError, UserError
from pipelines.storage.sources.opened_source import Workspace

Opener = Callable[..., Any]
COMPRESSIONS: dict[bytes, Opener] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
"""First bytes of the compressed files that can be unpacked, and how."""
JUNK_FOLDERS = {"__MACOSX", "@eaDir", "lost+found"}
REPORT_EVERY = 5000


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of bytes in a file on disk; the file is opened anew for each read (a few microseconds)."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the bytes. Raises OSError where the file ends too early or is gone."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            data = file.read(self.size)
            while len(data) < self.size and (more := file.read(self.size - len(data))):
                data += more
        if len(data) < self.size:
            raise OSError(f"{printable(self.path)} ends {self.size - len(data)} bytes too early")
        return data


@dataclass(frozen=True, slots=True)
class ZipMember:
    """A stored or deflated file in a zip."""

    path: str
    header: int
    packed: int
    size: int
    method: int
    crc: int

    def read(self) -> bytes:
        """Return the unpacked bytes. Raises OSError where they do not fit the archive's checksum."""
        with open(self.path, "rb") as file:
            file.seek(self.header)
            head = file.read(30)
            if len(head) == 30 and head.startswith(b"PK\x03\x04"):
                file.seek(sum(struct.unpack_from("<HH", head, 26)), os.SEEK_CUR)
            data = file.read(self.packed)
        try:
            data = zlib.decompress(data, wbits=-15) if self.method == zipfile.ZIP_DEFLATED else data
        except zlib.error as error:
            raise OSError(f"{printable(self.path)}: damaged at byte {self.header}: {error}") from None
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise OSError(f"{printable(self.path)}: damaged at byte {self.header}: wrong checksum")
        return data


@dataclass
class Listing:
    """The files in a folder or archive."""

    origin: Path
    """The folder or archive."""
    files: dict[str, Extent | ZipMember] = field(default_factory=dict)
    """Names below the origin, parts joined by "/", in sorted order."""
    folders: set[str] = field(default_factory=set)
    """Names of the folders, empty ones too; those that only a file's name implies may be missing."""

    def named(self, *names: str) -> list[str]:
        """Return the files whose last part is one of `names`, in the order of `names`, then sorted."""
        found = [name for name in self.files if posixpath.basename(name) in names]
        return sorted(found, key=lambda name: (names.index(posixpath.basename(name)), name))


def list_files(path: Path, workspace: Workspace, skip: frozenset[str] = frozenset()) -> Listing:
    """Index a folder, tar, compressed tar or zip; folders on disk named in `skip` are not entered.

    Raises:
        UserError: there is nothing at `path`, or something else.
        DeitfastError: the archive is damaged, or there is no room to unpack it.
    """
    if not path.exists():
        raise UserError(f"{printable(path)} does not exist", remedy="give the folder or archive that holds the images")
    listing = Listing(path)
    if path.is_dir():
        _walk(path, skip, listing, workspace)
    else:
        with path.open("rb") as file:
            magic = file.read(6)
        opener = next((opener for start, opener in COMPRESSIONS.items() if magic.startswith(start)), None)
        if magic.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            _index_zip(path, listing)
        elif opener:
            _index_tar(_whole_file(_decompress(path, opener, workspace)), listing, workspace)
        else:
            _index_tar(_whole_file(path), listing, workspace)
    listing.files = dict(sorted(listing.files.items()))
    return listing


def list_tar(tar: Extent, origin: Path, workspace: Workspace) -> Listing:
    """Index an uncompressed tar that lies anywhere in a file: in a tar of tars, for instance."""
    listing = Listing(origin)
    _index_tar(tar, listing, workspace)
    listing.files = dict(sorted(listing.files.items()))
    return listing


def is_hidden(folder: str) -> bool:
    """Say whether a folder of this name holds something else than images: .git, __MACOSX, thumbnails."""
    return folder.startswith(".") or folder in JUNK_FOLDERS


def printable(name: str | Path) -> str:
    """Return a name that any terminal can show: control characters and bytes that are not UTF-8 are escaped."""
    text = str(name)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _walk(root: Path, skip: frozenset[str], listing: Listing, workspace: Workspace) -> None:
    """List a folder with all below it; links are followed, except back into a folder that is being listed."""
    pending = [(os.fspath(root), "", frozenset[tuple[int, int]]())]
    while pending:
        folder, prefix, above = pending.pop()
        try:
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            children = [] if identity in above else list(os.scandir(folder))
        except OSError as error:
            raise DeitfastError(f"{printable(folder)} cannot be listed: {error.strerror}") from None
        for child in children:
            name = prefix + child.name
            is_folder, is_file = _entry_type(child)
            if is_folder:
                if child.name not in skip and not is_hidden(child.name):
                    listing.folders.add(name)
                    pending.append((child.path, name + "/", above | {identity}))
            elif is_file:
                listing.files[name] = Extent(child.path, 0, child.stat().st_size)
            elif child.is_symlink():  # leads nowhere: reading it will say so, silence would lose an image
                listing.files[name] = Extent(child.path, 0, 0)
            if len(listing.files) % REPORT_EVERY == 1:
                workspace.progress("listing files", len(listing.files), 0)


def _entry_type(child: os.DirEntry[str]) -> tuple[bool, bool]:
    """Return whether an entry, or what a link leads to, is a folder and whether a file; a link may lead nowhere."""
    try:
        return child.is_dir(), child.is_file()
    except OSError:  # links that lead to themselves, or into a folder that nobody may enter
        if child.is_symlink():
            return False, False
        raise


def _members(tar: Extent, origin: Path, workspace: Workspace) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, and refuse it where it is cut short or damaged."""
    end = tar.offset + tar.size
    with open(tar.path, "rb") as file:
        if hasattr(os, "posix_fadvise"):  # headers lie far apart: reading ahead would read the whole archive
            os.posix_fadvise(file.fileno(), tar.offset, tar.size, os.POSIX_FADV_RANDOM)
        file.seek(tar.offset)
        archive = _open_tar(file, origin)
        number = 0
        try:
            while (member := archive.next()) is not None and member.offset < end:
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # else a kilobyte for each stays
                if member.isreg() and member.offset_data + member.size > end:
                    raise _damaged(origin, f"{printable(member.name)} reaches beyond the end of the archive")
                if number % REPORT_EVERY == 0:
                    workspace.progress(f"indexing {printable(origin.name)}", member.offset, end)
                number += 1
                yield member
        except tarfile.TarError as error:
            raise _damaged(origin, str(error)) from None
        file.seek(archive.offset)
        if archive.offset < end and any(file.read(tarfile.BLOCKSIZE)):  # next() ends quietly at nonsense
            raise _damaged(origin, f"no tar header at byte {archive.offset}")


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


def _index_tar(tar: Extent, listing: Listing, workspace: Workspace) -> None:
    """List a tar's files. Links to members become those members; of equal names the last counts, as in extracting."""
    links = {}
    for member in _members(tar, listing.origin, workspace):
        name = _normalized(member.name)
        if member.isdir():
            listing.folders.add(name)
        elif member.issym() or member.islnk():
            links[name] = _normalized(posixpath.join(posixpath.dirname(name) * member.issym(), member.linkname))
        elif member.isreg() and not member.issparse():
            listing.files[name] = Extent(tar.path, member.offset_data, member.size)
    files = listing.files
    files.update({name: files[target] for name, target in links.items() if target in files})


def _index_zip(path: Path, listing: Listing) -> None:
    """List a zip's files."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise _damaged(path, str(error)) from None
    for member in members:
        name = _normalized(member.filename)
        if member.is_dir():
            listing.folders.add(name)
            continue
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{printable(path)}: {printable(name)} cannot be read",
                expected="members that are stored or deflated, without a password",
                found="a password" if member.flag_bits & 1 else f"compression method {member.compress_type}",
                remedy="extract the archive and give the folder",
            )
        listing.files[name] = ZipMember(
            os.fspath(path),
            member.header_offset,
            member.compress_size,
            member.file_size,
            member.compress_type,
            member.CRC,
        )


def _decompress(path: Path, opener: Opener, workspace: Workspace) -> Path:
    """Unpack a compressed tar into a plain one in the workspace; return its path."""
    target, total = workspace.new_file("archive.tar"), path.stat().st_size
    try:
        with path.open("rb") as packed, opener(packed, "rb") as stream, target.open("wb") as file:
            while block := stream.read(1 << 22):
                file.write(block)
                workspace.progress(f"unpacking {printable(path.name)}", packed.tell(), total)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(path, str(error)) from None
    except OSError as error:
        if error.errno is None:  # bz2 says "Invalid data stream" this way
            raise _damaged(path, str(error)) from None
        raise DeitfastError(
            f"{printable(path)} cannot be unpacked to {printable(target)}: {error.strerror}",
            expected="room for the unpacked archive",
            remedy="make room, or extract the archive elsewhere and give the folder",
        ) from None
    return target


def _whole_file(path: Path) -> Extent:
    return Extent(os.fspath(path), 0, path.stat().st_size)


def _normalized(name: str) -> str:
    """Return a member's name without ./, //, .. and leading slashes: a name, never a path to follow."""
    return posixpath.normpath("/" + name).lstrip("/")


def _damaged(path: Path, found: str) -> DeitfastError:
    return DeitfastError(
        f"{printable(path)} is damaged or was not downloaded to its end",
        found=found,
        remedy="compare its size and checksum with the publisher's and fetch it again",
    )
