"""Looks for damage in a converted dataset and lists all of it."""

import warnings
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from pipelines.errors import DeitfastError, UserError
from pipelines.spec import DatasetSpec, SplitSpec
from pipelines.storage.dataset import SPEC_FILE, content_fingerprint, open_reader, read_spec
from pipelines.storage.formats.wds_reader import ShardReader, shard_damages
from pipelines.storage.reader import JPEG, Reader
from pipelines.storage.transcode import BadImageError, stored_size
from pipelines.workers import in_order, usable_cores

Progress = Callable[[str, int, int, int], None]
"""Called with (stage, images done, images in all, bytes done); the stage is a split's name, or begins with it."""

CHUNK = 64
FEW = 4
"""Chunks that this process decodes alone: starting others takes as long."""


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written."""

    split: str
    """Empty for dataset.json itself."""
    sample: int | None
    """Number of the sample in the split; None for the file as a whole."""
    label: str
    """Name of the sample's class, empty if there is none."""
    reason: str
    """What was expected and found."""


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` looked at and what it found."""

    folder: Path
    samples: dict[str, int]
    """Samples checked in each split."""
    size: int
    """Bytes of image data checked."""
    decoded: bool
    """Whether every image was decoded, or only its CRC32 compared."""
    damages: tuple[Damage, ...]
    unsealed: int = 0
    """Samples among them that have no CRC32, as in files that FFCV wrote."""

    @property
    def intact(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages


def verify(folder: Path, *, decode: bool = True, workers: int = 0, progress: Progress | None = None) -> VerifyReport:
    """Check a dataset: each file's size and index, each sample's CRC32 and, if asked, that it decodes to its size.

    Args:
        folder: the dataset's folder.
        decode: decode every JPEG and compare its height and width with the index.
        workers: processes that decode, or threads that only compare; 0 takes the usable cores.
        progress: called as work gets done.

    Returns:
        The report; damage is in it, never raised.

    Raises:
        UserError: there is no dataset here.
    """
    folder = Path(folder)
    try:
        spec = read_spec(folder)
        folder = folder.parent if folder.is_file() else folder
    except UserError:
        raise
    except DeitfastError as failure:
        return VerifyReport(folder, {}, 0, decode, (Damage("", None, "", str(failure)),))
    damages: list[Damage] = []
    samples, size, unsealed = {}, 0, 0
    for name, split in spec.splits.items():
        try:
            reader = open_reader(folder / split.file)
        except DeitfastError as failure:
            damages.append(Damage(name, None, "", str(failure)))
            continue
        damages += [Damage(name, None, "", reason) for reason in _index_damage(reader, split)]
        found = damaged_samples(reader, decode=decode, workers=workers, stage=name, progress=progress)
        damages += [Damage(name, number, _label(spec, reader, number), reason) for number, reason in found]
        samples[name] = reader.num_samples
        size += int(reader.sizes.sum())
        unsealed += 0 if reader.has_crcs else reader.num_samples
        reader.close()
    return VerifyReport(folder, samples, size, decode, tuple(damages), unsealed)


def damaged_samples(
    reader: Reader, *, decode: bool, workers: int = 0, stage: str = "", progress: Progress | None = None
) -> list[tuple[int, str]]:
    """Return (number, reason) of every damaged sample of an open file, in order. Arguments as `verify` has them."""
    total, size = reader.num_samples, 0
    chunks = [range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]
    damages: list[tuple[int, str]] = []
    with closing(_checked(reader, chunks, decode, workers or usable_cores())) as found:
        for chunk, some in zip(chunks, found, strict=True):
            damages += some
            size += int(reader.sizes[chunk.start : chunk.stop].sum())
            if progress:
                progress(stage, chunk.stop, total, size)
    return damages


def _checked(
    reader: Reader, chunks: list[range], decode: bool, workers: int
) -> Generator[list[tuple[int, str]], None, None]:
    """Yield what is damaged in each chunk: by threads, or by processes where images are decoded."""
    if not decode:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(lambda chunk: _check(reader, chunk, decode), chunks)
    elif workers == 1 or len(chunks) <= FEW:
        yield from (_check(reader, chunk, decode) for chunk in chunks)
    else:
        yield from in_order(partial(_check_path, reader.path), chunks, min(workers, len(chunks)))


def _check_path(path: Path, numbers: range) -> list[tuple[int, str]]:
    """Check and decode samples of a split: a worker's task."""
    return _check(_opened(path), numbers, decode=True)


@lru_cache(maxsize=1)
def _opened(path: Path) -> Reader:
    """Return the reader of a split, opened once in a worker process."""
    return open_reader(path)


def _check(reader: Reader, numbers: range, decode: bool) -> list[tuple[int, str]]:
    with warnings.catch_warnings() if decode else nullcontext():  # in threads, of which each would restore another's
        if decode:
            warnings.simplefilter("ignore")  # Pillow's, about odd but readable files
        checked = [(number, _sample_damage(reader, number, decode)) for number in numbers]
    return [(number, f"{reader.location(number).file.name}: {reason}") for number, reason in checked if reason]


def _sample_damage(reader: Reader, number: int, decode: bool) -> str:
    try:
        data = reader.read_verified(number)
        if isinstance(reader, ShardReader):
            reader.check_frame(number)
        if decode and reader.modes[number] == JPEG:
            expected = int(reader.heights[number]), int(reader.widths[number])
            found = stored_size(data.tobytes())
            if found != expected:
                return f"expected {expected[0]} x {expected[1]} pixels, decoded {found[0]} x {found[1]}"
    except DeitfastError as failure:
        return f"expected {failure.expected}, found {failure.found}"
    except BadImageError as reason:
        return f"does not decode: {reason}"
    return ""


def _index_damage(reader: Reader, split: SplitSpec) -> list[str]:
    """Compare a file's index with what dataset.json says of it."""
    counts = np.bincount(reader.labels, minlength=len(split.counts)) if reader.labels.max() < 2**24 else None
    pairs = {
        "size of the file": (split.size, reader.file_size),
        "number of samples": (split.samples, reader.num_samples),
        "CRC32 of the index": (f"{split.index_crc32:08x}", f"{reader.index_crc32:08x}"),
        "fingerprint": (split.fingerprint, content_fingerprint(reader)),
    }
    found = [f"{what}: {SPEC_FILE} says {says}, the file {has}" for what, (says, has) in pairs.items() if says != has]
    if counts is None or tuple(counts) != split.counts:
        found.append(f"images of each class: not as {SPEC_FILE} counts them")
    return found + (shard_damages(reader) if isinstance(reader, ShardReader) else [])


def _label(spec: DatasetSpec, reader: Reader, number: int) -> str:
    label = int(reader.labels[number])
    return spec.classes[label] if label < len(spec.classes) else f"class {label}"
