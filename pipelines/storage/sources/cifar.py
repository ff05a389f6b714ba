"""CIFAR-10 and CIFAR-100: the official python and binary archives, packed or unpacked, or an image tree of either."""

import io
import pickle
import posixpath
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from pipelines.errors import DeitfastError, UserError
from pipelines.files import explain_os_error
from pipelines.storage.entry import Entry
from pipelines.storage.sources.image_folder import IMAGE_SUFFIXES, open_tree
from pipelines.storage.sources.listing import list_files
from pipelines.storage.sources.members import Extent, Listing, printable
from pipelines.storage.sources.opened_source import OpenedSource, Workspace

SIDE = 32
PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True, slots=True)
class PlanarImage:
    """One CIFAR image: 3,072 bytes at an offset, all red, then all green, then all blue."""

    path: str
    offset: int

    def read(self) -> np.ndarray:
        """Return uint8 [32, 32, 3]."""
        data = Extent(self.path, self.offset, PIXELS).read()
        return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(3, SIDE, SIDE).transpose(1, 2, 0))


class LabeledImages(NamedTuple):
    """One of the archive's files of images."""

    labels: np.ndarray
    """int64 [N]."""
    images: list[PlanarImage]


@dataclass(frozen=True)
class Layout:
    """One official archive (https://www.cs.toronto.edu/~kriz/cifar.html)."""

    kind: str
    archive: str
    """Name it is published under, without .tar.gz."""
    folder: str
    """Folder inside the archive."""
    train: tuple[str, ...]
    test: str
    meta: str
    """File of the class names."""
    names_key: str = ""
    """Key of the class names in the python archive's meta file; empty: the binary archive, one name a line."""
    labels_key: str = ""
    """Key of the labels in the python archive's batches."""
    record_head: int = 0
    """Label bytes before each image of the binary archive."""
    label_byte: int = 0
    """Which of them is the label."""

    def coarse(self) -> "Layout":
        """Return CIFAR-100's layout with its 20 coarse labels instead of the 100 fine ones."""
        names = [text.replace("fine", "coarse") for text in (self.meta, self.names_key, self.labels_key)]
        return replace(self, meta=names[0], names_key=names[1], labels_key=names[2], label_byte=0)


TEN = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUTS = (
    Layout("cifar10", "cifar-10-python", "cifar-10-batches-py", TEN, "test_batch", "batches.meta",
           names_key="label_names", labels_key="labels"),
    Layout("cifar100", "cifar-100-python", "cifar-100-python", ("train",), "test", "meta",
           names_key="fine_label_names", labels_key="fine_labels"),
    Layout("cifar10", "cifar-10-binary", "cifar-10-batches-bin", tuple(f"{name}.bin" for name in TEN),
           "test_batch.bin", "batches.meta.txt", record_head=1),
    Layout("cifar100", "cifar-100-binary", "cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt",
           record_head=2, label_byte=1),
)  # fmt: skip


def open_cifar(kind: str, path: Path, workspace: Workspace, *, coarse: bool = False) -> OpenedSource:
    """Open CIFAR-10 or CIFAR-100: an official archive, its folder, a folder that holds either, or an image tree.

    Args:
        kind: cifar10 or cifar100.
        path: archive, folder or tree.
        workspace: for what must be unpacked.
        coarse: CIFAR-100's 20 coarse labels, of an archive, instead of the 100 fine ones.

    Raises:
        UserError: none of these, the other CIFAR, or files of the archive are missing.
        DeitfastError: a file of the archive is damaged.
    """
    listing = list_files(_home(kind, path), workspace)
    for layout in LAYOUTS:
        folder = _folder(layout, listing)
        if folder is not None and layout.kind == kind:
            return _open_archive(layout.coarse() if coarse else layout, folder, listing, workspace)
        if folder is not None:
            raise UserError(
                f"{printable(path)} holds {layout.kind}", expected=kind, remedy=f"convert {layout.kind} of it"
            )
    if not any(name.lower().endswith(IMAGE_SUFFIXES) for name in listing.files):
        archives = " or ".join(f"{layout.archive}.tar.gz" for layout in LAYOUTS if layout.kind == kind)
        raise UserError(
            f"{printable(path)} holds no {kind}",
            expected=f"{archives}, packed or unpacked, or an image tree train/<class>/* and test/<class>/*",
            found=f"{len(listing.files):,} other files",
        )
    if coarse:
        raise UserError(
            f"{printable(path)} has no coarse labels: an image tree's classes are its folders",
            expected="cifar-100-python.tar.gz or cifar-100-binary.tar.gz",
        )
    source = open_tree(kind, listing, workspace)
    if "val" not in source.splits and "test" in source.splits:  # as from the archives: their test images are val
        source.splits["val"] = source.splits.pop("test")
    return source


def _home(kind: str, path: Path) -> Path:
    """Return the archive or its folder where `path` is the folder that one lies in, else `path`."""
    candidates = [
        path / name
        for layout in LAYOUTS
        if layout.kind == kind
        for name in (layout.folder, *(layout.archive + end for end in (".tar.gz", ".tgz", ".tar")))
    ]
    return next((candidate for candidate in candidates if candidate.exists()), path)


def _folder(layout: Layout, listing: Listing) -> str | None:
    """Return the prefix of the listing's names below which this layout's files lie, or None."""
    wanted = (*layout.train, layout.test, layout.meta)
    seen = [posixpath.dirname(name) for name in listing.named(*wanted)]
    folder = max(seen, key=seen.count, default=None)
    if folder is None or seen.count(folder) < 2:  # one file of such a name (train, test) says nothing
        return None
    return folder + "/" if folder else ""


