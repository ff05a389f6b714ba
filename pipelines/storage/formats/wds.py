"""WebDataset tar shards: their layout.

A split is a folder: `000000.tar`, `000001.tar`, ..., DALI's index of each beside it (`000000.idx`), and `index.bin`,
which has what a reader must know of every sample before it is read. A sample is two members, `00000017.cls` (the label
as decimal digits) and `00000017.jpg`, or `.png` where the dataset holds raw pixels. Every byte follows from the samples
and from the size of a shard: headers carry no times, owners or machines.

Samples lie shuffled, by a permutation that depends on their number alone: other programs read shards from front to back
and shuffle in a buffer of some thousand, so each shard should hold all classes. Keys count as samples lie; `index.bin`
has them in the data set's own order, in which they are the same as in a .beton.
"""

from pathlib import Path
from typing import Any

import numpy as np

from pipelines.storage.reader import JPEG, RAW

BLOCK = 512
FRAME = 3 * BLOCK
"""Bytes before a sample's image: the label's header, the label, the image's header."""
TRAILER = bytes(2 * BLOCK)
"""The end of a tar file."""
EXTENSIONS = {JPEG: "jpg", RAW: "png"}
INDEX = "index.bin"
MAGIC = b"deitfast-shards1"

ROW = np.dtype(
    [
        ("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<u4"),
        ("height", "<u2"), ("width", "<u2"), ("mode", "u1"), ("crc32", "<u4"),
    ]
)  # fmt: skip
"""A sample in `index.bin`, in the data set's order: where its image lies, as stored.

Its CRC32 is that of the JPEG or of the raw pixels.
"""


def padded(size: Any) -> Any:
    """Return sizes in bytes (a number, or an array of them) rounded up to whole blocks, as a tar file stores them."""
    return -(-size // BLOCK) * BLOCK


def shard_file(folder: Path, number: int) -> Path:
    """Return where a split's shard of this number is."""
    return folder / f"{number:06d}.tar"


def dali_file(shard: Path) -> Path:
    """Return where DALI's index of a shard is."""
    return shard.with_suffix(".idx")


def frame(sample: int, label: int, mode: int, size: int) -> bytes:
    """Return the FRAME bytes before a sample's image of `size` bytes."""
    digits = str(label).encode()
    image = _header(f"{sample:08d}.{EXTENSIONS[mode]}", size)
    return _header(f"{sample:08d}.cls", len(digits)) + digits.ljust(BLOCK, b"\0") + image


def dali_index(rows: np.ndarray, first: int) -> bytes:
    """Return DALI's index, version 1.2, of a shard that holds ROW [n], samples from `first` on; as wds2idx makes it.

    A line for each sample names its components: extension, offset, size and name.
    """
    lines = [f"v1.2 {len(rows)}"]
    columns = (rows[name].tolist() for name in ("label", "mode", "offset", "size"))
    for sample, (label, mode, offset, size) in enumerate(zip(*columns, strict=True), start=first):
        key, extension = f"{sample:08d}", EXTENSIONS[mode]
        digits = f"cls {offset - 2 * BLOCK} {len(str(label))} {key}.cls"
        lines.append(f"{digits} {extension} {offset} {size} {key}.{extension}")
    return "".join(f"{line}\n" for line in lines).encode()


def physical_order(samples: int) -> np.ndarray:
    """Return the order that samples are written in, int64 [samples]: a permutation keyed by nothing but their number.

    Sorts splitmix64's output (Steele, Lea, Flood 2014) of 1, 2, ...: the same with every version of numpy.
    """
    with np.errstate(over="ignore"):
        x = np.arange(1, samples + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


def ends(rows: np.ndarray) -> np.ndarray:
    """Return where each sample of ROW [n] ends in its shard, in bytes, int64 [n]."""
    return padded((rows["offset"] + rows["size"]).astype(np.int64))


def first_samples(rows: np.ndarray) -> np.ndarray:
    """Return the position of each shard's first sample, int64 [shards], from ROW [n] as they lie."""
    return np.flatnonzero(np.diff(rows["shard"].astype(np.int64), prepend=-1))


def _header(name: str, size: int) -> bytes:
    """Return a file's tar header (POSIX ustar): mode 0644, no owner, no time.

    Not by the standard library: the reader holds shards to these very bytes, whichever Python wrote them.
    """
    mode, owner, group, time = b"0000644\0", b"0000000\0", b"0000000\0", b"00000000000\0"
    before = name.encode().ljust(100, b"\0") + mode + owner + group + b"%011o\0" % size + time
    after = b"0" + bytes(100) + b"ustar\x0000" + bytes(BLOCK - 265)
    checksum = sum(before) + sum(after) + 8 * ord(" ")
    return before + b"%06o\0 " % checksum + after
