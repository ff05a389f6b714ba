"""What sources made of many files of labeled images share: classes by number or name, splits by the files' names."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import UserError, pluralize
from pipelines.storage.sources.image_folder import Part, assemble
from pipelines.storage.sources.label_table import class_order
from pipelines.storage.sources.listing import list_files
from pipelines.storage.sources.members import Extent, FileLocator, Listing, printable
from pipelines.storage.sources.opened_source import OpenedSource, Workspace
from pipelines.storage.sources.splits import SPLIT_NAMES, split_named_in


def list_shards(path: Path, workspace: Workspace) -> Listing:
    """List a folder's files; a file is the only one of its listing. Raises UserError where there is nothing."""
    if path.is_file():
        return Listing(path, {path.name: Extent(str(path), 0, path.stat().st_size)})
    return list_files(path, workspace)


def split_of_shard(name: str) -> str | None:
    """Return the split that a shard's name says, or the nearest of its folders: train-0000.tar, test/0.tar."""
    return next((split for part in reversed(name.split("/")) if (split := split_named_in(part))), None)


class ShardedImages:
    """Collects images with their classes and splits, and makes a source of them."""

    def __init__(self, class_names: Sequence[str]) -> None:
        """Begin with the names of class 0, 1, ...; none where a name is empty or there twice, as ImageNet's crane."""
        names = [printable(name.strip()) for name in class_names]
        unique = all(names) and len(set(names)) == len(names)
        self._names = {str(number): name for number, name in enumerate(names)} if unique else {}
        self._parts = {split: Part(split) for split in SPLIT_NAMES}
        self.num_unlabeled = 0
        """Images of no class, which are left out."""

    def add(self, split: str | None, label: str | None, name: str, locator: FileLocator) -> None:
        """Add an image.

        Args:
            split: train, val or test; None: train.
            label: a class's number or name; None: the image has none and is left out.
            name: its own, not yet taken.
            locator: where it lies.
        """
        if label is None:
            self.num_unlabeled += 1
        else:
            images = self._parts[split or "train"].classes.setdefault(self._names.get(label, label), {})
            images[printable(name)] = locator

    def source(self, kind: str, path: Path, shards: str, unpacked: str, expected: str) -> OpenedSource:
        """Return the source, its classes in the order of their numbers, else of their names.

        Args:
            kind: of the source.
            path: where it lies.
            shards: how many files of what there are, for messages.
            unpacked: the workspace's private folder.
            expected: what should lie there.

        Raises:
            UserError: there are no images to train on, or another split has other classes.
        """
        if not self._parts["train"].num_images:
            found = f"{shards} with {pluralize(self.num_unlabeled, 'image')} of no class"
            raise UserError(f"{printable(path)} has no images to train on", expected=expected, found=found)
        order = {name: place for place, name in enumerate(self._names.values())}
        classes, splits, notes = assemble(
            path,
            {split: part for split, part in self._parts.items() if split == "train" or part.num_images},
            order=lambda name: (order.get(name, len(order)), *class_order(name)),
        )
        counts = " + ".join(f"{len(entries):,} {split}" for split, entries in splits.items())
        found = f"{shards}: {pluralize(len(classes), 'class')}, {counts} images"
        without = [f"{pluralize(self.num_unlabeled, 'image')} without a class left out"] if self.num_unlabeled else []
        return OpenedSource(kind, str(path), classes, splits, (found, *without, *notes), unpacked)
