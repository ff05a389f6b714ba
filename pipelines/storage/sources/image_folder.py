"""Image trees: `train/<class>/*`, `val/<class>/*`, `test/<class>/*` in a folder or an archive; the kind `folder`."""

import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.errors import UserError, pluralize
from pipelines.storage.entry import Entry
from pipelines.storage.sources.label_table import TABLE_SUFFIXES, read_rows
from pipelines.storage.sources.listing import is_hidden, list_files
from pipelines.storage.sources.members import DanglingLink, FileLocator, Listing, printable
from pipelines.storage.sources.opened_source import OpenedSource, Workspace
from pipelines.storage.sources.splits import SPLIT_NAMES, mentions_split, split_of

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".avif",
)  # fmt: skip
COLUMN_SUFFIXES = (".parquet", ".arrow")
"""Endings of files that may hold images in a column, as Hugging Face's do."""
LIST = re.compile(r"[^/]*annotations[^/]*\.txt")
"""A text in a split's folder that names the class of each image: Tiny ImageNet's val_annotations.txt."""
EXPECTED = "train/<class>/* and, if you have them, val/<class>/* (or valid, validation) and test/<class>/*"
Images = dict[str, FileLocator]


@dataclass
class Part:
    """One split as it lies there."""

    folder: str
    """Its folder's name, for messages; empty where the class folders lie at the top."""
    classes: dict[str, Images] = field(default_factory=dict)
    """Images of each class by printable name ("train/cat/1.png"); empty for an empty class folder."""
    loose: Images = field(default_factory=dict)
    """Images outside every class folder, by name."""

    @property
    def num_images(self) -> int:
        """Images in class folders."""
        return sum(map(len, self.classes.values()))


@dataclass
class Tree:
    """The images of a listing, below the folder that everything lies in."""

    root: str
    """Prefix of the folder that holds the splits or classes, ending in "/", or empty."""
    images: Images
    """Images by full name, sorted."""
    folders: set[str]
    """Visible folders by full name."""
    ignored: Counter[str]
    """Visible files that are not images by their names, by their ending (or name, where that has none)."""
    dangling: list[str] = field(default_factory=list)
    """Links that lead to no file and are not images by their names: to a folder that is gone, most likely."""

    def part(self, folder: str) -> Part:
        """Return what lies below `folder` (a name directly below the root; empty: the root itself).

        A folder that holds nothing but one of the same split's name (train/train/<class>) is passed through.
        """
        prefix = f"{self.root}{folder}/" if folder else self.root
        while folder and (inner := self._only_folder(prefix)) and split_of(inner) == split_of(folder):
            prefix += inner + "/"
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
        return [self.part(top) for name in names for top in self._tops() if top.lower() == name]

    def split_parts(self, split: str) -> list[Part]:
        """Return the parts whose folders are named like a split and hold class folders with images, best name first."""
        names = SPLIT_NAMES[split]
        tops = [top for top in self._tops() if split_of(top) == split]
        tops.sort(key=lambda top: names.index(top.lower()) if top.lower() in names else len(names))
        return [part for part in map(self.part, tops) if part.num_images]

    def _tops(self) -> list[str]:
        return sorted({name[len(self.root) :].split("/", 1)[0] for name in self.images if name.startswith(self.root)})

    def _only_folder(self, prefix: str) -> str | None:
        """Return the one folder that all images below `prefix` lie in, if they lie in further folders there."""
        below = [name[len(prefix) :].split("/", 2) for name in self.images if name.startswith(prefix)]
        tops = {parts[0] for parts in below}
        return tops.pop() if len(tops) == 1 and all(len(parts) == 3 for parts in below) else None


def open_folder(path: Path, workspace: Workspace) -> OpenedSource:
    """Open a folder, tar or zip of class folders, with or without train, val and test above them.

    Raises:
        UserError: no class folders, or named like splits; a class is empty, or val has classes that train has not.
    """
    listing = list_files(path, workspace)
    tables = [printable(name) for name in listing.files if name.lower().endswith(TABLE_SUFFIXES)]
    hint = other_kind(listing) or (f"if {tables[0]} says the classes: --labels {tables[0]}" if tables else "")
    try:
        source = open_tree("folder", listing, workspace)
    except UserError as error:
        remedy = error.remedy or hint
        raise UserError(error.problem, expected=error.expected, found=error.found, remedy=remedy) from None
    return replace(source, notes=(*source.notes, hint)) if hint and len(source.classes) == 1 else source


def other_kind(listing: Listing) -> str:
    """Return a hint at the kind of source that other files than images speak for; empty: nothing does."""
    if any(name.endswith(COLUMN_SUFFIXES) for name in listing.files):
        return "if these are Hugging Face's files: convert huggingface"
    shards = any(name.endswith((".tar", ".cls")) for name in listing.files)
    return "if these are WebDataset shards: convert wds" if shards else ""


