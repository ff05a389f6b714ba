"""Converts one split: results of the workers in the source's order, journaled, then the index, then the name."""

import contextlib
import errno
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import __version__ as pillow_version
from PIL import features

from pipelines.errors import DeitfastError, UserError
from pipelines.files import sync_folder
from pipelines.spec import SplitSpec
from pipelines.storage import decoders
from pipelines.storage.convert.journal import Journal
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.dataset import content_fingerprint
from pipelines.storage.entry import Entry, Source
from pipelines.storage.formats.format import Format, Writer, beton, shards
from pipelines.storage.image_kinds import count_kinds
from pipelines.storage.transcode import BadImageError, EncodedImage, EncodeOptions, transcode
from pipelines.storage.verify import Progress, damaged_samples
from pipelines.workers import in_order, usable_cores

BATCH_IMAGES, BATCH_BYTES = 64, 2 << 20
"""A worker's task: so many images, or so many bytes of them."""
LAYOUT = 2
"""Changes with how formats lay samples out, so that no conversion goes on with what another version began."""
FLUSH_BYTES, FLUSH_SECONDS = 64 << 20, 2.0
"""How much data, and how much time, a kill can undo."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What `convert` was asked for."""

    source: Source
    output: Path
    options: ConvertOptions
    progress: Progress
    listing: str
    """Digest of the source's kind, classes and entries."""

    @property
    def form(self) -> Format:
        """How splits are stored."""
        return self.options.form

    @property
    def codec(self) -> EncodeOptions:
        """How images are stored."""
        return EncodeOptions(self.options.max_side, self.options.quality, self.options.allow_huge)

    @property
    def workers(self) -> int:
        """Number of processes."""
        return self.options.workers or usable_cores()

    @property
    def key(self) -> str:
        """Names everything that the bytes depend on: another key, another conversion."""
        jpeg, zlib = (features.version(name) for name in ("libjpeg_turbo", "zlib"))
        libraries = {"pillow": pillow_version, "libjpeg": jpeg or features.version("jpg"), "zlib": zlib}
        libraries["nvimgcodec"] = decoders.version()
        form = {"format": self.form.suffix, "layout": LAYOUT, **self.form.options}
        return json.dumps({"listing": self.listing, "codec": asdict(self.codec), **form, **libraries}, sort_keys=True)

    @property
    def described(self) -> str:
        """The source, human-readable; equal only for an equal listing."""
        return f"{self.source.origin} (listing {self.listing})"

    @property
    def codec_spec(self) -> dict[str, int]:
        """The codec as dataset.json has it; quality 0: not asked for."""
        return {"max_side": self.codec.max_side, "quality": self.codec.quality or 0, **self.form.options}

    def entries(self, split: str) -> list[Entry]:
        """Return a split's entries in the order in which they are written; the journal's records follow it."""
        entries = self.source.splits[split]
        return [entries[number] for number in self.form.order(len(entries)).tolist()]

    def paths(self, split: str, form: Format | None = None) -> tuple[Path, Path]:
        """Return where a split is in a format (None: the job's) when it is finished, and where until then."""
        name = split + (form or self.form).suffix
        return self.output / name, self.output / f"{name}.partial"


def journal_path(job: Job, split: str) -> Path:
    """Return where a split's journal is until dataset.json is published."""
    return job.output / f"{split}.journal"


def convert_split(job: Job, split: str) -> tuple[SplitSpec, list[str], list[str]]:
    """Convert one split, or finish what an interrupted run left.

    Returns:
        Its spec, and lines of name and reason: of images that were skipped, and of JPEGs that were re-encoded as not
        every decoder reads them alike.
    """
    entries = job.entries(split)
    final, unfinished = job.paths(split)
    _resume_or_clean(job, split)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_explain_disk_full(job, split, unfinished))
        journal = Journal(journal_path(job, split), job.key, job.form.written(unfinished))
        stack.callback(journal.close)
        writer = job.form.writer(unfinished, entries, journal.records)
        stack.callback(writer.close)
        _fill(job, split, entries, writer, journal)
        records = journal.all_records()
        labels = records["label"][records["stored"]]
        check_counts(job.source, split, np.bincount(labels, minlength=len(job.source.classes)))
        if not len(labels):
            raise UserError(f"{job.source.origin}: split {split} has no whole image")
        writer.finish(records)
    spec = _read_back(job, split, unfinished, records)
    unfinished.replace(final)
    sync_folder(job.output)
    order, stored = job.form.order(len(records)), records["stored"]
    said = sorted(journal.reasons, key=lambda number: order[number])
    lines = {number: f"{entries[number].name}\t{journal.reasons[number]}" for number in said}
    return spec, [lines[n] for n in said if not stored[n]], [lines[n] for n in said if stored[n]]


