"""Small sources for the tests of `pipelines.storage`: folders, archives, and what conversion would see of them."""

import io
import tarfile
from pathlib import Path

from pipelines.storage.sources.opened_source import OpenedSource


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def tar_bytes(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def contents(source: OpenedSource, split: str = "train") -> list[tuple[str, str, bytes]]:
    """Class, name and bytes of every image, in order."""
    read = [(source.classes[e.label], e.name, bytes(source.read(e)), e.size) for e in source.splits[split]]
    assert all(len(data) <= size for *_, data, size in read)
    return [(class_name, name, data) for class_name, name, data, _ in read]