def open_tree(kind: str, listing: Listing, workspace: Workspace) -> OpenedSource:
    """Open the image tree in a listing; without a train folder, every folder at the top is a class."""
    tree = read_tree(listing)
    parts = find_splits(tree, listing.origin)
    known = parts["train"].classes
    parts |= {split: _by_list(part, tree.root, listing, known) for split, part in parts.items() if split != "train"}
    classes, splits, notes = assemble(listing.origin, parts, tree.ignored.total())
    notes = (*_outside(tree, parts, splits), *notes, *listing.notes)
    return OpenedSource(kind, str(listing.origin), classes, splits, notes, workspace.unpacked)


def find_splits(tree: Tree, origin: Path) -> dict[str, Part]:
    """Return the parts by split. Raises UserError where there is no training set, or only splits' names for classes."""
    found = {split: parts[0] for split in SPLIT_NAMES if (parts := tree.split_parts(split))}
    if "train" not in found and found:
        part = next(iter(found.values()))
        raise UserError(
            f"{printable(origin)} has no training images",
            expected=EXPECTED,
            found=f"{part.folder}/ with {len(part.classes)} classes, and no train/",
        )
    parts = {"train": found.get("train") or tree.part(""), **found}
    if parts["train"].num_images and all(map(mentions_split, parts["train"].classes)):
        raise UserError(
            f"{printable(origin)}: the folders that should be classes are named like splits",
            expected=EXPECTED,
            found=some(sorted(parts["train"].classes)),
        )
    return parts


def _by_list(part: Part, root: str, listing: Listing, known: Collection[str]) -> Part:
    """Return a split sorted into classes by the list in its folder, where it has one and no class folders.

    So does Tiny ImageNet: val/images/*.JPEG, and val/val_annotations.txt with a name and a class in each line.

    Raises:
        UserError: the list lacks an image.
    """
    lists = [name for name in listing.files if LIST.fullmatch(name.removeprefix(f"{root}{part.folder}/"))]
    if len(lists) != 1 or not part.classes.keys().isdisjoint(known):
        return part
    class_of = {row.name: row.label for row in read_rows(listing.files[lists[0]].read(), printable(lists[0]))}
    sorted_part = Part(part.folder)
    for name, locator in [pair for images in (*part.classes.values(), part.loose) for pair in images.items()]:
        if (found := class_of.get(posixpath.basename(name))) is None:
            raise UserError(f"{printable(lists[0])} does not say the class of {name}")
        sorted_part.classes.setdefault(printable(found), {})[name] = locator
    return sorted_part


def read_tree(listing: Listing, root: str | None = None) -> Tree:
    """Pick the images out of a listing, by their names' endings, and find the folder that holds splits or classes.

    Args:
        listing: of all files.
        root: that folder, where it is known.

    Raises:
        UserError: several folders hold a training set each.
    """
    images: Images = {}
    ignored: Counter[str] = Counter()
    dangling: list[str] = []
    for name, locator in listing.files.items():
        *folders, base = name.split("/")
        if any(map(is_hidden, folders)):
            continue
        if base.lower().endswith(IMAGE_SUFFIXES) and not base.startswith("._"):  # ._ are macOS notes
            images[name] = locator
        elif isinstance(locator, DanglingLink):
            dangling.append(f"{printable(name)} (to {printable(locator.target)})")
        else:
            ignored["._*" if base.startswith("._") else printable(posixpath.splitext(base)[1].lower() or base)] += 1
    visible = {name for name in listing.folders if not any(map(is_hidden, name.split("/")))}
    if root is None:
        found = _root_of_splits(images, listing.origin)
        root = _common_root(images) if found is None else found
    return Tree(root, images, visible, ignored, dangling)


def assemble(
    origin: Path, parts: Mapping[str, Part], ignored: int = 0, order: Callable[[str], Any] = str
) -> tuple[tuple[str, ...], dict[str, list[Entry]], tuple[str, ...]]:
    """Number the classes of train in sorted order and list every split sorted by class and name.

    Args:
        origin: the folder or archive, for messages.
        parts: what lies there, by split; train is among them.
        ignored: files that are not images by their names, for messages.
        order: what class names are sorted by; by default as ImageFolder does.

    Returns:
        Class names, entries by split, and notes for the user.

    Raises:
        UserError: no images, an empty class, or unknown classes in another split.
    """
    where, train = printable(origin), parts["train"]
    if not train.num_images:
        raise UserError(f"{where} holds no images in class folders", expected=EXPECTED, found=_contents(train, ignored))
    if empty := sorted(name for name, images in train.classes.items() if not images):
        raise UserError(
            f"{where}: {len(empty)} of {len(train.classes)} classes have no images",
            found=some(empty),
            remedy="add their images or remove their folders",
        )
    labels = {name: label for label, name in enumerate(sorted(train.classes, key=order))}
    notes = [f"there is one class only: {min(labels)}"] if len(labels) == 1 else []
    splits = {"train": _entries(train, labels)}
    for split, part in parts.items():
        if split == "train":
            continue
        unknown = sorted(name for name, images in part.classes.items() if images and name not in labels)
        if split == "test" and not any(images and name in labels for name, images in part.classes.items()):
            notes.append(
                f"{part.folder}/ has none of the training classes: {pluralize(part.num_images, 'image')} left out"
            )
            continue
        if unknown:
            raise UserError(
                f"{where}: {part.folder}/ has {pluralize(len(unknown), 'class')} that {train.folder}/ has not",
                found=some([_beside_alike(name, labels, train.folder) for name in unknown]),
                remedy="name the class folders of all splits alike",
            )
        splits[split] = _entries(part, labels)
    return tuple(labels), splits, tuple(notes)


