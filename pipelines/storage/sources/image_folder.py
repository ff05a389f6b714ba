"""Image trees: `train/<class>/*` and `val/<class>/*` in a folder or an archive. What kind `folder` opens."""

import hashlib
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.errors import UserError
from pipelines.storage.entry import Entry
from pipelines.storage.sources.listing import Extent, Listing, ZipMember, is_hidden, list_files, printable
from pipelines.storage.sources.opened_source import OpenedSource, Workspace, refuse_fraction

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".avif",
)  # fmt: skip
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test", "testing")
LAYOUT = "train/<class>/* and, if you have one, val/<class>/* (or test, valid, validation)"
Images = dict[str, Extent | ZipMember]


@dataclass
class Part:
    """One split as it lies there."""

    folder: str
    """Its folder's name, for messages; empty where the class folders lie at the top."""
    classes: dict[str, Images] = field(default_factory=dict)
    """Images of each class by printable name ("train/cat/1.png"); empty for an empty class folder."""
    loose: Images = field(default_factory=dict)
    """Images outside every class folder, by name."""


@dataclass
class Tree:
    """The images of a listing, below the folder that everything lies in."""

    root: str
    """Prefix that all names share, ending in "/", or empty."""
    images: Images
    """Images by full name, sorted."""
    folders: set[str]
    """Visible folders by full name."""
    ignored: Counter[str]
    """Visible files that are not images by their names, by their ending (or name, where that has none)."""

    def part(self, folder: str) -> Part:
        """Return what lies below `folder` (a name directly below the root; empty: the root itself)."""
        prefix = f"{self.root}{folder}/" if folder else self.root
        part = Part(folder)
        for name in self.folders:
            if name.startswith(prefix) and "/" not in name[len(prefix) :]:
                part.classes.setdefault(printable(name[len(prefix) :]), {})
        for name, locator in self.images.items():
            if name.startswith(prefix):
                class_name, slash, _ = name[len(prefix) :].partition("/")
                images = part.classes.setdefault(printable(class_name), {}) if slash else part.loose
                images[printable(name[len(self.root) :])] = locator
        return part

    def parts(self, names: Iterable[str]) -> list[Part]:
        """Return the parts in folders of these names (upper or lower case), in the order of `names`."""
        tops = {name[len(self.root) :].split("/", 1)[0] for name in self.images if name.startswith(self.root)}
        return [self.part(top) for name in names for top in sorted(tops) if top.lower() == name]


def open_folder(path: Path, workspace: Workspace, val_fraction: float) -> OpenedSource:
    """Open a folder, tar or zip of class folders, with or without train and val above them.

    Raises:
        UserError: no class folders, or named like splits; a class is empty, or val has classes that train has not.
    """
    return open_tree("folder", list_files(path, workspace), workspace, val_fraction)


def open_tree(kind: str, listing: Listing, workspace: Workspace, val_fraction: float) -> OpenedSource:
    """Open the image tree in a listing; without a train folder, every folder at the top is a class."""
    tree = read_tree(listing)
    trains = [part for part in tree.parts(TRAIN_NAMES) if any(part.classes.values())]
    vals = [part for part in tree.parts(VAL_NAMES) if any(part.classes.values())]
    if not trains and vals:
        raise UserError(
            f"{printable(listing.origin)} has no training images",
            expected=LAYOUT,
            found=f"{vals[0].folder}/ with {len(vals[0].classes)} classes, and no train/",
        )
    train, val = trains[0] if trains else tree.part(""), vals[0] if vals else None
    if any(train.classes.values()) and all(map(_is_split, train.classes)):
        raise UserError(
            f"{printable(listing.origin)}: the folders that should be classes are named like splits",
            expected=LAYOUT,
            found=some(sorted(train.classes)),
        )
    used = sum(len(images) for part in (train, val) if part for images in part.classes.values())
    if unused := len(tree.images) - used:
        seen = " and ".join(f"{part.folder}/<class>/" for part in (train, val) if part and part.folder)
        workspace.notes.append(f"{unused:,} images outside {seen or 'the class folders'} are left out")
    if tree.ignored:
        endings = some([ending for ending, _ in tree.ignored.most_common()])
        workspace.notes.append(f"{tree.ignored.total():,} files, not images by their names, are left out: {endings}")
    return assemble(kind, listing.origin, train, val, workspace, val_fraction, tree.ignored.total())


