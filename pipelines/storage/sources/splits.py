"""Names of splits, and the validation split that `--val-fraction` draws out of the training images."""

import hashlib
import re
from dataclasses import replace
from functools import lru_cache

from pipelines.errors import UserError, pluralize
from pipelines.storage.entry import Entry
from pipelines.storage.sources.opened_source import OpenedSource

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""What folders of each split are called, in order of preference."""
FILLERS = {"set", "data", "dataset", "images", "image", "imgs", "img", "seg", "split", "all", "full", "ilsvrc"}
"""Words that folders of splits have besides: training_set, seg_test, train2017, ILSVRC2012_img_train."""


@lru_cache(maxsize=65536)
def split_of(folder: str) -> str | None:
    """Return the split that a folder's name says: "train", "val", "test" or None."""
    words = [word for word in re.findall("[a-z]+", folder.lower()) if word not in FILLERS]
    found = [split for split, names in SPLIT_NAMES.items() if words[:1] and words[0] in names]
    return found[0] if found and len(words) == 1 else None


def mentions_split(folder: str) -> bool:
    """Say whether a folder's name has a word that means a split: train, test1, my_val_pictures."""
    words = re.findall("[a-z]+", folder.lower())
    return any(word in names for names in SPLIT_NAMES.values() for word in words)


def split_named_in(name: str) -> str | None:
    """Return the one split that a name has a word for, among others: imagenet1k-train-0000.tar; None: none, or two."""
    words = re.findall("[a-z]+", name.lower())
    found = {split for split, names in SPLIT_NAMES.items() if not set(names).isdisjoint(words)}
    return found.pop() if len(found) == 1 else None


def with_validation(source: OpenedSource, fraction: float, seed: int) -> OpenedSource:
    """Return a source whose split val is `fraction` of each class of train; a val that it has already becomes test.

    Raises:
        UserError: it has both val and test, or no images to draw from.
    """
    splits = source.splits
    if "val" in splits and "test" in splits:
        raise UserError(
            f"{source.origin} has a validation and a test split already",
            expected="a validation fraction where one of them is missing",
            found=f"splits {', '.join(splits)} and a fraction of {fraction:g}",
            remedy="leave the fraction out",
        )
    train, val = split_off(splits["train"], fraction, seed)
    note = f"val is {fraction:.3g} of each training class: {pluralize(len(val), 'image')}, drawn with seed {seed}"
    rest = {"test": splits["val"]} if "val" in splits else {k: v for k, v in splits.items() if k == "test"}
    if "val" in splits:
        note += "; the source's own validation images are the split test"
    return replace(source, splits={"train": train, "val": val, **rest}, notes=(*source.notes, note))


def split_off(entries: list[Entry], fraction: float, seed: int = 0) -> tuple[list[Entry], list[Entry]]:
    """Move `fraction` of each class to a validation split; at least one image each, where the class has two.

    Which images go is decided by a keyed hash of their names (below the training folder), so that more files change
    little.
    """
    tops = {entry.name.partition("/")[0] for entry in entries}
    folder = tops.pop() + "/" if len(tops) == 1 and mentions_split(next(iter(tops))) else ""
    by_class: dict[int, list[Entry]] = {}
    for entry in entries:
        by_class.setdefault(entry.label, []).append(entry)
    chosen: set[str] = set()
    for images in by_class.values():
        number = min(len(images) - 1, max(1, int(len(images) * fraction + 0.5)))
        ranked = sorted(images, key=lambda entry: _draw(entry.name.removeprefix(folder), seed))
        chosen.update(entry.name for entry in ranked[:number])
    return [e for e in entries if e.name not in chosen], [e for e in entries if e.name in chosen]


def _draw(name: str, seed: int) -> bytes:
    key = seed.to_bytes(8, "little") if seed else b""
    return hashlib.blake2b(name.encode(), digest_size=8, key=key).digest()
