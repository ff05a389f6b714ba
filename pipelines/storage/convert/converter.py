"""Converts a source of images into a dataset folder: in parallel, atomically, and going on where it was stopped.

For each split: workers transcode, this process writes their results in the source's order to `<split>.beton.partial`
(or, as shards, into `<split>.wds.partial/`) and, behind the data, to `<split>.journal`. When all is written the index
is added, all of it is read back, and only then it gets its name. `dataset.json` comes last. The bytes depend on the
source and the options, on nothing else.
"""

import hashlib
import json
import logging
from pathlib import Path

import numpy as np

from pipelines.errors import UserError, pluralize
from pipelines.files import atomic_write, explain_os_error, file_lock
from pipelines.spec import DatasetSpec
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.convert.split import Job, check_counts, convert_split, journal_path
from pipelines.storage.dataset import (
    FORMAT,
    SPEC_FILE,
    Dataset,
    dataset_fingerprint,
    read_spec,
    write_spec,
)
from pipelines.storage.entry import Source
from pipelines.storage.image_kinds import KIND_NAMES, REMARKS
from pipelines.storage.verify import Progress

DEFAULTS = ConvertOptions()
SKIPPED_FILE, REENCODED_FILE = "skipped.txt", "reencoded.txt"
CLASSES_FILE = "classes.txt"
"""Next to shards: a class name a line, in label order, for other programs."""
SAID = {
    SKIPPED_FILE: ("image", "left out"),
    REENCODED_FILE: ("JPEG", "re-encoded or stored raw, as not every decoder reads it alike"),
}
GO_ON = "make room, or check the rights, and run the same command again; it goes on where it stopped"

log = logging.getLogger(__name__)


def convert(
    source: Source,
    output: Path | str,
    options: ConvertOptions = DEFAULTS,
    *,
    progress: Progress | None = None,
) -> DatasetSpec:
    """Convert a source into the dataset folder `output`; does nothing if exactly that is there already.

    Args:
        source: the images.
        output: the folder to make, or to go on with.
        options: how they are stored.
        progress: called with (stage, done, total, bytes written) as work gets done.

    Returns:
        What was written to dataset.json.

    Raises:
        UserError: a bad file, a class without images, or `output` holds something else.
        DeitfastError: the disk is full or a file cannot be read. The same command then goes on where this one stopped.
    """
    _check_source(source)
    job = Job(source, Path(output), options, progress or (lambda *_: None), _listing(source))
    with file_lock(job.output, "conversion"), explain_os_error(job.output, GO_ON):
        if (job.output / SPEC_FILE).exists():
            return _already_there(job)
        converted = {split: convert_split(job, split) for split in source.splits}
        splits = {split: spec for split, (spec, *_) in converted.items()}
        fingerprint = dataset_fingerprint(source.classes, {name: spec.fingerprint for name, spec in splits.items()})
        spec = DatasetSpec(
            format=FORMAT, name=source.kind, classes=source.classes, splits=splits, codec=job.codec_spec,
            source=job.described, fingerprint=fingerprint,
            val_fraction=options.val_fraction, val_seed=options.val_seed,
        )  # fmt: skip
        _write_lines(job.output / SKIPPED_FILE, [line for _, lines, _ in converted.values() for line in lines])
        _write_lines(job.output / REENCODED_FILE, [line for _, _, lines in converted.values() for line in lines])
        if options.form.suffix == ".wds":
            with atomic_write(job.output / CLASSES_FILE) as file:
                file.write("".join(f"{name}\n" for name in source.classes).encode(errors="backslashreplace"))
        for kind, remark in REMARKS.items():
            if count := sum(split.converted.get(KIND_NAMES[kind], 0) for split in splits.values()):
                log.warning("%s with %s", pluralize(count, "image"), remark)
        write_spec(job.output, spec)
        _remove_leftovers(job)
    return spec


def _write_lines(path: Path, lines: list[str]) -> None:
    """Write what is to be said of single images to a file, if there is any, and say so."""
    if lines:
        with atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
        thing, what = SAID[path.name]
        log.info("%s %s; %s says which and why", pluralize(len(lines), thing), what, path)


def _check_source(source: Source) -> None:
    """Refuse a source that cannot become a dataset."""
    if not source.splits or not any(source.splits.values()):
        raise UserError(
            f"{source.origin}: no images found", remedy="see `deitfast convert --help` for what is expected"
        )
    for split, entries in source.splits.items():
        if not entries:
            raise UserError(f"{source.origin}: no images in split {split}")
    counts = np.bincount([entry.label for entry in source.splits.get("train", ())], minlength=len(source.classes))
    if "train" in source.splits:
        check_counts(source, "train", counts)


def _listing(source: Source) -> str:
    """Return a digest of what the source holds by name, label and size; where it lies does not matter."""
    digest = hashlib.blake2b(json.dumps([source.kind, source.classes]).encode(), digest_size=8)
    for split, entries in source.splits.items():
        digest.update(f"\0{split}\0{len(entries)}".encode())
        for entry in entries:
            digest.update(f"\0{entry.name}\0{entry.label}\0{entry.size}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _already_there(job: Job) -> DatasetSpec:
    """Return the finished dataset's spec if it is what was asked for."""
    spec = read_spec(job.output)
    asked = (job.source.kind, job.source.classes, job.codec_spec, job.described)
    if (spec.name, spec.classes, spec.codec, spec.source) != asked:
        raise UserError(
            f"{job.output}: holds another dataset already",
            expected=_describe(
                job.source.kind, job.described, job.codec_spec, [job.paths(split)[0].name for split in spec.splits]
            ),
            found=_describe(spec.name, spec.source, spec.codec, [split.file for split in spec.splits.values()]),
            remedy="give another output folder, or remove this one",
        )
    dataset = Dataset(job.output, spec)
    for split in spec.splits:
        dataset.split(split)
    dataset.close()
    _remove_leftovers(job)
    log.info("%s: this dataset is there already; nothing to do", job.output)
    return spec


def _describe(kind: str, source: str, codec: dict[str, int], files: list[str]) -> str:
    """Return what a dataset is, human-readable."""
    options = ", ".join(f"{name} {value}" for name, value in codec.items())
    return f"{kind} from {source}, {options}, in {' and '.join(files)}"


def _remove_leftovers(job: Job) -> None:
    for split in job.source.splits:
        journal_path(job, split).unlink(missing_ok=True)