def _open_archive(layout: Layout, folder: str, listing: Listing, workspace: Workspace) -> OpenedSource:
    where = printable(listing.origin)
    wanted = (*layout.train, layout.test, layout.meta)
    if missing := [name for name in wanted if folder + name not in listing.files]:
        raise UserError(
            f"{where} is incomplete: {', '.join(missing)} missing",
            expected=f"all files of {layout.archive}.tar.gz: {', '.join(wanted)}",
            remedy="fetch the archive again from https://www.cs.toronto.edu/~kriz/cifar.html",
        )
    read_batch = _read_python if layout.labels_key else _read_binary
    classes = _class_names(layout, listing.files[folder + layout.meta].read(), where)
    splits: dict[str, list[Entry]] = {"train": [], "val": []}
    for split, names in (("train", layout.train), ("val", (layout.test,))):
        for name in names:
            batch = read_batch(layout, name, listing, folder, workspace)
            if not 0 <= batch.labels.min() <= batch.labels.max() < len(classes):
                raise _damaged(where, name, f"labels below {len(classes)}", f"labels up to {batch.labels.max()}")
            splits[split].extend(
                Entry(f"{name}#{row}", int(label), image, PIXELS)
                for row, (label, image) in enumerate(zip(batch.labels, batch.images, strict=True))
            )
    origin = str(listing.origin) + ("" if layout in LAYOUTS else ", coarse labels")
    return OpenedSource(layout.kind, origin, classes, splits, tuple(listing.notes), workspace.unpacked)


def _class_names(layout: Layout, data: bytes, where: str) -> tuple[str, ...]:
    if not layout.names_key:
        return tuple(data.decode("utf-8", "replace").split())
    names = _unpickle(data, where, layout.meta).get(layout.names_key, [])
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names)


def _read_binary(layout: Layout, name: str, listing: Listing, folder: str, workspace: Workspace) -> LabeledImages:
    """Read the labels of a .bin file and locate its images, which are read where they lie."""
    file = listing.files[folder + name]
    data, record = file.read(), layout.record_head + PIXELS
    count, rest = divmod(len(data), record)
    if rest or not count:
        raise _damaged(printable(listing.origin), name, f"a multiple of {record} bytes", f"{len(data)} bytes")
    labels = np.frombuffer(data, np.uint8).reshape(count, record)[:, layout.label_byte].astype(np.int64)
    place = file if isinstance(file, Extent) else _store(data, name, workspace)
    first = place.offset + layout.record_head
    return LabeledImages(labels, [PlanarImage(place.path, first + row * record) for row in range(count)])


def _read_python(layout: Layout, name: str, listing: Listing, folder: str, workspace: Workspace) -> LabeledImages:
    """Read a pickled batch and store its pixels in the workspace (3,072 bytes an image) to be read by offset."""
    where = printable(listing.origin)
    content = _unpickle(listing.files[folder + name].read(), where, name)
    pixels, labels = content.get("data"), content.get(layout.labels_key)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        found = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else "no array"
        raise _damaged(where, name, f"data uint8 [N, {PIXELS}]", found)
    if not isinstance(labels, list) or not labels or len(labels) != len(pixels):
        found = f"{len(labels)}" if isinstance(labels, list) else "none"
        raise _damaged(where, name, f"{len(pixels)} {layout.labels_key}", found)
    place = _store(np.ascontiguousarray(pixels).tobytes(), name, workspace)
    return LabeledImages(
        np.array(labels, np.int64), [PlanarImage(place.path, row * PIXELS) for row in range(len(labels))]
    )


def _store(data: bytes, name: str, workspace: Workspace) -> Extent:
    path = workspace.new_file(name)
    with explain_os_error(path):
        path.write_bytes(data)
    return Extent(str(path), 0, len(data))


class _CifarUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and numpy arrays, and nothing else: a pickle may name any function."""

    ALLOWED: ClassVar[dict[str, Any]] = {
        "multiarray._reconstruct": np.empty(0).__reduce__()[0],  # public way to a private name
        "numeric._frombuffer": lambda data, dtype, shape, order: np.frombuffer(data, dtype).reshape(shape, order=order),
        "numpy.ndarray": np.ndarray,
        # numpy 2.4 warns of align=0, which the archives of 2009 pass
        "numpy.dtype": lambda code, *_: np.dtype(code, align=False, copy=True),
        "_codecs.encode": lambda text, encoding: text.encode(encoding),  # bytes, in protocol 2 from Python 3
    }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        for prefix in ("numpy.core.", "numpy._core."):
            full = full.removeprefix(prefix)
        if full not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR archive does")
        return self.ALLOWED[full]


def _unpickle(data: bytes, where: str, name: str) -> dict[str, Any]:
    """Return the pickled dict with its keys as str, whichever Python wrote it."""
    try:
        content = _CifarUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # damaged bytes are a random program: they can raise anything
        raise _damaged(where, name, "a pickled dict of arrays", str(error) or type(error).__name__) from None
    if not isinstance(content, dict):
        raise _damaged(where, name, "a pickled dict", f"a {type(content).__name__}")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def _damaged(where: str, name: str, expected: str, found: str) -> DeitfastError:
    return DeitfastError(
        f"{where}: {name} is damaged", expected=expected, found=found, remedy="fetch the archive again"
    )