def _resume_or_clean(job: Job, split: str) -> None:
    """Make room for a split: go on with what a killed run had finished, remove what it had written in another format.

    Raises:
        UserError: there is a finished split, and nothing that says that it is of an interrupted conversion.
    """
    ours = journal_path(job, split).exists()
    final, unfinished = job.paths(split)
    if final.exists():
        if not ours:
            raise UserError(
                f"{final}: in the way, and not of this conversion", remedy="remove it, or convert elsewhere"
            )
        job.form.remove(unfinished)
        final.replace(unfinished)  # killed after this split and before the last: its index is checked once more
    for other in (beton(), shards()):
        if ours and other.suffix != job.form.suffix:
            for path in job.paths(split, other):
                other.remove(path)


def check_counts(source: Source, split: str, counts: np.ndarray) -> None:
    """Refuse a training split that has no image of some class."""
    empty = [name for name, count in zip(source.classes, counts, strict=True) if count == 0]
    if split == "train" and empty:
        raise UserError(
            f"{source.origin}: {len(empty)} of {len(source.classes)} classes have no whole image to train on",
            expected="at least one image of each class",
            found="none of " + ", ".join(empty[:20]) + (", ..." if len(empty) > 20 else ""),
            remedy="add images, or remove the class",
        )


def convert_batch(
    source: Source, codec: EncodeOptions, stored: Callable[[EncodedImage], EncodedImage], entries: Sequence[Entry]
) -> list[EncodedImage | str]:
    """Read and transcode some entries: a worker's task. A string says why an image is bad."""
    outcomes: list[EncodedImage | str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd but readable files
        for entry in entries:
            try:
                outcomes.append(stored(transcode(_read(source, entry), entry.name, codec)))
            except BadImageError as reason:
                outcomes.append(str(reason))
    return outcomes


def _read(source: Source, entry: Entry) -> bytes | np.ndarray:
    try:
        return source.read(entry)
    except OSError as error:
        raise DeitfastError(
            f"{entry.name}: cannot be read: {error.strerror or error}",
            remedy="make it readable and run the same command again; it goes on where it stopped",
        ) from error


def _fill(job: Job, split: str, entries: list[Entry], writer: Writer, journal: Journal) -> None:
    """Transcode and write whatever entries of the split the journal does not have yet."""
    done = len(journal.records)
    skipped = [number for number in sorted(journal.reasons) if not journal.records["stored"][number]]
    if skipped and not job.options.skip_bad:
        raise _bad(entries[skipped[0]], journal.reasons[skipped[0]])
    if done:
        log.info("%s: going on after %d of %d images of %s", job.output, done, len(entries), split)
    job.progress(split, done, len(entries), 0)
    batches = list(_batches(entries, done))
    work = partial(convert_batch, replace(job.source, splits={}), job.codec, job.form.stored)
    start = flushed_end = writer.end
    flushed_at = time.monotonic()
    workers = max(1, min(job.workers, len(batches)))
    with contextlib.closing(in_order(work, batches, workers)) as results:
        for outcomes in results:
            numbers = range(done, done + len(outcomes))
            done = numbers.stop
            _write(job, entries, numbers, outcomes, writer, journal)
            job.progress(split, done, len(entries), writer.end - start)
            if writer.end - flushed_end >= FLUSH_BYTES or time.monotonic() - flushed_at >= FLUSH_SECONDS:
                _flush(writer, journal)
                flushed_end, flushed_at = writer.end, time.monotonic()
    _flush(writer, journal)


def _write(
    job: Job,
    entries: list[Entry],
    numbers: range,
    outcomes: Sequence[EncodedImage | str],
    writer: Writer,
    journal: Journal,
) -> None:
    """Append a batch's samples to the data and to the journal, in order."""
    for number, outcome in zip(numbers, outcomes, strict=True):
        label = entries[number].label
        if isinstance(outcome, EncodedImage):
            offset = writer.append(outcome, label)
            size = len(outcome.data)
            record = (
                True, outcome.mode, int(outcome.kind), outcome.width, outcome.height, label, outcome.crc32, size, offset
            )  # fmt: skip
            journal.add(record, number, outcome.objection)
        elif job.options.skip_bad:
            journal.add((False, 0, 0, 0, 0, label, 0, 0, 0), number, outcome)
        else:
            _flush(writer, journal)
            raise _bad(entries[number], outcome)


def _flush(writer: Writer, journal: Journal) -> None:
    """Have the data on the disk, then the journal that speaks of it."""
    writer.sync()
    journal.flush()


def _bad(entry: Entry, reason: str) -> UserError:
    return UserError(
        f"{entry.name}: {reason}",
        expected="a whole image",
        remedy="mend or remove it, or leave out all such files with --skip-bad; what was converted so far is kept",
    )


def _batches(entries: Sequence[Entry], start: int) -> Iterator[Sequence[Entry]]:
    """Cut the entries from `start` on into the workers' tasks."""
    size = 0
    for number in range(start, len(entries)):
        size += entries[number].size
        if number + 1 - start >= BATCH_IMAGES or size >= BATCH_BYTES:
            yield entries[start : number + 1]
            start, size = number + 1, 0
    if start < len(entries):
        yield entries[start:]


def _read_back(job: Job, split: str, path: Path, records: np.ndarray) -> SplitSpec:
    """Read the finished file again, all of it, and describe it; its name is still the unfinished one."""
    order = job.form.order(len(records))[records["stored"]]
    stage, stored = f"{split}: reading back", records[records["stored"]][np.argsort(order)]
    try:
        reader = job.form.reader(path)
        damages = damaged_samples(reader, decode=False, workers=job.workers, stage=stage, progress=job.progress)
        wrong = f"{len(damages)} damaged samples, the first: {damages[0]}" if damages else ""
        if not np.array_equal(reader.crcs, stored["crc32"]):
            wrong = wrong or "another index"
    except DeitfastError as failure:
        wrong = str(failure)
    if wrong:
        job.form.remove(path)
        raise DeitfastError(
            f"{path}: what was written does not read back",
            found=wrong,
            remedy="check the disk and its file system; the same command starts this split again",
        )
    converted = count_kinds(stored["kind"])
    if skipped := len(records) - len(stored):
        converted["skipped"] = skipped
    spec = SplitSpec(
        file=job.paths(split)[0].name,
        samples=reader.num_samples,
        counts=tuple(np.bincount(reader.labels, minlength=len(job.source.classes)).tolist()),
        size=reader.file_size,
        index_crc32=reader.index_crc32,
        fingerprint=content_fingerprint(reader),
        converted=converted,
    )
    reader.close()
    return spec


@contextlib.contextmanager
def _explain_disk_full(job: Job, split: str, path: Path) -> Iterator[None]:
    """Turn a full disk into a DeitfastError that says how much room the rest of the split needs."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        planned = sum(entry.size for entry in job.source.splits[split])
        files = path.iterdir() if path.is_dir() else [path] if path.exists() else []
        written = sum(file.stat().st_blocks for file in files) * 512
        free = shutil.disk_usage(path.parent).free
        raise DeitfastError(
            f"{path}: no room to go on writing ({error.strerror})",
            expected=f"about {max(0, planned - written) / 2**20:,.0f} MiB more for split {split}",
            found=f"{free / 2**20:,.0f} MiB free",
            remedy="make room and run the same command again; it goes on where it stopped",
        ) from None
