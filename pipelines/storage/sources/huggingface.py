"""Data sets of Hugging Face's on the disk: Parquet files, as the hub has them, or Arrow files; the kind `huggingface`.

Each row has an image (its encoded file) and a class: a number, whose name the file's head may say, or a name. Arrow
files are those of `load_dataset`'s cache and of `save_to_disk`. Compressed rows can only be read many at a time, so the
images are unpacked once, into one file in the workspace.
"""

import json
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import DeitfastError, UserError, pluralize
from pipelines.files import explain_os_error
from pipelines.storage.sources.archives import damaged
from pipelines.storage.sources.image_folder import COLUMN_SUFFIXES
from pipelines.storage.sources.label_table import CLASS_COLUMNS, find_column
from pipelines.storage.sources.members import Extent, printable
from pipelines.storage.sources.opened_source import OpenedSource, Workspace
from pipelines.storage.sources.sharded import ShardedImages, list_shards, split_of_shard

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch, Schema

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "imagebytes", "bytes")
LABEL_COLUMNS = ("label", "labels", "finelabel", "cls", *CLASS_COLUMNS)
"""What the columns are called, in order of preference; case, blanks and underscores do not count."""
ROWS = 64
"""Rows of a Parquet file in memory at once."""
COMPUTED = ("cache-", "tmp")
"""How names of Arrow files begin that hold what a program computed from a data set in load_dataset's cache."""
EXPECTED = "Parquet or Arrow files such as train-00000-of-00001.parquet, with a column of images and one of classes"


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read."""

    image: str
    label: str
    class_names: tuple[str, ...]
    """Names of class 0, 1, ...; empty where the file does not say them."""


def open_huggingface(path: Path, workspace: Workspace) -> OpenedSource:
    """Open a folder of Parquet or Arrow files, or one file; a file's or its folder's name says its split, else train.

    Raises:
        UserError: there are no such files, or those of several data sets; there is no column of images or of classes,
            or nothing to train on; pyarrow is not installed.
        DeitfastError: a file is damaged, or there is no room to unpack the images.
    """
    shards = _shards(path, workspace)
    columns = _common_columns(shards)
    images, target = ShardedImages(columns.class_names), workspace.new_file("images")
    room = "make room for the images of all files, or name an output on another disk"
    with explain_os_error(target, room), target.open("wb") as unpacked:
        for number, (name, shard) in enumerate(shards.items()):
            workspace.progress("unpacking files", number, len(shards))
            split = split_of_shard(name)
            for row, (data, label, file_name) in enumerate(_rows(shard, columns)):
                extent = Extent(str(target), unpacked.tell(), len(data))
                unpacked.write(data)
                images.add(split, label, f"{name}/{row:07}{file_name and '-'}{file_name}", extent)
    return images.source("huggingface", path, pluralize(len(shards), "file"), workspace.unpacked, EXPECTED)


def _shards(path: Path, workspace: Workspace) -> dict[str, Path]:
    """Return the Parquet and Arrow files by name. Raises UserError where there are none, or one twice in a split."""
    shards = {
        name: Path(where.path)
        for name, where in list_shards(path, workspace).files.items()
        if name.endswith(COLUMN_SUFFIXES) and not posixpath.basename(name).startswith(COMPUTED)
    }
    if not shards:
        raise UserError(f"{printable(path)} holds no files of Hugging Face's", expected=EXPECTED)
    seen: dict[tuple[str | None, str], str] = {}
    for name in shards:
        first = seen.setdefault((split_of_shard(name), posixpath.basename(name)), name)
        if first != name:
            raise UserError(
                f"{printable(path)} holds several data sets, or one twice",
                found=f"{printable(first)} and {printable(name)}",
                remedy="give the folder of one of them",
            )
    return shards


def _common_columns(shards: dict[str, Path]) -> Columns:
    """Return the columns that all files have. Raises UserError where they differ, classes included."""
    found: dict[Columns, Path] = {}
    for shard in shards.values():
        with _opened(shard) as (schema, _):
            found.setdefault(_columns(schema, shard), shard)
    if len(found) > 1:
        (_, first), (_, other), *_ = found.items()
        raise UserError(
            f"{printable(first)} and {printable(other)} are of different data sets: their columns or classes differ",
            remedy="give the folder of one data set",
        )
    return next(iter(found))


@contextmanager
def _opened(shard: Path, columns: Columns | None = None) -> "Iterator[tuple[Schema, Iterator[RecordBatch]]]":
    """Open a file; yield its schema and its rows, of these columns alone.

    Raises:
        UserError: pyarrow is not installed.
        DeitfastError: the file is damaged or cannot be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "Hugging Face's files are read by pyarrow", found=str(error), remedy="pip install 'deitfast[huggingface]'"
        ) from None
    chosen = [columns.image, columns.label] if columns else []
    try:
        if shard.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(shard) as file:
                yield file.schema_arrow, file.iter_batches(ROWS, columns=chosen)
        else:
            with pyarrow.memory_map(str(shard)) as mapped:
                is_file = mapped.read(6) == b"ARROW1"
                mapped.seek(0)
                reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(mapped)
                batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else iter(reader)
                yield reader.schema, (batch.select(chosen) for batch in batches)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DeitfastError(f"{printable(shard)} cannot be read: {error}") from None
        raise damaged(shard, printable(str(error).partition("\n")[0])) from None


