"""Labels of ImageNet's validation images, from any of the files that people keep them in.

The official ones are class numbers 1 to 1000 (`ILSVRC2012_validation_ground_truth.txt`) whose meaning is in the
devkit's MATLAB file `meta.mat`; the others name the synset (wnid) or count the sorted wnids from 0.
"""

import posixpath
import re
import struct
import tarfile
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

from pipelines.errors import DeitfastError, UserError
from pipelines.storage.sources.members import Listing, printable

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SYNSET_LINES = ("val_synset_labels.txt", "imagenet_2012_validation_synset_labels.txt", "synset_labels.txt")
KAGGLE = "LOC_val_solution.csv"
CAFFE = "val.txt"
ACCEPTED = f"{DEVKIT} (or its {GROUND_TRUTH} and meta.mat), {SYNSET_LINES[0]}, {SYNSET_LINES[1]}, {KAGGLE} or {CAFFE}"
"""The files that labels are read from, for messages, in order of preference."""
NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
HEADS = {"imageid", "image", "filename", "file", "name", "path"}
"""First words of a label file's first line where that line is a head."""
WNID = re.compile(r"n\d{8}")


def validation_labels(listing: Listing, classes: list[str]) -> dict[int, str]:
    """Return the wnid of each validation image by its number (1 to 50,000).

    Args:
        listing: where label files are looked for, at any depth.
        classes: wnids of the training set, sorted: what val.txt counts.

    Raises:
        UserError: there is no label file, or val.txt counts other classes.
        DeitfastError: a label file cannot be understood.
    """
    readers: tuple[tuple[tuple[str, ...], Callable[[Listing, str, list[str]], dict[int, str]]], ...] = (
        ((DEVKIT,), _from_devkit),
        ((GROUND_TRUTH,), _from_ground_truth),
        (SYNSET_LINES, _from_synset_lines),
        ((KAGGLE,), _kaggle),
        ((CAFFE,), _caffe),
    )
    for names, reader in readers:
        for name in listing.named(*names):
            if labels := reader(listing, name, classes):
                return labels
    alone = listing.named(GROUND_TRUTH)
    raise UserError(
        f"{printable(listing.origin)} has validation images, but nothing that says their classes",
        expected=f"one of {ACCEPTED}",
        found=f"{alone[0]} without the meta.mat that explains its numbers" if alone else "none of them",
        remedy="put one there, or take the validation images away to go on without",
    )


def _from_devkit(listing: Listing, name: str, classes: list[str]) -> dict[int, str]:
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=BytesIO(listing.files[name].read())) as archive:
            for member in archive:
                if posixpath.basename(member.name) in ("meta.mat", GROUND_TRUTH) and (
                    file := archive.extractfile(member)
                ):
                    members[posixpath.basename(member.name)] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise _parse_error(name, "the development kit of ILSVRC2012", str(error)) from None
    if missing := {"meta.mat", GROUND_TRUTH} - members.keys():
        raise _parse_error(name, "data/meta.mat and data/" + GROUND_TRUTH, f"no {' and no '.join(sorted(missing))}")
    return _official(members[GROUND_TRUTH], members["meta.mat"], name)


def _from_ground_truth(listing: Listing, name: str, classes: list[str]) -> dict[int, str]:
    metas = listing.named("meta.mat")
    return _official(listing.files[name].read(), listing.files[metas[0]].read(), name) if metas else {}


def _official(ground_truth: bytes, meta: bytes, name: str) -> dict[int, str]:
    try:
        wnids = read_meta(meta)
        return {number: wnids[int(line)] for number, line in enumerate(ground_truth.removeprefix(BOM_UTF8).split(), 1)}
    except (ValueError, KeyError, IndexError, struct.error, zlib.error, UnicodeDecodeError) as error:
        raise _parse_error(name, "numbers 1 to 1000 that meta.mat explains", repr(error)) from None


def _from_synset_lines(listing: Listing, name: str, classes: list[str]) -> dict[int, str]:
    """One wnid a line, in the order of the images' numbers."""
    lines = [word for words in _words(listing, name) for word in words]
    for number, line in enumerate(lines, 1):
        if not WNID.fullmatch(line):
            raise _parse_error(name, "one wnid such as n01440764 a line", f"{line!r} in line {number}")
    return dict(enumerate(lines, 1))


def _kaggle(listing: Listing, name: str, classes: list[str]) -> dict[int, str]:
    """A line for each image: its name, then the wnid and the boxes of its objects, of which the first counts."""
    labels = _pairs(listing, name, WNID)
    return {number: label for number, label in labels.items() if WNID.fullmatch(label)}


