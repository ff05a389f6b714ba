"""The files of a teacher cache: its manifest, the parts it is filled with, and the finished table."""

import json
import uuid
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.errors import DeitfastError, UserError
from pipelines.files import atomic_write, explain_os_error

FORMAT = 1
"""Version of the folder's layout."""
MANIFEST, TARGETS, PARTS = "manifest.json", "targets.npy", "parts"
ABSENT = 65535
"""Label of a target that is not there: nobody has asked for it yet, or the pass leaves its image out."""


@dataclass(frozen=True)
class TargetSpec:
    """What is kept of a teacher's answer."""

    kind: Literal["hard", "soft"]
    """hard: the label; soft: the largest logits and the log-sum-exp of all."""
    k: int = 0
    """Logits kept (soft)."""
    dtype: str = ""
    """float16 or float32, of those logits (soft)."""
    tau: float = 0.0
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
        """A line of a part: a target and whose it is."""
        return np.dtype([("view", "<u2"), ("sample", "<u4"), ("target", self.record)])


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    format: int
    targets: TargetSpec
    views: int
    """Views of each image."""
    samples: int
    """Images in the split."""
    targets_per_view: int
    """Targets that a complete view has; the other images belong to no full mixing group of their pass."""
    repeats: int
    """Views of a pass, which are drawn, asked for and written together."""
    identity: dict[str, Any]
    """Everything that a target depends on, under its full name; another value is another cache."""
    made_with: dict[str, Any]
    """Precision and libraries: a new value is worth a warning, not a new cache."""
    crc32: tuple[int, ...] = ()
    """CRC32 of each view's bytes in targets.npy; empty until the cache is complete."""

    @property
    def bytes(self) -> int:
        """Size of the complete targets in bytes."""
        return self.views * self.samples * self.targets.record.itemsize


def is_present(targets: np.ndarray) -> np.ndarray:
    """Return which targets, of a `TargetSpec.record`, were answered: bool of their shape."""
    return targets != ABSENT if targets.dtype.names is None else targets["label"][..., 0] != ABSENT


def is_cache(folder: Path) -> bool:
    """Whether there is a teacher cache in a folder."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest. Raises as `TeacherCache.open` does."""
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        digest = tree.pop("digest")
    except FileNotFoundError:
        raise UserError(
            f"there is no teacher cache in {folder}", expected="a folder that `deitfast teach` wrote"
        ) from None
    except (ValueError, AttributeError, KeyError) as error:
        raise damaged(path, "what `deitfast teach` writes", str(error)) from None
    if tree.get("format") != FORMAT:
        raise UserError(f"{path} has another format", expected=str(FORMAT), found=str(tree.get("format")))
    if digest != _digest(tree):
        raise damaged(path, f"digest {digest}", f"{_digest(tree)}: damaged or edited")
    return Manifest(**{**tree, "targets": TargetSpec(**tree["targets"]), "crc32": tuple(tree["crc32"])})


def require_same(folder: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a cache answers the questions that a run asks.

    Args:
        folder: the cache's.
        kept: its `Manifest.identity`.
        wanted: the run's; None where the run cannot know.

    Raises:
        UserError: some field differs; the message names every one with both values.
    """
    kept = json.loads(json.dumps(kept))  # tuples are lists in both
    wanted = json.loads(json.dumps(wanted))
    fields = [name for name in {**kept, **wanted} if wanted.get(name, "") is not None]
    differing = [name for name in fields if kept.get(name) != wanted.get(name)]
    if differing:
        raise UserError(
            f"the teacher cache {folder} was filled for another {', '.join(differing)}",
            expected=", ".join(f"{name} {wanted.get(name)!r}" for name in differing),
            found=", ".join(f"{name} {kept.get(name)!r}" for name in differing) + " in the cache",
            remedy="fill a new one with `deitfast teach`, or give --cache a new folder",
        )


def writing_cache(folder: Path) -> AbstractContextManager[None]:
    """Turn a full or read-only disk into a DeitfastError that names the cache."""
    remedy = "free some space, or check the rights, and start the same command again: what is written is kept"
    return explain_os_error(f"the teacher cache {folder}", remedy)


def _digest(tree: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(tree, sort_keys=True).encode()):08x}"


def publish(folder: Path, manifest: Manifest) -> None:
    """Put a manifest in place, on the disk."""
    tree = json.loads(json.dumps(asdict(manifest)))
    with atomic_write(folder / MANIFEST) as file:
        file.write((json.dumps({**tree, "digest": _digest(tree)}, indent=1) + "\n").encode())


def open_table(folder: Path, manifest: Manifest) -> np.ndarray:
    """Return targets.npy, `record` [views, samples], mapped and of the right shape.

    Raises:
        DeitfastError: it is not what the manifest says, or cut short.
    """
    path = folder / TARGETS
    try:
        table = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:  # EOFError: it is empty
        raise damaged(path, f"{manifest.views} x {manifest.samples} targets", str(error)) from None
    expected = ((manifest.views, manifest.samples), manifest.targets.record)
    if (table.shape, table.dtype) != expected:
        raise damaged(path, f"{expected[0]} of {expected[1]}", f"{table.shape} of {table.dtype}")
    return table


def parts(folder: Path) -> list[tuple[Path, int]]:
    """Return the parts in the order of their names, each with the first view of its pass."""
    return [(path, int(path.name.partition("-")[0])) for path in sorted((folder / PARTS).glob("*.part"))]


def write_part(folder: Path, first: int, entries: np.ndarray) -> None:
    """Write `entry` [n], of views of the pass that begins with view `first`, as a new part."""
    data = BytesIO()
    np.save(data, entries)
    content = data.getvalue()
    with atomic_write(folder / PARTS / f"{first:05d}-{uuid.uuid4().hex}.part") as file:
        file.write(content + zlib.crc32(content).to_bytes(4, "little"))


def read_part(path: Path, manifest: Manifest) -> np.ndarray:
    """Return a part's `entry` [n].

    Raises:
        DeitfastError: it is damaged, or belongs to a cache of another shape.
    """
    content = path.read_bytes()
    expected, found = int.from_bytes(content[-4:], "little"), zlib.crc32(content[:-4])
    if len(content) < 4 or expected != found:
        raise damaged(path, f"CRC32 {expected:08x}", f"{found:08x}", "delete it and `deitfast teach` again")
    entries = np.load(BytesIO(content[:-4]))
    spec = manifest.targets
    if entries.dtype != spec.entry or (entries["view"] >= manifest.views).any():
        raise damaged(
            path, f"targets of {manifest.views} views", "another cache's", "delete it, `deitfast teach` again"
        )
    if (entries["sample"] >= manifest.samples).any():
        raise damaged(path, f"targets of {manifest.samples} images", "another cache's", "delete it")
    return entries


def damaged(path: Path, expected: str, found: str, remedy: str = "delete the cache and fill it again") -> DeitfastError:
    """Return the error for a file that is not what was written."""
    return DeitfastError(f"{path}: damaged, or another cache's", expected=expected, found=found, remedy=remedy)
