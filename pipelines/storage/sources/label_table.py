"""Label tables: a file with the name and the class of an image in each row, as CSV, TSV, JSON Lines, or a list.

So do Kaggle's competitions (train.csv), Hugging Face's image folders (metadata.csv, metadata.jsonl) and Caffe's lists
(train.txt) label images.
"""

import csv
import io
import json
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipelines.errors import DeitfastError, UserError, pluralize
from pipelines.storage.sources.members import Listing, printable
from pipelines.storage.sources.splits import split_of

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
"""Endings of files that may be label tables."""
FILE_COLUMNS = (
    "filename",
    "file",
    "filepath",
    "path",
    "imagepath",
    "image",
    "imageid",
    "imagename",
    "img",
    "idcode",
    "id",
    "name",
)
CLASS_COLUMNS = ("label", "labels", "class", "classname", "category", "target", "labelname", "species", "breed")
SPLIT_COLUMNS = ("split", "subset", "set", "partition")
"""What the columns are called, in order of preference; case, blanks and underscores do not count."""
FILLERS = re.compile("labels?|metadata|annotations?|list", re.IGNORECASE)
"""Words that names of tables have besides their split's."""
IMAGE = re.compile(r".*\.[A-Za-z0-9]{2,5}")
"""A file's name, by its ending: what the first cell of a table without a head is."""


@dataclass(frozen=True)
class Row:
    """What a table says about one image."""

    name: str
    """The image's file: a path or its last parts, with or without the ending."""
    label: str
    split: str | None
    """train, val or test; None where the table has no such column."""


@dataclass(frozen=True)
class LabelTable:
    """A table, and where it lies in the source."""

    name: str
    """For messages."""
    inside: str | None
    """Its name in the source; None: it lies outside."""
    rows: tuple[Row, ...]

    @property
    def folder(self) -> str | None:
        """Folder of the source that it lies in, ending in "/", or empty; None: outside."""
        return None if self.inside is None else posixpath.join(posixpath.dirname(self.inside), "")

    @cached_property
    def split(self) -> str | None:
        """The split that it is called after: train.csv, val_labels.csv."""
        return split_of(FILLERS.sub("", posixpath.splitext(posixpath.basename(self.name))[0]))


@dataclass(frozen=True)
class Labeled:
    """An image that a table names."""

    image: str
    """Its full name in the source."""
    label: str
    split: str


def open_table(path: Path, listing: Listing) -> LabelTable:
    """Read a table on the disk, or one in the source's folder or archive.

    Raises:
        UserError: there is no such file, or it is no label table.
    """
    if path.is_file():
        origin, real = listing.origin.resolve(), path.resolve()
        below = listing.origin.is_dir() and real.is_relative_to(origin)
        inside = unicodedata.normalize("NFC", real.relative_to(origin).as_posix()) if below else None
        return LabelTable(printable(path), inside, tuple(read_rows(real.read_bytes(), printable(path))))
    wanted = path.as_posix()
    found = [name for name in listing.files if name == wanted or name.endswith(f"/{wanted}")]
    if len(found) != 1:
        tables = found or [name for name in listing.files if name.lower().endswith(TABLE_SUFFIXES)]
        raise UserError(
            f"--labels {printable(path)}: " + ("there are several" if found else "there is no such file"),
            expected="a CSV, TSV or JSON Lines file, on the disk or in the source",
            found=", ".join(map(printable, tables[:5])) or f"no table in {printable(listing.origin)}",
        )
    name = printable(found[0])
    return LabelTable(name, found[0], tuple(read_rows(listing.files[found[0]].read(), name)))


def read_rows(data: bytes, name: str) -> list[Row]:
    """Read a table: `name` for messages, and its ending says what it is.

    Without a head, file and class are the first two columns.

    Raises:
        UserError: it has no columns of these names, or a row without file or class.
        DeitfastError: it is not such a file.
    """
    try:
        text = data.decode("utf-8-sig")
        json_lines = name.lower().endswith((".jsonl", ".ndjson"))
        cells = _json_lines(text) if json_lines else _separated(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise DeitfastError(
            f"{name}: not a label table", expected="CSV or TSV in UTF-8, or an object of JSON a line", found=str(error)
        ) from None
    if not cells:
        raise UserError(f"{name}: the table is empty")
    file, label, split, start = _columns(cells[0], name)
    rows = []
    for number, row in enumerate(cells[start:], start=start + 1):
        values = [
            row[column].strip() if column is not None and column < len(row) else "" for column in (file, label, split)
        ]
        if not values[0] or not values[1]:
            raise UserError(
                f"{name}: row {number} has no {'class' if values[0] else 'file name'}", found=str(row)[:100]
            )
        part = split_of(values[2]) if split is not None else None
        if split is not None and part is None:
            raise UserError(f"{name}: row {number} has no split", expected="train, val or test", found=values[2][:100])
        path = posixpath.normpath(unicodedata.normalize("NFC", values[0].replace("\\", "/"))).lstrip("/")
        rows.append(Row(path, unicodedata.normalize("NFC", values[1]), part))
    return rows


def _separated(text: str) -> list[list[str]]:
    """Split lines at tabs, semicolons or commas, whichever the first has most of; where it has none, at a blank."""
    head = text.lstrip().partition("\n")[0]
    delimiter = max("\t;,", key=head.count)
    if delimiter not in head:
        return [line.rsplit(None, 1) for line in text.splitlines() if line.strip()]
    return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if any(row)]