def _caffe(listing: Listing, name: str, classes: list[str]) -> dict[int, str]:
    """A line for each image: its name, then its class's position among the sorted wnids, from 0, or its wnid."""
    labels = _pairs(listing, name, re.compile(r"n\d{8}|\d+"))
    positions = [int(label) for label in labels.values() if label.isdecimal()]
    if positions and max(positions) + 1 != len(classes) and len(classes) != 1000:
        raise UserError(
            f"{printable(name)} counts the sorted classes of the whole set, which is not here",
            expected=f"{max(positions) + 1:,} training classes",
            found=f"{len(classes):,}",
            remedy=f"use one of {ACCEPTED.rpartition(' or ')[0]} instead",
        )
    if positions and max(positions) >= len(classes):
        raise _parse_error(name, f"positions below {len(classes):,}", f"{max(positions):,}")
    return {number: classes[int(label)] if label.isdecimal() else label for number, label in labels.items()}


def _pairs(listing: Listing, name: str, label: re.Pattern[str]) -> dict[int, str]:
    """Return the second word of each line by the image's number; the first line may be a head."""
    labels: dict[int, str] = {}
    for row, words in enumerate(_words(listing, name), 1):
        number = NUMBER.search(words[0]) if words else None
        if number and len(words) > 1 and label.fullmatch(words[1]):
            labels[int(number[1])] = words[1]
        elif words and not (row == 1 and words[0].lower() in HEADS):
            found = f"{' '.join(words)[:60]!r} in line {row}"
            raise _parse_error(name, "an image's name and its class in each line", found)
    return labels


def _words(listing: Listing, name: str) -> list[list[str]]:
    """Return a text's lines as words, apart by white space, commas or semicolons; no quotes, no byte-order mark."""
    data = listing.files[name].read()
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))  # as PowerShell writes
    text = data.decode("utf-16" if utf16 else "utf-8-sig", "replace")
    return [[word for word in re.split(r"[\s,;\"']+", line) if word] for line in text.splitlines()]


def read_meta(data: bytes) -> dict[int, str]:
    """Return ILSVRC2012_ID -> WNID from the devkit's meta.mat, a MATLAB 5 file with one struct array, `synsets`.

    Follows "MAT-File Format" (MathWorks), as far as that file goes: little-endian, compressed or not, structs of
    numbers and characters. Raises ValueError, KeyError or struct.error for anything else.
    """
    if data[126:128] != b"IM":
        raise ValueError("no little-endian MATLAB 5 file")
    for kind, content in _elements(data[128:]):
        if kind == 15:  # miCOMPRESSED
            ((kind, content),) = _elements(zlib.decompress(content))
        if kind == 14 and (synsets := _matrix(content)) and isinstance(synsets[0], dict):
            return {int(synset["ILSVRC2012_ID"][0]): "".join(map(chr, synset["WNID"])) for synset in synsets}
    raise ValueError("no struct array")


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and content of each data element."""
    place = 0
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, place)
        if kind >> 16:  # small element: size and type share a word, up to four bytes of content follow
            yield kind & 0xFFFF, data[place + 4 : place + 4 + (kind >> 16)]
            place += 8
        else:
            yield kind, data[place + 8 : place + 8 + size]
            place += 8 + (size if kind == 15 else -(-size // 8) * 8)


NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q", 16: "B"}
"""MAT data types and their codes for `struct`; 16 is UTF-8."""


def _matrix(content: bytes) -> list[Any]:
    """Return a matrix's elements: numbers (characters as code points), or one dict a struct."""
    elements = list(_elements(content))
    if not elements:
        return []  # MATLAB writes an empty field so
    mx_class = elements[0][1][0]
    if mx_class == 2:  # flags, dimensions, name, length of field names, field names, then all fields of each struct
        (length,) = struct.unpack("<i", elements[3][1])
        packed = elements[4][1]
        names = [packed[at : at + length].split(b"\0")[0].decode() for at in range(0, len(packed), length)]
        fields = [_matrix(field) for _, field in elements[5:]]
        return [dict(zip(names, fields[at:], strict=False)) for at in range(0, len(fields), len(names))]
    if mx_class not in (4, *range(6, 16)):  # characters and numbers
        return []
    kind, values = elements[3]
    return list(struct.unpack(f"<{len(values) // struct.calcsize(NUMBERS[kind])}{NUMBERS[kind]}", values))


def _parse_error(name: str, expected: str, found: str) -> DeitfastError:
    return DeitfastError(f"{printable(name)} cannot be understood", expected=expected, found=found)
