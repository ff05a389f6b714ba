"""Images whose classes are not in their folders' names but in label tables; the kind `folder` with `--labels`."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import UserError, pluralize
from pipelines.storage.sources.image_folder import Part, assemble, besides, read_tree
from pipelines.storage.sources.label_table import class_order, match, open_table
from pipelines.storage.sources.listing import list_files
from pipelines.storage.sources.members import printable
from pipelines.storage.sources.opened_source import OpenedSource, Workspace
from pipelines.storage.sources.splits import SPLIT_NAMES


def open_labeled_folder(path: Path, labels: Sequence[Path], workspace: Workspace) -> OpenedSource:
    """Open a folder, tar or zip of images that tables sort into classes and splits.

    Args:
        path: the folder or archive.
        labels: the tables, on the disk or in the source.
        workspace: for what must be unpacked.

    Raises:
        UserError: a table that cannot be read, names images that are not there, or has none to train on.
    """
    listing = list_files(path, workspace)
    tables = [open_table(table, listing) for table in labels]
    for table in tables:
        listing.files.pop(table.inside or "", None)
    tree = read_tree(listing, root="")
    names = ", ".join(table.name for table in tables)
    parts = {split: Part(split) for split in SPLIT_NAMES}
    for found in match(tables, tree.images, listing.origin):
        images = parts[found.split].classes.setdefault(found.label, {})
        images[printable(found.image)] = tree.images[found.image]
    parts = {split: part for split, part in parts.items() if part.num_images}
    if "train" not in parts:
        raise UserError(f"{names}: no images to train on", found=f"splits {', '.join(parts)}")
    classes, splits, notes = assemble(listing.origin, parts, order=class_order)
    counts = " + ".join(f"{len(entries):,} {split}" for split, entries in splits.items())
    unused = len(tree.images) - sum(part.num_images for part in parts.values())
    without = [f"{pluralize(unused, 'image')} without a row left out"] if unused else []
    notes = (f"{names}: {pluralize(len(classes), 'class')}, {counts} images", *without, *notes, *besides(tree))
    return OpenedSource("folder", str(listing.origin), classes, splits, (*notes, *listing.notes), workspace.unpacked)