def _beside_alike(name: str, known: Iterable[str], folder: str) -> str:
    """Return a class's name, with a known one that looks the same or differs only in case."""
    alike = [other for other in known if _looks(other) == _looks(name)]
    return f"{name} ({folder}/ has {alike[0]})" if alike else name


def _looks(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold().replace("_", " ").replace("-", " ").strip()


def some(names: list[str]) -> str:
    """Return the first few of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _outside(tree: Tree, parts: Mapping[str, Part], splits: Mapping[str, list[Entry]]) -> list[str]:
    """Return notes on what was taken for what, and on what lies there besides."""
    folders = [part.folder for split, part in parts.items() if split in splits and part.folder]
    notes = []
    if tree.root or any(folder.lower() not in SPLIT_NAMES[split_of(folder) or "train"] for folder in folders):
        found = " and ".join(f"{folder}/" for folder in folders) or "class folders"
        counts = " + ".join(f"{len(entries):,}" for entries in splits.values())
        under = f" under {printable(tree.root)}" if tree.root else ""
        notes.append(f"{found}{under}: {pluralize(len(parts['train'].classes), 'class')}, {counts} images")
    if unused := len(tree.images) - sum(part.num_images for part in parts.values()):
        seen = " and ".join(f"{folder}/<class>/" for folder in folders)
        notes.append(f"{pluralize(unused, 'image')} outside {seen or 'the class folders'} left out")
    return notes + besides(tree)


def besides(tree: Tree) -> list[str]:
    """Return notes on what is no image."""
    notes = []
    if tree.ignored:
        endings = some([ending for ending, _ in tree.ignored.most_common()])
        notes.append(f"{pluralize(tree.ignored.total(), 'file')} left out, not images by name: {endings}")
    if tree.dangling:
        notes.append(f"links that lead nowhere are left out: {some(tree.dangling)}")
    return notes


def _entries(part: Part, labels: Mapping[str, int]) -> list[Entry]:
    return [
        Entry(name, labels[class_name], locator, locator.size)
        for class_name in sorted(part.classes, key=lambda name: labels.get(name, -1))  # an empty class may be unknown
        for name, locator in part.classes[class_name].items()  # sorted, as listings are
    ]


def _root_of_splits(images: Iterable[str], origin: Path) -> str | None:
    """Return the prefix of the folder that holds a training folder with class folders, or None.

    It counts where a validation or test folder lies next to it, or where most of the images lie in it.

    Raises:
        UserError: there are several, equally far down.
    """
    found: dict[str, set[str]] = {}
    inside: Counter[str] = Counter()
    total = 0
    for name in images:
        total += 1
        parts = name.split("/")
        for depth, part in enumerate(parts[:-2]):  # a class folder lies between it and the image
            if split := split_of(part):
                root = "/".join([*parts[:depth], ""])
                found.setdefault(root, set()).add(split)
                inside[root] += 1
                break
    with_train = [root for root, splits in found.items() if "train" in splits]
    roots = [root for root in with_train if len(found[root]) > 1 or inside[root] * 2 > total] or with_train
    highest = [root for root in roots if root.count("/") == min(other.count("/") for other in roots)]
    if len(highest) > 1:
        raise UserError(
            f"{printable(origin)}: several folders hold a training set",
            found=some(sorted(map(printable, highest))),
            remedy="give one of them as the source",
        )
    alone = len(with_train) == 1 and len(found[highest[0]]) == 1 and inside[highest[0]] * 2 <= total
    return highest[0] if highest and not alone else None


def _common_root(images: Iterable[str]) -> str:
    """Return the prefix below which classes lie: past a folder that is alone, unless it is a class.

    It is one where it holds images, except a few next to several folders that hold most.
    """
    root = ""
    while True:
        below = [name[len(root) :].split("/", 2) for name in images if name.startswith(root)]
        tops = {parts[0] for parts in below if len(parts) > 1}
        if len(tops) != 1 or split_of(top := tops.pop()):
            return root
        inner = {parts[1] for parts in below if len(parts) == 3}
        here = sum(len(parts) == 2 for parts in below)
        if here and (len(inner) < 2 or 2 * here >= len(below)):
            return root
        root += top + "/"


def _contents(part: Part, ignored: int) -> str:
    """Say what there is instead of images in class folders."""
    found = [
        f"{pluralize(len(part.classes), 'folder')} without images" * bool(part.classes),
        f"{pluralize(len(part.loose), 'image')} outside class folders" * bool(part.loose),
        f"{pluralize(ignored, 'file')} not images by name" * bool(ignored),
    ]
    return ", ".join(filter(None, found)) or "nothing"
