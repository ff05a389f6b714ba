"""Open any source of images by its kind."""

from pathlib import Path
from typing import get_args

from pipelines.choices import SourceKind
from pipelines.errors import DeitfastError, UserError
from pipelines.storage.sources.cifar import open_cifar
from pipelines.storage.sources.converted import open_dataset
from pipelines.storage.sources.demo import open_demo
from pipelines.storage.sources.image_folder import open_folder
from pipelines.storage.sources.imagenet import open_imagenet
from pipelines.storage.sources.listing import printable
from pipelines.storage.sources.opened_source import OpenedSource, Progress, Workspace

KINDS: tuple[str, ...] = get_args(SourceKind)


def open_source(
    kind: str,
    path: Path | None,
    *,
    val_fraction: float = 0.0,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> OpenedSource:
    """Find the classes and images of a source. Nothing is decoded; images are read later, one by one.

    Args:
        kind: one of KINDS.
        path: the folder or archive; None for demo, which draws its own.
        val_fraction: share of each class that becomes the validation split of a source that has none.
        scratch: folder for what compressed archives must be unpacked to: their unpacked size, and for CIFAR's python
            archives 3 KB an image. None: the system's temporary folder. `close()` of the source deletes it again.
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
    place = path or Path()
    workspace = Workspace(scratch, progress or (lambda what, done, total: None))
    try:
        match kind:
            case "imagenet":
                return open_imagenet(place, workspace, val_fraction)
            case "cifar10" | "cifar100":
                return open_cifar(kind, place, workspace, val_fraction)
            case "folder":
                return open_folder(place, workspace, val_fraction)
            case "demo":
                return open_demo(val_fraction=val_fraction)
            case "dataset":
                return open_dataset(place, val_fraction)
            case _:
                raise UserError(f"there is no kind of source called {kind}", expected=", ".join(KINDS))
    except OSError as error:
        workspace.close()
        raise DeitfastError(f"{printable(place)} cannot be read: {error}") from None
    except BaseException:
        workspace.close()
        raise
