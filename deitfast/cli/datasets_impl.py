"""The data set commands: convert, info, verify."""

import logging
import os
from contextlib import ExitStack, closing
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from deitfast.distill.cache import TeacherCache
from deitfast.progress import Bar, Display
from pipelines.errors import UserError
from pipelines.spec import DatasetSpec
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.sources.factory import open_source
from pipelines.storage.verify import verify

log = logging.getLogger("deitfast")
MB = 1_000_000
SHOWN_DAMAGES = 20
"""Damaged samples that `verify` names one by one."""


def convert_dataset(
    kind: str, source: Path | None, output: Path | None, options: ConvertOptions, display: Display
) -> tuple[DatasetSpec, Path]:
    """Convert and return what was written, and where.

    Raises:
        UserError: the source is missing or not what `kind` says; damaged files without `skip_bad`; another data set is
            in `output`.
        DeitfastError: the disk is full, or the source cannot be read.
    """
    source = source or _default_source(kind)
    if kind == "dataset" and output is None:
        raise UserError("convert dataset needs an output", expected=f"deitfast convert dataset {source} OUTPUT")
    output = output or Path("data") / kind
    bars = _Bars(display)
    with bars:
        opened = open_source(
            kind, source, val_fraction=options.val_fraction, val_seed=options.val_seed, scratch=output,
            progress=bars.listing,
        )  # fmt: skip
        with closing(opened):
            for note in opened.notes:
                log.info("%s", note)
            return convert(opened, output, options, progress=bars.images), output


def _default_source(kind: str) -> Path | None:
    """Return where a source is looked for when none is named.

    Raises:
        UserError: there is nothing, or no such rule for this kind.
    """
    if kind == "demo":
        return None
    if kind != "imagenet":
        raise UserError(
            f"convert {kind} needs a source", expected=f"deitfast convert {kind} ARCHIVE_OR_FOLDER [OUTPUT]"
        )
    named = os.environ.get("IMAGENET_DIR")
    path = Path(named or "imagenet")
    if not path.exists():
        raise UserError(
            "there is no ImageNet to convert",
            expected="a folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or with train/ and val/",
            found=f"no {path}" + (" ($IMAGENET_DIR)" if named else ", and $IMAGENET_DIR is not set"),
            remedy="deitfast convert imagenet FOLDER, or set IMAGENET_DIR",
        )
    return path


class _Bars(ExitStack):
    """One bar at a time: a new one whenever the work has a new name."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display, self._name = display, ""
        self._bar: Bar | None = None

    def listing(self, what: str, done: int, total: int) -> None:
        """Show how far opening the source is."""
        self._named(what, total).reach(done, total=total)

    def images(self, stage: str, done: int, total: int, size: int) -> None:
        """Show how many of a split's images are done, and how fast."""
        bar = self._named(stage, total, done)
        bar.reach(done, f"{bar.rate():,.0f} images/s, {size / MB:,.0f} MB")

    def _named(self, name: str, total: int, done: int = 0) -> Bar:
        if self._bar is None or name != self._name:
            self.close()
            self._name, self._bar = name, self.enter_context(self._display.bar(name, total))
            self._bar.start(done)
        return self._bar


def describe_dataset(spec: DatasetSpec, folder: Path) -> RenderableType:
    """Return what `deitfast info` shows of a data set."""
    table = Table(title=f"{folder}: {spec.name}, {len(spec.classes):,} classes", title_justify="left")
    table.add_column("split")
    table.add_column("stored in")
    for column in ("images", "of a class", "MB"):
        table.add_column(column, justify="right")
    table.add_column("how they were stored")
    for name, split in spec.splits.items():
        low, high = min(split.counts), max(split.counts)
        each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        stored = ", ".join(f"{count:,} {kind}" for kind, count in split.converted.items() if count)
        table.add_row(name, split.file, f"{split.samples:,}", each, f"{split.size / MB:,.1f}", stored)
    shown = ", ".join(spec.classes[:10]) + (", ..." if len(spec.classes) > 10 else "")
    return Group(table, f"classes: {shown}", f"source: {spec.source}", f"fingerprint: {spec.fingerprint}")


def verify_dataset(folder: Path, display: Display) -> bool:
    """Check a data set, log what was found, and return whether all of it is whole."""
    with _Bars(display) as bars:
        report = verify(folder, progress=bars.images)
    for damage in report.damages[:SHOWN_DAMAGES]:
        sample = "" if damage.sample is None else f" sample {damage.sample} ({damage.label})"
        log.error("%s%s: %s", damage.split or "dataset.json", sample, damage.reason)
    if len(report.damages) > SHOWN_DAMAGES:
        log.error("... and %d more", len(report.damages) - SHOWN_DAMAGES)
    checked = ", ".join(f"{count:,} {name}" for name, count in report.samples.items())
    verdict = "all whole" if report.intact else f"{len(report.damages):,} damaged"
    log.info("%s: %s images read, compared with their CRC32 and decoded: %s", folder, checked, verdict)
    return report.intact


def verify_cache(folder: Path, display: Display) -> bool:
    """Read a teacher cache whole, log what is damaged, and return whether nothing is."""
    cache = TeacherCache.open(folder)
    damages = 0
    with display.bar(folder.name, cache.manifest.views) as bar:
        for done, problem in cache.check():
            bar.reach(done)
            damages += bool(problem)
            if problem:
                log.error("%s", problem)
    there, total = cache.count() if not damages else 0, cache.manifest.total
    verdict = "damaged" if damages else "whole and complete" if cache.complete else f"whole, {there / total:.1%} filled"
    log.info("%s: %d views read and compared with their CRC32: %s", folder, cache.manifest.views, verdict)
    return not damages
