"""The files of a teacher cache: the manifest, the parts that it is filled with, and the finished table.

Everything is checked where it is read: a damaged or edited file is a DeitfastError that names it.
"""

import json
import re
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.lib import format as npy
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from pipelines.errors import DeitfastError, UserError
from pipelines.files import atomic_write, explain_os_error, os_remedy

FORMAT = 2
"""Version of the folder's layout and of the manifest's keys."""
MANIFEST, TARGETS, PARTS = "manifest.json", "targets.npy", "parts"
PART_NAME = re.compile(r"(\d{5})-[0-9a-f]{32}\.part")
"""A part's file name: the first view of its pass, and a number of its own."""
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


def is_present(targets: np.ndarray) -> np.ndarray:
    """Return which targets, of dtype `TargetSpec.record`, are there: bool of their shape."""
    return _labels(targets, 0) != ABSENT


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


def table_header(manifest: Manifest) -> bytes:
    """Return the header of targets.npy: .npy format 1.0, `record` [views, samples], as numpy 2 pads it.

    It is written here and not by numpy, so that a file can be compared with it to the byte and nothing of it parsed.
    """
    shape, descr = (manifest.views, manifest.samples), npy.dtype_to_descr(manifest.targets.record)
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (21 - len(str(manifest.views)))
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def check_table(folder: Path, manifest: Manifest) -> None:
    """Check the header and the size of targets.npy. Raises DeitfastError."""
    path, header = folder / TARGETS, table_header(manifest)
    try:
        with explain_read_error(path), path.open("rb") as file:
            found, size = file.read(len(header)), path.stat().st_size
    except FileNotFoundError:
        raise damaged(path, "the targets of a complete cache", "no file") from None
    if found != header:
        raise damaged(path, f"a header of {manifest.views} x {manifest.samples} targets", "another one")
    if size != len(header) + manifest.bytes:
        raise damaged(path, f"{len(header) + manifest.bytes:,} bytes", f"{size:,}")


def read_table(folder: Path, manifest: Manifest, first: int) -> np.ndarray:
    """Return the pass that begins with view `first` out of targets.npy: `record` [repeats, samples].

    It is read, not mapped: a file that is cut while it is mapped kills the process.

    Raises:
        DeitfastError: what is read is not what was written; the message names file and view.
    """
    check_table(folder, manifest)
    path, shape = folder / TARGETS, (manifest.repeats, manifest.samples)
    row, start = manifest.bytes // manifest.views, len(table_header(manifest))
    with explain_read_error(path):
        rows = np.fromfile(path, manifest.targets.record, shape[0] * shape[1], offset=start + first * row)
    if rows.size != shape[0] * shape[1]:
        raise damaged(path, f"{manifest.repeats} views from view {first}", "it ends before")
    rows = rows.reshape(shape)
    for view, targets in enumerate(rows, first):
        expected, found = manifest.crc32[view], zlib.crc32(targets.data)
        if found != expected:
            raise damaged(path, f"CRC32 {expected:08x} of view {view}", f"{found:08x}")
    _check_labels(path, rows, manifest)
    return rows


def write_table(folder: Path, manifest: Manifest, passes: Iterator[np.ndarray]) -> tuple[int, ...]:
    """Write targets.npy, pass by pass, and return each view's CRC32."""
    crc32 = list[int]()
    with atomic_write(folder / TARGETS) as file:
        file.write(table_header(manifest))
        for rows in passes:
            crc32 += [zlib.crc32(row.data) for row in rows]
            file.write(rows.data)
    return tuple(crc32)


def first_views(folder: Path) -> set[int]:
    """Return the first views of those passes that have parts."""
    return {int(match[1]) for path in (folder / PARTS).glob("*.part") if (match := PART_NAME.fullmatch(path.name))}


def write_part(folder: Path, manifest: Manifest, first: int, entries: np.ndarray) -> None:
    """Write `TargetSpec.entry` [n], of views of the pass that begins with view `first`, as a new part.

    A part is the entries' bytes and, in 4 more, the CRC32 of their dtype and of them.
    """
    with atomic_write(folder / PARTS / f"{first:05d}-{uuid.uuid4().hex}.part") as file:
        content = entries.tobytes()
        file.write(content + _part_crc32(content, manifest).to_bytes(4, "little"))


def read_parts(folder: Path, manifest: Manifest, first: int) -> np.ndarray:
    """Return what the parts have of the pass that begins with view `first`: `record` [repeats, samples].

    Raises:
        FileNotFoundError: a part was removed meanwhile.
        DeitfastError: a part is damaged, or belongs to another cache.
    """
    with explain_read_error(folder / PARTS):
        rows = np.zeros((manifest.repeats, manifest.samples), manifest.targets.record)
        _labels(rows)[:] = ABSENT
        for path in sorted((folder / PARTS).glob(f"{first:05d}-*.part")):
            if PART_NAME.fullmatch(path.name):
                entries = _read_part(path, manifest, first)
                rows[entries["view"] - first, entries["sample"]] = entries["target"]
    return rows


def _read_part(path: Path, manifest: Manifest, first: int) -> np.ndarray:
    """Return a part's `TargetSpec.entry` [n]; raises as `read_parts`."""
    with explain_read_error(path):
        content = path.read_bytes()
    content, stored = content[:-4], int.from_bytes(content[-4:], "little")
    remedy = "delete this file and run `deitfast teach` again: it fills what is missing"
    entry = manifest.targets.entry
    if len(content) % entry.itemsize or stored != _part_crc32(content, manifest):
        raise damaged(path, f"CRC32 {stored:08x}", f"{_part_crc32(content, manifest):08x}", remedy)
    entries = np.frombuffer(content, entry)
    views, last = entries["view"], first + manifest.repeats - 1
    if ((views < first) | (views > last)).any() or (entries["sample"] >= manifest.samples).any():
        expected = f"targets of views {first} to {last} of {manifest.samples} images"
        raise damaged(path, expected, "those of other views or images", remedy)
    _check_labels(path, entries["target"], manifest)
    return entries


def _part_crc32(content: bytes, manifest: Manifest) -> int:
    return zlib.crc32(content, zlib.crc32(repr(manifest.targets.entry.descr).encode()))


def _labels(targets: np.ndarray, k: int | None = None) -> np.ndarray:
    """Return the labels of targets of dtype `record`, as a view; of soft ones all k or the one of index `k`."""
    if targets.dtype.names is None:
        return targets
    return targets["label"] if k is None else targets["label"][..., k]


def _check_labels(path: Path, targets: np.ndarray, manifest: Manifest) -> None:
    labels = _labels(targets)
    if ((labels >= manifest.classes) & (labels != ABSENT)).any():
        raise damaged(path, f"labels below {manifest.classes}", f"{labels[labels != ABSENT].max()}")


def damaged(path: Path, expected: str, found: str, remedy: str = REFILL) -> DeitfastError:
    """Return the error for a file that is not what was written."""
    return DeitfastError(f"{path}: damaged, or another cache's", expected=expected, found=found, remedy=remedy)
