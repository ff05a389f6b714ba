"""ImageNet-1k: the official tars, an extracted tree, or some of each. Classes are the sorted wnids."""

import posixpath
import re
from pathlib import Path

from pipelines.errors import UserError, pluralize
from pipelines.storage.sources.image_folder import Images, Part, Tree, assemble, other_kind, read_tree, some
from pipelines.storage.sources.imagenet_labels import ACCEPTED, NUMBER, WNID, validation_labels
from pipelines.storage.sources.listing import list_files, list_tar
from pipelines.storage.sources.members import Extent, Listing, printable
from pipelines.storage.sources.opened_source import OpenedSource, Workspace
from pipelines.storage.sources.splits import SPLIT_NAMES

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
CLASS_TAR = re.compile(r"n\d{8}\.tar")
TRAIN_FOLDERS = (*SPLIT_NAMES["train"], "ilsvrc2012_img_train")
VAL_FOLDERS = ("val", "ilsvrc2012_img_val", "validation", "valid")
UNUSED = frozenset({"test", "ILSVRC2012_img_test", "Annotations", "ImageSets"})
"""Folders of Kaggle's download that hold half a million files of no use here."""
WNID_IN_NAME = re.compile(r"(?:^|_)(n\d{8})(?=[_.])")
"""ILSVRC2012_val_00000293_n01440764.JPEG, n01440764_10026.JPEG: some publish images side by side under such names."""


def open_imagenet(path: Path, workspace: Workspace) -> OpenedSource:
    """Open a folder with the official tars or the extracted tree, or one tar of either.

    The same images give the same order from tars and from a tree: training images by class and name, validation
    images by name.

    Raises:
        UserError: no training images, or validation images whose classes nothing tells.
        DeitfastError: an archive or a label file is damaged.
    """
    if path.name == TRAIN_TAR and path.is_file():
        path = path.parent  # the validation tar and the labels lie beside it
    packed = path.is_dir() and (path / TRAIN_TAR).exists()
    skip = UNUSED | {"train", "ILSVRC2012_img_train"} if packed else UNUSED
    listing = list_files(path, workspace, skip)
    tree = read_tree(listing)
    train = _train(tree, listing, workspace)
    if not train.num_images:
        outside = f", with {pluralize(len(tree.images), 'image')} in none of these" if tree.images else ""
        hint = "" if listing.named(VAL_TAR) else other_kind(listing)
        raise UserError(
            f"{printable(path)} holds no ImageNet training images",
            expected=f"{TRAIN_TAR}, or folders train/<wnid>/ such as train/n01440764/",
            found=_some_names(listing) + outside,
            remedy=hint or "give the folder they lie in as the source, or set IMAGENET_DIR",
        )
    val = _packed_val(listing, workspace) or _tree_val(tree)
    notes = list(listing.notes)
    if val is not None:
        val = _label(_named_classes(val), train, listing)
        if left_out := _leave_out_unknown(val, train):
            notes.append(
                f"{pluralize(left_out, 'validation image')} left out: their classes are not in the training set"
            )
    if train.loose:
        notes.append(f"{pluralize(len(train.loose), 'image')} outside {train.folder}/<wnid>/ left out")
    if tree.dangling:
        notes.append(f"links that lead nowhere are left out: {some(tree.dangling)}")
    if len(train.classes) != 1000:
        notes.append(f"{len(train.classes):,} of ImageNet's 1,000 classes are here")
    classes, splits, more = assemble(listing.origin, {"train": train} | ({"val": val} if val is not None else {}))
    if val is not None:
        splits["val"].sort(key=lambda entry: posixpath.basename(entry.name))
    return OpenedSource("imagenet", str(listing.origin), classes, splits, (*notes, *more), workspace.unpacked)


def _train(tree: Tree, listing: Listing, workspace: Workspace) -> Part:
    """Return the training images: of class tars, and of the folders of classes that were extracted already."""
    packed, extracted = _packed_train(listing, workspace), _tree_train(tree)
    if packed.classes and extracted is not None:
        return Part("train", extracted.classes | packed.classes, extracted.loose)
    return extracted or packed


