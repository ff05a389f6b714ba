"""One dataset, one folder: `dataset.json` beside a .beton file, or a .wds folder of shards, for each split."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pipelines.errors import DeitfastError, UserError
from pipelines.files import atomic_write
from pipelines.spec import DatasetSpec, SplitSpec
from pipelines.storage.formats.beton import BetonReader
from pipelines.storage.formats.wds_reader import ShardReader
from pipelines.storage.reader import Reader

FORMAT = 2
"""Version of dataset.json that this program writes and reads."""
SPEC_FILE = "dataset.json"
MOST_CLASSES = 2**20

CONTENT = np.dtype([("label", "<i8"), ("height", "<i4"), ("width", "<i4"), ("mode", "u1"), ("crc32", "<u4")])


class Dataset:
    """A converted dataset, opened for reading.

    Args:
        path: the folder of dataset.json, or a .beton of FFCV's alone.
        spec: what it says.
    """

    def __init__(self, path: Path, spec: DatasetSpec) -> None:
        self.path = path
        self.folder = path.parent if path.is_file() else path
        self.spec = spec
        self._readers: dict[str, Reader] = {}

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open the dataset in `folder`; its files are opened by `split`.

        What FFCV itself wrote can be opened as well: a folder with train.beton and no dataset.json, or such a file
        alone, as the split train. Its classes are numbers, and nothing of it can be compared with a CRC32.

        Raises:
            UserError: there is no dataset here, or one of another version.
            DeitfastError: dataset.json is damaged.
        """
        return cls(Path(folder), read_spec(Path(folder)))

    def split(self, name: str) -> Reader:
        """Return the reader of one split, opened once and checked against dataset.json.

        Raises:
            UserError: there is no such split.
            DeitfastError: a file of it is missing or not the one that was converted.
        """
        if name not in self.spec.splits:
            has = ", ".join(self.spec.splits)
            raise UserError(f"{self.folder}: this dataset has no split {name!r}", expected=f"one of: {has}")
        if name not in self._readers:
            self._readers[name] = self._open_split(name)
        return self._readers[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the splits' files. May be called twice."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _open_split(self, name: str) -> Reader:
        split = self.spec.splits[name]
        path = self.folder / split.file
        remedy = "`deitfast verify` says what is damaged; convert again, or copy the file from where it is whole"
        if path.is_file() and path.stat().st_size != split.size:
            raise DeitfastError(
                f"{path}: not the file that {SPEC_FILE} describes",
                expected=f"{split.size:,} bytes",
                found=f"{path.stat().st_size:,} bytes",
                remedy=remedy,
            )
        reader = open_reader(path)
        if reader.index_crc32 != split.index_crc32 or reader.num_samples != split.samples:
            reader.close()
            raise DeitfastError(
                f"{path}: its index is damaged or another dataset's",
                expected=f"{split.samples:,} samples, index CRC32 {split.index_crc32:08x}",
                found=f"{reader.num_samples:,} samples, index CRC32 {reader.index_crc32:08x}",
                remedy=remedy,
            )
        return reader


def open_reader(path: Path) -> Reader:
    """Open a split's file or folder by its suffix, not compared with any dataset.json.

    Raises:
        DeitfastError: it is missing or not whole.
    """
    match path.suffix:
        case ".beton":
            return BetonReader(path)
        case ".wds":
            return ShardReader(path)
        case suffix:
            raise _damaged(path, "a split that ends in .beton or .wds", suffix)


def ffcv_files(path: Path) -> dict[str, Path]:
    """Return the .beton files by split that no dataset.json describes: one, or those of a folder with train.beton."""
    if path.is_file() and path.suffix == ".beton":
        return {"train": path}
    if (path / SPEC_FILE).exists():
        return {}
    found = {split: path / f"{split}.beton" for split in ("train", "val", "test")}
    found = {split: file for split, file in found.items() if file.is_file()}
    return found if "train" in found else {}


def describe_ffcv(files: Mapping[str, Path]) -> DatasetSpec:
    """Return what dataset.json would say of files that FFCV wrote.

    Raises:
        DeitfastError: one is not whole, or has other fields than an image and an integer label.
    """
    readers = {split: BetonReader(file) for split, file in files.items()}
    number = max(int(reader.labels.max()) for reader in readers.values()) + 1
    if number > MOST_CLASSES:
        raise _damaged(files["train"], f"labels below {MOST_CLASSES:,}", f"label {number - 1:,}")
    classes = tuple(map(str, range(number)))
    splits = {
        split: SplitSpec(
            file=files[split].name,
            samples=reader.num_samples,
            counts=tuple(np.bincount(reader.labels, minlength=number).tolist()),
            size=reader.file_size,
            index_crc32=reader.index_crc32,
            fingerprint=content_fingerprint(reader),
        )
        for split, reader in readers.items()
    }
    for reader in readers.values():
        reader.close()
    fingerprint = dataset_fingerprint(classes, {name: split.fingerprint for name, split in splits.items()})
    source = " and ".join(str(file) for file in files.values())
    return DatasetSpec(FORMAT, "ffcv", classes, splits, {"max_side": 0, "quality": 0}, source, fingerprint)


def content_fingerprint(reader: Reader) -> str:
    """Return a split's fingerprint: blake2b over (label, height, width, mode, crc32) of every sample in order."""
    rows = np.zeros(reader.num_samples, dtype=CONTENT)
    rows["label"], rows["height"], rows["width"] = reader.labels, reader.heights, reader.widths
    rows["mode"], rows["crc32"] = reader.modes, reader.crcs
    return hashlib.blake2b(rows.tobytes(), digest_size=8).hexdigest()


def dataset_fingerprint(classes: tuple[str, ...], splits: Mapping[str, str]) -> str:
    """Return a dataset's fingerprint from its class names and the fingerprints of its splits."""
    text = json.dumps({"classes": classes, "splits": dict(splits)}, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def write_spec(folder: Path, spec: DatasetSpec) -> None:
    """Publish dataset.json: there is the whole new one or none, whenever this is interrupted."""
    with atomic_write(folder / SPEC_FILE) as file:
        file.write((json.dumps(asdict(spec), indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def read_spec(folder: Path) -> DatasetSpec:
    """Read and check dataset.json, or describe what FFCV wrote. Raises as `Dataset.open` does."""
    if files := ffcv_files(folder):
        if folder.is_dir() and any(BetonReader(file).has_crcs for file in files.values()):  # FFCV writes none
            raise UserError(
                f"{folder}: a data set of deitfast's that lacks its {SPEC_FILE}, which names the classes",
                remedy="copy it from where the data set came from, or convert again",
            )
        return describe_ffcv(files)
    path = folder / SPEC_FILE
    remedy = "make one with `deitfast convert`, or give the folder of one"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", expected="the folder of a converted dataset", remedy=remedy)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{folder}: not a converted dataset", expected=f"a {SPEC_FILE} in it", remedy=remedy) from None
    except OSError as error:
        raise DeitfastError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # JSON's and UTF-8's errors
        raise _damaged(path, "JSON text", str(error)) from None
    version = data.get("format") if isinstance(data, dict) else None
    if version != FORMAT:
        raise UserError(
            f"{path}: this program cannot read this dataset",
            expected=f"format {FORMAT}",
            found=f"format {version}" if version is not None else "no format",
            remedy="convert it again with this version of deitfast",
        )
    try:
        spec = TypeAdapter(DatasetSpec).validate_json(text)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise _damaged(path, "the keys and values that convert writes", found) from None
    _check_consistency(path, spec)
    return spec


def _damaged(path: Path, expected: str, found: str) -> DeitfastError:
    return DeitfastError(
        f"{path}: damaged or edited", expected=expected, found=found, remedy="convert the dataset again"
    )


def _check_consistency(path: Path, spec: DatasetSpec) -> None:
    """Check what dataset.json says twice."""
    for name, split in spec.splits.items():
        if len(split.counts) != len(spec.classes) or sum(split.counts) != split.samples:
            expected = f"{split.samples} samples of {len(spec.classes)} classes in {name}'s counts"
            raise _damaged(path, expected, f"{sum(split.counts)} of {len(split.counts)}")
        if Path(split.file).name != split.file:
            raise _damaged(path, f"the name of a file in the folder as {name}'s file", repr(split.file))
    fingerprint = dataset_fingerprint(spec.classes, {name: s.fingerprint for name, s in spec.splits.items()})
    if fingerprint != spec.fingerprint:
        raise _damaged(path, f"fingerprint {fingerprint} of these classes and splits", spec.fingerprint)
