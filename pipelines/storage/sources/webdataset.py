"""WebDataset shards: tars in which an image and its class have names that differ in the ending; the kind `wds`.

000017.jpg with 000017.cls (a class number or name) or 000017.json (with "label"), as the webdataset library and data
sets of Hugging Face's have them. A text beside the shards may name the numbers.
"""

import json
import posixpath
from collections.abc import Mapping
from pathlib import Path

from pipelines.errors import DeitfastError, pluralize
from pipelines.storage.sources.image_folder import IMAGE_SUFFIXES
from pipelines.storage.sources.listing import list_tar
from pipelines.storage.sources.members import Extent, FileLocator, Listing, printable
from pipelines.storage.sources.opened_source import OpenedSource, Workspace
from pipelines.storage.sources.sharded import ShardedImages, list_shards, split_of_shard

NAMES = ("classes.txt", "classnames.txt")
"""Texts with the name of class 0, 1, ... in each line."""
LABEL_KEYS = ("label", "cls", "class")
"""What a sample's JSON calls its class, in order of preference."""
EXPECTED = "tars that hold KEY.jpg (or another image) with KEY.cls or KEY.json"


def open_webdataset(path: Path, workspace: Workspace) -> OpenedSource:
    """Open a folder of shards, or one shard; a folder's or a shard's name says its split, else it is train.

    Raises:
        UserError: there are no shards or no training images, or an image's class is not said.
        DeitfastError: a shard is damaged.
    """
    listing = list_shards(path, workspace)
    shards = {name: where for name, where in listing.files.items() if name.endswith(".tar") or path.is_file()}
    images = ShardedImages(_class_names(listing))
    for number, (shard, where) in enumerate(shards.items()):
        workspace.progress("listing shards", number, len(shards))
        assert isinstance(where, Extent)  # of a folder's file
        samples = _samples(list_tar(where, path / shard if path.is_dir() else path, workspace))
        for image, (locator, label) in samples.items():
            images.add(split_of_shard(shard), label, f"{shard}/{image}", locator)
    return images.source("wds", path, pluralize(len(shards), "shard"), workspace.unpacked, EXPECTED)


def _class_names(listing: Listing) -> list[str]:
    """Return the lines of the text beside the shards that names the classes; none: there is no such text."""
    found = listing.named(*NAMES)
    return listing.files[found[0]].read().decode("utf-8", "replace").splitlines() if found else []


def _samples(shard: Listing) -> dict[str, tuple[FileLocator, str | None]]:
    """Return a shard's images by name, each with what it says of its class: a number without leading zeros, or a name.

    A sample's files share the part of their name before the first dot behind the last slash.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in shard.files:
        folder, base = posixpath.split(name)
        stem, _, ending = base.partition(".")
        groups.setdefault(posixpath.join(folder, stem), {})[ending.lower()] = name
    samples = {}
    for files in groups.values():
        image = next((name for name in files.values() if name.lower().endswith(IMAGE_SUFFIXES)), None)
        if image:
            samples[image] = shard.files[image], _label(files, shard)
    return samples


def _label(files: Mapping[str, str], shard: Listing) -> str | None:
    """Return what a sample's files say of its class; None: nothing.

    Raises:
        DeitfastError: what they say cannot be read.
    """
    try:
        if "cls" in files:
            text = shard.files[files["cls"]].read().decode().strip()
        elif "json" in files:
            tree = json.loads(shard.files[files["json"]].read())
            values = [tree[key] for key in LABEL_KEYS if key in tree] if isinstance(tree, dict) else []
            text = str(values[0]) if values and isinstance(values[0], int | str) else ""
        else:
            text = ""
    except (ValueError, RecursionError) as error:
        name = files.get("cls") or files["json"]
        raise DeitfastError(
            f"{printable(shard.origin)}: {printable(name)} says no class",
            expected="a number or a name",
            found=str(error),
        ) from None
    return printable(str(int(text)) if text.isdecimal() else text) or None