def _packed_train(listing: Listing, workspace: Workspace) -> Part:
    """Return the images inside class tars, which lie in the training tar or by themselves; there may be none."""
    names = listing.named(TRAIN_TAR)
    outer = listing.files[names[0]] if names else None
    inner = list_tar(outer, Path(names[0]), workspace).files if isinstance(outer, Extent) else listing.files
    part = Part("train")
    for name, tar in inner.items():
        base = posixpath.basename(name)
        if CLASS_TAR.fullmatch(base) and isinstance(tar, Extent):
            images = read_tree(list_tar(tar, Path(base), workspace)).images
            wnid = base.removesuffix(".tar")
            part.classes[wnid] = {f"train/{wnid}/{printable(image)}": where for image, where in images.items()}
    return part


def _tree_train(tree: Tree) -> Part | None:
    """Return the train folder's class folders, or those at the top where they are wnids."""
    for part in tree.parts(TRAIN_FOLDERS):
        part = part if part.num_images else _named_classes(part)
        if part.num_images:
            return part
    classes = {name: images for name, images in tree.part("").classes.items() if WNID.fullmatch(name)}
    return Part("", classes) if classes else None


def _packed_val(listing: Listing, workspace: Workspace) -> Part | None:
    """Return the images of the validation tar, not yet labeled."""
    for name in listing.named(VAL_TAR):
        tar = listing.files[name]
        if isinstance(tar, Extent):
            images = read_tree(list_tar(tar, Path(name), workspace)).images
            return Part("val", loose={f"val/{posixpath.basename(image)}": where for image, where in images.items()})
    return None


def _tree_val(tree: Tree) -> Part | None:
    """Return the val folder: class folders, or images side by side that are not yet labeled."""
    return next((part for part in tree.parts(VAL_FOLDERS) if part.loose or any(part.classes.values())), None)


def _named_classes(part: Part) -> Part:
    """Return a part whose images outside class folders lie in the class that their own name tells, where it does."""
    classes, loose = {wnid: dict(images) for wnid, images in part.classes.items()}, Images()
    for name, where in part.loose.items():
        wnids = WNID_IN_NAME.findall(posixpath.basename(name))
        (classes.setdefault(wnids[-1], {}) if wnids else loose)[name] = where
    return Part(part.folder, classes, loose)


def _label(val: Part, train: Part, listing: Listing) -> Part:
    """Return the validation images, those that lie side by side in the classes that a label file gives them."""
    if not val.loose:
        return val
    labels = validation_labels(listing, sorted(train.classes))
    classes = {wnid: dict(images) for wnid, images in val.classes.items()}
    for name, where in val.loose.items():
        number = NUMBER.search(posixpath.basename(name))
        wnid = labels.get(int(number[1])) if number else None
        if wnid is None:
            raise UserError(
                f"validation image {name} has no label",
                expected=f"names such as ILSVRC2012_val_00000001.JPEG, numbered 1 to {max(labels):,} as the labels are",
                remedy=f"check that the label file is complete ({ACCEPTED})",
            )
        classes.setdefault(wnid, {})[name] = where
    return Part(val.folder, classes)


def _leave_out_unknown(val: Part, train: Part) -> int:
    """Drop validation images of classes that a partial training set lacks; return how many.

    Raises:
        UserError: that would be all of them.
    """
    before, classes = val.num_images, sorted(val.classes)
    val.classes = {wnid: images for wnid, images in val.classes.items() if wnid in train.classes}
    if not val.num_images:
        raise UserError(
            f"{val.folder}/ has images of no class that the training images have",
            expected="folders of wnids, or images side by side and a file of their labels",
            found=some(classes),
            remedy="sort them so, or take them away to go on without",
        )
    return before - val.num_images


def _some_names(listing: Listing) -> str:
    tops = sorted({name.split("/", 1)[0] for name in listing.files} | {n for n in listing.folders if "/" not in n})
    return ", ".join(map(printable, tops[:6])) + (", ..." if len(tops) > 6 else "") if tops else "an empty folder"
