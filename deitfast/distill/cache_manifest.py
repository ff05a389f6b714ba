"""A teacher cache's manifest: what its targets are and depend on; and the errors that its files have in common."""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from pipelines.errors import DeitfastError, UserError
from pipelines.files import atomic_write, explain_os_error, os_remedy

FORMAT = 2
"""Version of the folder's layout and of the manifest's keys."""
MANIFEST = "manifest.json"
ABSENT = 65535
"""Label of a target that is not there: not computed yet, or its image belongs to no mixing group of the pass."""
MOST_VIEWS, MOST_SAMPLES = 2**16 - 1, 2**32 - 1
REFILL = "delete the cache's folder and fill it again with `deitfast teach`"


@dataclass(frozen=True)
class TargetSpec:
    """What is stored of a teacher's logits."""

    kind: Literal["hard", "soft"]
    """hard: the label; soft: the largest logits and the log-sum-exp of all."""
    k: Annotated[int, Field(ge=0, lt=ABSENT)] = 0
    """Logits stored (soft)."""
    dtype: Literal["", "float16", "float32"] = ""
    """Of those logits (soft)."""
    tau: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Temperature that the second log-sum-exp is taken at (soft)."""

    @property
    def record(self) -> np.dtype:
        """One target: a label; or `label` [k], `logit` [k], and log(sum(exp(z))): `lse` of z, `lse_tau` of z / tau."""
        if self.kind == "hard":
            return np.dtype("<u2")
        logit = np.dtype(self.dtype).newbyteorder("<")
        return np.dtype([("label", "<u2", self.k), ("logit", logit, self.k), ("lse", "<f4"), ("lse_tau", "<f4")])

    @property
    def entry(self) -> np.dtype:
        """One entry of a part: a target with the view and sample that it belongs to."""
        return np.dtype([("view", "<u2"), ("sample", "<u4"), ("target", self.record)])


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    format: int
    targets: TargetSpec
    classes: Annotated[int, Field(ge=1, lt=ABSENT)]
    """Classes of the data set."""
    views: Annotated[int, Field(ge=1, le=MOST_VIEWS)]
    """Views of each image; a multiple of `repeats`."""
    samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
    """Images in the split."""
    targets_per_view: Annotated[int, Field(ge=0, le=MOST_SAMPLES)]
    """Targets that a complete view has; the other images belong to no full mixing group of their pass."""
    repeats: Annotated[int, Field(ge=1, le=MOST_VIEWS)]
    """Views of a pass (`augment.repeats`), which are drawn, read and written together."""
    identity: dict[str, Any]
    """Everything that a target depends on, by its full name; with any other value it is another cache."""
    made_with: dict[str, Any]
    """Precision and libraries: another value is worth a warning, not a new cache."""
    crc32: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = ()
    """CRC32 of each view's bytes in targets.npy; empty until the cache is complete."""

    @property
    def bytes(self) -> int:
        """Size of the complete targets in bytes."""
        return self.views * self.samples * self.targets.record.itemsize

    @property
    def total(self) -> int:
        """Targets of a complete cache."""
        return self.views * self.targets_per_view


SCHEMA = TypeAdapter(Manifest)


def is_cache(folder: Path) -> bool:
    """Whether there is a teacher cache in a folder."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read and check a cache's manifest.

    Raises:
        UserError: there is none, or it is of another format.
        DeitfastError: it is damaged or was edited.
    """
    path = folder / MANIFEST
    try:
        with explain_read_error(path):
            content = path.read_bytes()
    except FileNotFoundError:
        expected = "a folder that `deitfast teach` wrote"
        raise UserError(f"there is no teacher cache in {folder}", expected=expected) from None
    try:
        tree = from_json(content)
        found = tree.get("format")
        if found != FORMAT:
            raise UserError(
                f"{path} is a teacher cache of another version of deitfast",
                expected=f"format {FORMAT}",
                found=f"format {found}",
                remedy=REFILL,
            )
        digest = tree.pop("digest")
        manifest = SCHEMA.validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(path, "valid fields", f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, AttributeError, KeyError) as error:
        raise damaged(path, "the JSON that `deitfast teach` writes", str(error)) from None
    if digest != _digest(tree):
        raise damaged(path, f"digest {digest}", f"{_digest(tree)}: damaged or edited")
    if problem := _inconsistency(manifest):
        raise damaged(path, "fields that fit each other", problem)
    return manifest


def _inconsistency(manifest: Manifest) -> str:
    """Return how fields contradict each other, "" where they do not."""
    spec = manifest.targets
    if spec.kind == "soft" and not (1 <= spec.k <= manifest.classes and spec.dtype and spec.tau):
        return f"soft targets of {spec.k} logits of {manifest.classes} classes, dtype {spec.dtype!r}, tau {spec.tau}"
    if manifest.views % manifest.repeats:
        return f"{manifest.views} views in passes of {manifest.repeats}"
    if manifest.targets_per_view > manifest.samples:
        return f"{manifest.targets_per_view} targets for a view of {manifest.samples} images"
    if len(manifest.crc32) not in (0, manifest.views):
        return f"{len(manifest.crc32)} CRC32 of {manifest.views} views"
    return ""


def require_same(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a cache's targets are those that a run needs.

    Args:
        folder: the cache's.
        stored: its `Manifest.identity`.
        wanted: the run's; None where the run cannot know.

    Raises:
        UserError: some field differs; the message names every one with both values.
    """
    stored = json.loads(json.dumps(stored))  # tuples are lists in both
    wanted = json.loads(json.dumps(wanted))
    fields = [name for name in {**stored, **wanted} if wanted.get(name, "") is not None]
    differing = [name for name in fields if stored.get(name) != wanted.get(name)]
    if differing:
        raise UserError(
            f"the teacher cache {folder} was filled for another {', '.join(differing)}",
            expected=", ".join(f"{name} {wanted.get(name)!r}" for name in differing),
            found=", ".join(f"{name} {stored.get(name)!r}" for name in differing) + " in the cache",
            remedy="fill a new one with `deitfast teach`, or give --cache a new folder",
        )


@contextmanager
def explain_write_error(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a DeitfastError that names the cache."""
    remedy = "free some space, or check the rights, and start the same command again: what is written is kept"
    with explain_os_error(f"the teacher cache {folder}", remedy):
        yield


@contextmanager
def explain_read_error(path: Path) -> Iterator[None]:
    """Turn a file that cannot be read, or that memory is too small for, into a DeitfastError that names it.

    Raises:
        FileNotFoundError: it is not there.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        remedy = os_remedy(error, "check the rights and the disk it is on")
        raise DeitfastError(f"cannot read {path}", found=str(error), remedy=remedy) from error
    except MemoryError as error:
        found, remedy = str(error) or "none is free", "end other programs, or use a machine with more memory"
        raise DeitfastError(f"not enough memory to read {path}", found=found, remedy=remedy) from error


def _digest(tree: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(tree, sort_keys=True).encode()):08x}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest in place, on the disk."""
    tree = json.loads(json.dumps(asdict(manifest)))
    with atomic_write(folder / MANIFEST) as file:
        file.write((json.dumps({**tree, "digest": _digest(tree)}, indent=1) + "\n").encode())


def damaged(path: Path, expected: str, found: str, remedy: str = REFILL) -> DeitfastError:
    """Return the error for a file that is not what was written."""
    return DeitfastError(f"{path}: damaged, or another cache's", expected=expected, found=found, remedy=remedy)
