"""Folders, tars and zips seen alike: the names of their files, and where the bytes of each lie.

Nothing is extracted. A tar is indexed once by offset and read by seeking. A compressed tar allows no seeking, so it
is decompressed once into a plain tar in the workspace (its unpacked size on disk, deleted when the source is closed).
"""

import bz2
import gzip
import lzma
import os
import posixpath
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pipelines.errors import DeitfastError, UserError
from pipelines.storage.dataset import SPEC_FILE
from pipelines.storage.sources.opened_source import Workspace
from pipelines.storage.transcode import BadImageError

Opener = Callable[..., Any]
COMPRESSIONS: dict[bytes, Opener] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
"""First bytes of the compressed files that can be unpacked, and how."""
JUNK_FOLDERS = {"__MACOSX", "@eaDir", "lost+found"}
REPORT_EVERY = 5000
FROM_DOS = 0
"""What a zip's member says that was written by a system whose names have no backslashes but as separators."""
OUR_DATA = re.compile(r"(train|val|test)\.(beton|wds)(\.partial)?")
OUR_JOURNAL = re.compile(r"(train|val|test)\.journal")
"""Names of what a conversion writes, next to dataset.json or before that."""
LONGEST_LINK = 4096
"""Bytes of the longest path that a link in a zip may hold."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of bytes in a file on disk; the file is opened again for each read (a few microseconds)."""

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
            if self.method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(wbits=-15).decompress(data, self.size + 1)
        except zlib.error as error:
            raise OSError(f"{printable(self.path)}: damaged at byte {self.header}: {error}") from None
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise OSError(f"{printable(self.path)}: damaged at byte {self.header}: wrong checksum")
        return data


@dataclass(frozen=True, slots=True)
class DanglingLink:
    """A link that leads to no file."""

    path: str
    target: str
    offset: int = 0
    size: int = 0

    def read(self) -> bytes:
        """Raise BadImageError: a conversion stops here, or leaves it out with --skip-bad."""
        raise BadImageError(f"a link to {printable(self.target)}, which does not exist")


FileLocator = Extent | ZipMember | DanglingLink


@dataclass
class Listing:
    """The files in a folder or archive."""

    origin: Path
    """The folder or archive."""
    files: dict[str, FileLocator] = field(default_factory=dict)
    """Names below the origin, parts joined by "/", in Unicode's composed form (NFC), in sorted order."""
    folders: set[str] = field(default_factory=set)
    """Names of the folders, empty ones too; those that only a file's name implies may be missing."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of how they were found."""

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
    _finish(listing)
    return listing


def list_tar(tar: Extent, origin: Path, workspace: Workspace) -> Listing:
    """Index an uncompressed tar that lies anywhere in a file: in a tar of tars, for instance."""
    listing = Listing(origin)
    _index_tar(tar, listing, workspace)
    _finish(listing)
    return listing


def _finish(listing: Listing) -> None:
    """Sort the names and give them the forms that classes are compared in.

    Windows programs write "\\" between folders where "/" belongs. macOS decomposes letters (NFD) that others write
    composed; of two files whose names differ in nothing else, the second gets a tilde.
    """
    flat = {name for name in listing.files if "\\" in name and "/" not in name}
    if flat and not listing.origin.is_dir():
        listing.notes.append("names with backslashes are read as paths")
        renamed = {name.replace("\\", "/") if name in flat else name: where for name, where in listing.files.items()}
        listing.files = {_normalized(name): where for name, where in renamed.items() if not name.endswith("/")}
        ends = {name for name in renamed if name.endswith("/")}
        listing.folders = {_normalized(name.replace("\\", "/")) for name in listing.folders | ends}
    files: dict[str, FileLocator] = {}
    for name, where in sorted(listing.files.items()):
        composed = unicodedata.normalize("NFC", name)
        while composed in files:
            stem, ending = posixpath.splitext(composed)
            composed = f"{stem}~{ending}"
        files[composed] = where
    listing.files = dict(sorted(files.items()))
    listing.folders = {unicodedata.normalize("NFC", name) for name in listing.folders}


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
    """List a folder with all below it; links are followed, except back into a folder that is being listed.

    The output of a conversion is not part of its source: the workspace's folder, and data sets of ours, are left out.
    """
    output = _identity(workspace.scratch) if workspace.scratch else None
    pending = [(os.fspath(root), "", frozenset[object]())]
    left_out: list[str] = []
    while pending:
        folder, prefix, above = pending.pop()
        try:
            identity = _identity(folder)
            children = [] if identity in above else list(os.scandir(folder))
        except OSError as error:
            raise DeitfastError(f"{printable(folder)} cannot be listed: {error.strerror}") from None
        if prefix and (identity == output or _is_ours({child.name for child in children})):
            left_out.append(prefix[:-1])
            if identity != output:
                listing.notes.append(f"{printable(prefix)} is left out: it holds a converted data set")
            continue
        for child in children:
            name = prefix + child.name
            is_folder, is_file = _entry_type(child)
            if is_folder:
                if child.name not in skip and not is_hidden(child.name) and not OUR_DATA.fullmatch(child.name):
                    listing.folders.add(name)
                    pending.append((child.path, name + "/", above | {identity}))
            elif is_file:
                listing.files[name] = Extent(child.path, 0, child.stat().st_size)
            elif child.is_symlink():
                listing.files[name] = DanglingLink(child.path, os.readlink(child.path))
            if len(listing.files) % REPORT_EVERY == 1:
                workspace.progress("listing files", len(listing.files), 0)
    for name in left_out:
        _forget_folder(name, listing)