def read_tree(listing: Listing) -> Tree:
    """Pick the images out of a listing, by their names' endings, and find the folder that holds them all."""
    images: Images = {}
    ignored: Counter[str] = Counter()
    for name, locator in listing.files.items():
        *folders, base = name.split("/")
        if any(map(is_hidden, folders)):
            continue
        if base.lower().endswith(IMAGE_SUFFIXES) and not base.startswith("._"):  # ._ are macOS notes
            images[name] = locator
        else:
            ignored["._*" if base.startswith("._") else printable(posixpath.splitext(base)[1].lower() or base)] += 1
    visible = {name for name in listing.folders if not any(map(is_hidden, name.split("/")))}
    return Tree(_common_root(images), images, visible, ignored)


def assemble(
    kind: str,
    origin: Path,
    train: Part,
    val: Part | None,
    workspace: Workspace,
    val_fraction: float,
    ignored: int = 0,
) -> OpenedSource:
    """Number the classes of `train` in sorted order and list both splits sorted by class and name.

    Raises:
        UserError: no images, an empty class, unknown classes in val, or a `val_fraction` where there is a val.
    """
    where = printable(origin)
    if not any(train.classes.values()):
        raise UserError(f"{where} holds no images in class folders", expected=LAYOUT, found=_contents(train, ignored))
    if empty := sorted(name for name, images in train.classes.items() if not images):
        raise UserError(
            f"{where}: {len(empty)} of {len(train.classes)} classes have no images",
            found=some(empty),
            remedy="add their images or remove their folders",
        )
    labels = {name: label for label, name in enumerate(sorted(train.classes))}
    if len(labels) == 1:
        workspace.notes.append(f"there is one class only: {min(labels)}")
    splits = {"train": _entries(train, labels)}
    if val is not None:
        if unknown := sorted(name for name, images in val.classes.items() if images and name not in labels):
            raise UserError(
                f"{where}: {val.folder}/ has {len(unknown)} classes that {train.folder}/ has not",
                found=some(unknown),
                remedy="name the class folders of both splits alike",
            )
        refuse_fraction(where, val_fraction, val.folder)
        splits["val"] = _entries(val, labels)
    elif val_fraction:
        splits["train"], splits["val"] = split_off(splits["train"], val_fraction, train.folder)
    else:
        workspace.notes.append("there is no validation split; --val-fraction .1 makes one")
    return OpenedSource(kind, str(origin), tuple(labels), splits, tuple(workspace.notes), workspace.unpacked)


def split_off(entries: list[Entry], fraction: float, folder: str) -> tuple[list[Entry], list[Entry]]:
    """Move `fraction` of each class to a validation split; at least one image each, where the class has two.

    Which images go is decided by a hash of their own names below `folder`, so that more files change little.
    """
    by_class: dict[int, list[Entry]] = {}
    for entry in entries:
        by_class.setdefault(entry.label, []).append(entry)
    chosen: set[str] = set()
    for images in by_class.values():
        number = min(len(images) - 1, max(1, int(len(images) * fraction + 0.5)))
        chosen.update(entry.name for entry in sorted(images, key=lambda e: _draw(e.name, folder))[:number])
    return [e for e in entries if e.name not in chosen], [e for e in entries if e.name in chosen]


def some(names: list[str]) -> str:
    """Return the first few of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _draw(name: str, folder: str) -> bytes:
    return hashlib.blake2b(name.removeprefix(f"{folder}/").encode(), digest_size=8).digest()


def _entries(part: Part, labels: Mapping[str, int]) -> list[Entry]:
    return [
        Entry(name, labels[class_name], locator, locator.size)
        for class_name in sorted(part.classes)
        for name, locator in part.classes[class_name].items()  # sorted, as listings are
    ]


def _is_split(folder: str) -> bool:
    """Say whether a folder's name is that of a split: train, test1, seg_train."""
    return any(word in TRAIN_NAMES + VAL_NAMES for word in re.findall("[a-z]+", folder.lower()))


def _common_root(images: Iterable[str]) -> str:
    """Return the prefix below which splits or classes lie: past folders that hold one folder and no images."""
    root = ""
    while True:
        below = [name[len(root) :].split("/", 2) for name in images if name.startswith(root)]
        tops = {parts[0] for parts in below if len(parts) > 1}
        if len(tops) != 1 or any(len(parts) == 2 for parts in below):
            return root
        (top,) = tops
        if top.lower() in TRAIN_NAMES + VAL_NAMES:
            return root
        root += top + "/"


def _contents(part: Part, ignored: int) -> str:
    """Say what there is instead of images in class folders."""
    found = [
        f"{len(part.classes):,} folders without images" * bool(part.classes),
        f"{len(part.loose):,} images outside class folders" * bool(part.loose),
        f"{ignored:,} files that are not images by their names" * bool(ignored),
    ]
    return ", ".join(filter(None, found)) or "nothing"
