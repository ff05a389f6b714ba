"""Open any source of images by its kind."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from pipelines.choices import SourceKind
from pipelines.errors import DeitfastError, UserError
from pipelines.storage.sources.cifar import open_cifar
from pipelines.storage.sources.converted import open_dataset
from pipelines.storage.sources.demo import open_demo
from pipelines.storage.sources.huggingface import open_huggingface
from pipelines.storage.sources.image_folder import open_folder
from pipelines.storage.sources.imagenet import open_imagenet
from pipelines.storage.sources.labeled_folder import open_labeled_folder
from pipelines.storage.sources.members import printable
from pipelines.storage.sources.opened_source import ListingProgress, OpenedSource, Workspace
from pipelines.storage.sources.splits import with_validation
from pipelines.storage.sources.webdataset import open_webdataset

KINDS: tuple[str, ...] = get_args(SourceKind)


def open_source(
    kind: str,
    path: Path | None,
    *,
    val_fraction: float = 0.0,
    val_seed: int = 0,
    coarse: bool = False,
    labels: Sequence[Path] = (),
    scratch: Path | None = None,
    progress: ListingProgress | None = None,
) -> OpenedSource:
    """Find the classes and images of a source. Nothing is decoded; images are read later, one by one.

    Args:
        kind: one of KINDS.
        path: the folder or archive; None for demo, which draws its own.
        val_fraction: share of each training class that becomes the validation split; the source's own one, if any,
            is then the split test. 0: the splits are the source's.
        val_seed: another seed draws other images.
        coarse: CIFAR-100's 20 coarse labels instead of the 100 fine ones.
        labels: tables that say the class of each image of a folder; none: its class folders do.
        scratch: output of the conversion, never part of the source, and folder for what compressed archives must be
            unpacked to: their unpacked size, for CIFAR's python archives 3 KB an image, Hugging Face's images. None:
            the system's temporary folder. `close()` of the source deletes it again.
        progress: told what is being listed, indexed or unpacked, and how far that is.

    Raises:
        UserError: there is no such source at `path`, or it is not complete.
        DeitfastError: it is damaged or cannot be read.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(
            "the validation fraction is a share of the images", expected="0 to 1", found=f"{val_fraction:g}"
        )
    if path is None and kind in KINDS and kind != "demo":
        raise UserError(f"{kind} needs a folder or an archive to read", remedy="name it after the kind")
    if val_seed < 0:
        raise UserError("the seed of the validation split is negative", expected="0 or more", found=str(val_seed))
    if coarse and kind != "cifar100":
        raise UserError(f"{kind} has no coarse labels", expected="convert cifar100 --coarse")
    if labels and kind != "folder":
        raise UserError(f"{kind} has its own labels", expected="convert folder --labels FILE")
    workspace = Workspace(scratch, progress or (lambda what, done, total: None))
    try:
        source = _open(kind, path or Path(), workspace, coarse, labels)
        if val_fraction:
            source = with_validation(source, val_fraction, val_seed)
    except OSError as error:
        workspace.close()
        raise DeitfastError(f"{printable(path or '')} cannot be read: {error}") from None
    except BaseException:
        workspace.close()
        raise
    if "val" not in source.splits:
        source = replace(source, notes=(*source.notes, "there is no validation split; --val-fraction .1 makes one"))
    return source


def _open(kind: str, path: Path, workspace: Workspace, coarse: bool, labels: Sequence[Path]) -> OpenedSource:
    match kind:
        case "imagenet":
            return open_imagenet(path, workspace)
        case "cifar10" | "cifar100":
            return open_cifar(kind, path, workspace, coarse=coarse)
        case "folder":
            return open_labeled_folder(path, labels, workspace) if labels else open_folder(path, workspace)
        case "wds":
            return open_webdataset(path, workspace)
        case "huggingface":
            return open_huggingface(path, workspace)
        case "demo":
            return open_demo()
        case "dataset":
            return open_dataset(path)
        case _:
            raise UserError(f"there is no kind of source called {kind}", expected=", ".join(KINDS))