def _identity(folder: str | Path) -> tuple[int, int] | None:
    """Return device and inode of a folder, None where there is none."""
    try:
        status = os.stat(folder)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _is_ours(names: set[str]) -> bool:
    """Say whether a folder of these names holds a data set that deitfast converted, or began to."""
    return any(map(OUR_JOURNAL.fullmatch, names)) or (SPEC_FILE in names and any(map(OUR_DATA.fullmatch, names)))


def _forget_folder(name: str, listing: Listing) -> None:
    """Drop a folder that is left out, and those above it that hold nothing else."""
    while name and not any(
        other.startswith(name + "/") for others in (listing.files, listing.folders) for other in others
    ):
        listing.folders.discard(name)
        name = posixpath.dirname(name)


def _entry_type(child: os.DirEntry[str]) -> tuple[bool, bool]:
    """Return whether an entry, or what a link leads to, is a folder and whether a file; a link may lead nowhere."""
    try:
        return child.is_dir(), child.is_file()
    except OSError:  # links that lead to themselves, or into a folder that this user may not enter
        if child.is_symlink():
            return False, False
        raise


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
                raise _damaged(origin, f"no tar header at byte {archive.offset}")
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
        raise _damaged(origin, f"a header at byte {start} with absurd numbers ({error})") from None


def _members_of_one(archive: tarfile.TarFile, origin: Path, end: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members up to the archive's end mark. Raises DeitfastError where a header lies."""
    while True:
        try:
            member = archive.next()
        except (Exception, MemoryError) as error:  # headers with absurd numbers lead to nearly any exception
            raise _damaged(origin, str(error) or type(error).__name__) from None
        if member is None or member.offset >= end:
            return
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # else a kilobyte for each stays
        if member.size < 0 or (member.isreg() and member.offset_data + member.size > end):
            raise _damaged(origin, f"{printable(member.name)} reaches beyond the end of the archive")
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


def _index_tar(tar: Extent, listing: Listing, workspace: Workspace) -> None:
    """List a tar's files. Links to members become those members; of equal names the last counts, as in extracting."""
    links: dict[str, str] = {}
    for member in _members(tar, listing.origin, workspace):
        name = _normalized(member.name)
        if member.isdir():
            listing.folders.add(name)
        elif member.issym() or member.islnk():
            links[name] = _normalized(posixpath.join(posixpath.dirname(name) * member.issym(), member.linkname))
        elif member.isreg() and not member.issparse():
            listing.files[name] = Extent(tar.path, member.offset_data, member.size)
            links.pop(name, None)
    _follow(links, listing)


def _follow(links: dict[str, str], listing: Listing) -> None:
    """List an archive's links, given by name with the name that each leads to, as the members that they lead to."""
    for name, target in links.items():
        seen = {name}
        while target in links and target not in seen:
            seen.add(target)
            target = links[target]
        listing.files[name] = listing.files.get(target) or DanglingLink(name, target)


def _index_zip(path: Path, listing: Listing) -> None:
    """List a zip's files."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except OSError:
        raise
    except Exception as error:  # BadZipFile, but also what directories with absurd numbers lead to
        raise _damaged(path, str(error) or type(error).__name__) from None
    if members and min(member.header_offset for member in members) > 0 and _begins_with_member(path):
        raise UserError(
            f"{printable(path)} is several zips joined, of which only the last can be listed",
            remedy="extract each by itself and give the folder",
        )
    links: dict[str, str] = {}
    for member in members:
        written = member.filename.replace("\\", "/") if member.create_system == FROM_DOS else member.filename
        name = _normalized(written)
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
            links[name] = _normalized(posixpath.join(posixpath.dirname(name), target))
        else:
            listing.files[name] = file
    _follow(links, listing)


def _link_text(file: ZipMember, path: Path) -> bytes:
    try:
        return file.read()
    except OSError as error:
        raise _damaged(path, str(error)) from None


def _begins_with_member(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


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
