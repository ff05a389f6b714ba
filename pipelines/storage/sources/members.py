"""The files that a folder or archive holds: their names, and where the bytes of each lie."""

import os
import posixpath
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.storage.transcode import BadImageError


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


def printable(name: str | Path) -> str:
    """Return a name that any terminal can show: control characters and bytes that are not UTF-8 are escaped."""
    text = str(name)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
