"""Folders, tars and zips seen alike: the names of their files, and where the bytes of each lie."""

import os
import posixpath
import re
import unicodedata
from pathlib import Path

from pipelines.errors import DeitfastError, UserError
from pipelines.storage.dataset import SPEC_FILE
from pipelines.storage.sources.archives import COMPRESSIONS, REPORT_EVERY, decompress, index_tar, index_zip, normalized
from pipelines.storage.sources.members import DanglingLink, Extent, FileLocator, Listing, printable
from pipelines.storage.sources.opened_source import Workspace

JUNK_FOLDERS = {"__MACOSX", "@eaDir", "lost+found"}
OUR_DATA = re.compile(r"(train|val|test)\.(beton|wds)(\.partial)?")
OUR_JOURNAL = re.compile(r"(train|val|test)\.journal")
"""Names of what a conversion writes, next to dataset.json or before that."""


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
            index_zip(path, listing)
        elif opener:
            index_tar(_whole_file(decompress(path, opener, workspace)), listing, workspace)
        else:
            index_tar(_whole_file(path), listing, workspace)
    _finish(listing)
    return listing


def list_tar(tar: Extent, origin: Path, workspace: Workspace) -> Listing:
    """Index an uncompressed tar that lies anywhere in a file: in a tar of tars, for instance."""
    listing = Listing(origin)
    index_tar(tar, listing, workspace)
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
        listing.files = {normalized(name): where for name, where in renamed.items() if not name.endswith("/")}
        ends = {name for name in renamed if name.endswith("/")}
        listing.folders = {normalized(name.replace("\\", "/")) for name in listing.folders | ends}
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


def _whole_file(path: Path) -> Extent:
    return Extent(os.fspath(path), 0, path.stat().st_size)