def _json_lines(text: str) -> list[list[str]]:
    objects = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(each, dict) for each in objects):
        raise ValueError("a line that is no object")
    keys = list(dict.fromkeys(key for each in objects for key in each))
    rows = [["" if (value := each.get(key)) is None else str(value) for key in keys] for each in objects]
    return [keys, *rows] if rows else []


def _columns(head: Sequence[str], name: str) -> tuple[int, int, int | None, int]:
    """Return the columns of file, class and split (None: there is none), and the first row that is not the head."""
    file, label, split = (find_column(head, names) for names in (FILE_COLUMNS, CLASS_COLUMNS, SPLIT_COLUMNS))
    if file is None and label is None and len(head) > 1 and IMAGE.fullmatch(head[0].strip()):
        return 0, 1, None, 0
    if len(head) == 2 and (file is None) != (label is None):  # one is known, so the other is what remains
        file, label = (1 - (label or 0) if file is None else file), (1 - (file or 0) if label is None else label)
    if file is None or label is None or file == label:
        raise UserError(
            f"{name}: no column of {'file names' if file is None else 'classes'}",
            expected=f"columns such as {', '.join(FILE_COLUMNS[:4])} and {', '.join(CLASS_COLUMNS[:4])}",
            found=", ".join(map(printable, head))[:200],
        )
    return file, label, split, 1


def find_column(head: Sequence[str], names: Sequence[str]) -> int | None:
    """Return the column that is called like the earliest of `names`: of several, the first; None: none is.

    Case, blanks and underscores do not count.
    """
    plain = [re.sub(r"[\W_]", "", cell.lower()) for cell in head]
    return next((plain.index(name) for name in names if name in plain), None)


def match(tables: Sequence[LabelTable], images: Iterable[str], origin: Path) -> list[Labeled]:
    """Return those of the images, by full name, that the tables name; sorted.

    A name is a path below the source or the table's folder, or the last parts of one, with or without the ending. Where
    several images fit, those in the table's folder come first, then those in a folder of the split that the table is
    called after. The split is what the table says, or its name, or the image's folder; train where nothing does.

    Raises:
        UserError: a name without an image, or with several; an image of two classes.
    """
    by_name: dict[str, list[str]] = {}
    for image in images:
        base = posixpath.basename(image)
        for key in {base, posixpath.splitext(base)[0]}:
            by_name.setdefault(key, []).append(image)
    found: dict[str, Labeled] = {}
    for table in tables:
        missing: list[str] = []
        for row in table.rows:
            fitting = [image for image in by_name.get(posixpath.basename(row.name), ()) if _ends_in(image, row.name)]
            if not fitting:
                missing.append(printable(row.name))
                continue
            image = _choose(fitting, row, table)
            split = row.split or table.split or _split(image) or "train"
            labeled = Labeled(image, printable(row.label), split)
            if found.setdefault(image, labeled) != labeled:
                raise UserError(
                    f"{table.name}: {printable(image)} is named twice, and not alike",
                    found=f"{found[image].label} ({found[image].split}) and {labeled.label} ({labeled.split})",
                )
        if missing:
            more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
            raise UserError(
                f"{table.name} names {pluralize(len(missing), 'image')} that {printable(origin)} does not hold",
                found=", ".join(missing[:5]) + more,
                remedy="add them, or remove their rows",
            )
    return [found[image] for image in sorted(found)]


def _choose(fitting: list[str], row: Row, table: LabelTable) -> str:
    """Return which of the images that fit a row it means. Raises UserError where several are left."""
    preferences: tuple[Callable[[str], bool], ...] = (
        lambda image: table.folder is not None and _is(image, table.folder + row.name),
        lambda image: table.split is not None and _split(image) == table.split,
        lambda image: _is(image, row.name),
    )
    for prefers in preferences:
        fitting = list(filter(prefers, fitting)) or fitting
    if len(fitting) > 1:
        raise UserError(
            f"{table.name}: {printable(row.name)} may be several images",
            found=", ".join(map(printable, fitting[:5])),
            remedy="name them with their folders",
        )
    return fitting[0]


def _ends_in(image: str, name: str) -> bool:
    return any(whole == name or whole.endswith(f"/{name}") for whole in (image, posixpath.splitext(image)[0]))


def _is(image: str, name: str) -> bool:
    return name in (image, posixpath.splitext(image)[0])


def _split(image: str) -> str | None:
    """Return the split that one of an image's folders is named like; the outermost."""
    return next((split for folder in image.split("/")[:-1] if (split := split_of(folder))), None)


def class_order(name: str) -> tuple[int, str]:
    """Return what classes of a table are sorted by: numbers as numbers, so that class 10 is not the third."""
    return (int(name), name) if name.isdecimal() else (-1, name)