def _columns(schema: "Schema", shard: Path) -> Columns:
    """Return the columns of images and classes: by what Hugging Face notes in the file's head, else by their names."""
    from pyarrow import types

    noted = _features(schema)
    holds_classes = (types.is_integer, types.is_string, types.is_large_string, types.is_dictionary)
    images = [field.name for field in schema if _holds_images(field.type)]
    labels = [field.name for field in schema if any(fits(field.type) for fits in holds_classes)]
    image = _choose(images, [name for name in images if noted.get(name, {}).get("_type") == "Image"], IMAGE_COLUMNS)
    known = [name for name in labels if noted.get(name, {}).get("_type") == "ClassLabel"]
    label = _choose(labels, known, LABEL_COLUMNS)
    if image is None or label is None:
        raise UserError(
            f"{printable(shard)}: no column of {'encoded images' if image is None else 'classes'}",
            expected=f"columns such as {', '.join(IMAGE_COLUMNS[:4])} and {', '.join(LABEL_COLUMNS[:4])}",
            found=", ".join(f"{field.name} ({field.type})" for field in schema)[:200],
        )
    names = noted.get(label, {}).get("names")
    return Columns(image, label, tuple(map(str, names)) if isinstance(names, list) else ())


def _features(schema: "Schema") -> dict[str, dict[str, Any]]:
    """Return what Hugging Face notes of each column; nothing where another program wrote the file."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return {name: note for name, note in noted.items() if isinstance(note, dict)} if isinstance(noted, dict) else {}


def _holds_images(kind: "DataType") -> bool:
    """Say whether a column's values may be encoded files: bytes, or bytes and a path."""
    from pyarrow import types

    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return types.is_binary(kind) or types.is_large_binary(kind)


def _choose(fitting: Sequence[str], noted: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the column that is called most like `names`, of the noted ones if there are any; None: none is."""
    found = find_column(noted or fitting, names)
    if found is None:
        return noted[0] if noted else None
    return (noted or fitting)[found]


def _rows(shard: Path, columns: Columns) -> Iterator[tuple[bytes, str | None, str]]:
    """Yield each row's encoded image, its class (a number, a name, or None: it has none) and its file's name or "".

    Raises:
        UserError: a row has an image's path instead of the image.
        DeitfastError: the file is damaged.
    """
    with _opened(shard, columns) as (_, batches):
        for batch in batches:
            batch.validate(full=True)
            values, labels = (batch.column(name).to_pylist() for name in (columns.image, columns.label))
            for value, label in zip(values, labels, strict=True):
                data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
                if data is None and path:
                    raise UserError(
                        f"{printable(shard)} has paths of images instead of the images",
                        found=printable(str(path)),
                        remedy="deitfast convert folder, with the folder that they lie in",
                    )
                text = str(label).strip()
                file_name = posixpath.basename(str(path or "").replace("\\", "/"))
                yield data or b"", None if label is None or text in ("", "-1") else printable(text), file_name
