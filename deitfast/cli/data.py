"""The commands that make and check data sets: convert, info, verify."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from deitfast.cli.app import DATA, OUTPUT, RUN, app, display, out
from pipelines.choices import SourceKind, StoredFormat
from pipelines.errors import UserError

if TYPE_CHECKING:
    from deitfast.progress import Display
    from pipelines.spec import DatasetSpec
    from pipelines.storage.convert.options import ConvertOptions

log = logging.getLogger("deitfast")
MB = 1_000_000
SHOWN_DAMAGES = 20
"""Damaged samples that `verify` names one by one."""


@app.command()
def convert(
    kind: Annotated[
        SourceKind, typer.Argument(help="What SOURCE is.", metavar=f"KIND:{{{'|'.join(get_args(SourceKind))}}}")
    ],
    source: Annotated[
        Path | None, typer.Argument(help="Archive or folder. Default for imagenet: $IMAGENET_DIR, else ./imagenet.")
    ] = None,
    output: Annotated[Path | None, typer.Argument(help="Folder of the data set. Default: data/KIND.")] = None,
    val_fraction: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            help="Draw this share of each training class as val; the source's val is then test.",
            rich_help_panel=DATA,
        ),
    ] = 0.0,
    val_seed: Annotated[int, typer.Option(min=0, help="Seed of --val-fraction's draw.", rich_help_panel=DATA)] = 0,
    coarse: Annotated[
        bool,
        typer.Option(
            "--coarse", help="CIFAR-100's 20 coarse classes instead of the 100 fine ones.", rich_help_panel=DATA
        ),
    ] = False,
    labels: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="CSV, TSV or JSON Lines with the file name and the class of each image; repeatable.",
            rich_help_panel=DATA,
        ),
    ] = None,
    allow_huge: Annotated[
        bool,
        typer.Option(
            "--allow-huge",
            help="Read images of up to 500 million pixels, in up to 8 GB a worker, and shrink them to 179 million.",
            rich_help_panel=DATA,
        ),
    ] = False,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave out and list damaged files, instead of stopping.", rich_help_panel=DATA),
    ] = False,
    max_side: Annotated[
        int,
        typer.Option(
            min=0,
            help="Shrink larger images to this longest side, in pixels; 0: keep their size.",
            rich_help_panel=OUTPUT,
        ),
    ] = 0,
    quality: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100,
            help="Re-encode JPEGs at this quality where that makes them smaller.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    format_: Annotated[
        StoredFormat,
        typer.Option(
            "--format",
            help="beton: one file per split; wds: WebDataset tar shards with DALI indices.",
            rich_help_panel=OUTPUT,
        ),
    ] = "beton",
    shard_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000,
            help="Largest size of a shard in MB, with --format wds. Default: 1000.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Number of processes; 0: one per core.", rich_help_panel=RUN)] = 0,
) -> None:
    """Convert a data set to the files that loaders read. An interrupted conversion goes on where it stopped."""
    from deitfast.cli.tables import describe_dataset
    from pipelines.storage.convert.options import ConvertOptions
    from pipelines.storage.formats.format import named_format

    if kind == "demo" and output is None:
        source, output = None, source
    options = ConvertOptions(
        max_side=max_side, quality=quality, allow_huge=allow_huge, val_fraction=val_fraction, val_seed=val_seed,
        coarse=coarse, labels=tuple(labels or ()), form=named_format(format_, shard_size and shard_size * MB),
        skip_bad=skip_bad, workers=workers,
    )  # fmt: skip
    spec, folder = convert_dataset(kind, source, output, options, display())
    out.print(describe_dataset(spec, folder))


def convert_dataset(
    kind: SourceKind, source: Path | None, output: Path | None, options: "ConvertOptions", display: "Display"
) -> "tuple[DatasetSpec, Path]":
    """Convert and return what was written, and where.

    Raises:
        UserError: the source is missing or not what `kind` says; damaged files without `skip_bad`; another data set is
            in `output`.
        DeitfastError: the disk is full, or the source cannot be read.
    """
    from contextlib import closing

    from deitfast.progress import Bars
    from pipelines.storage.convert.converter import convert as convert_source
    from pipelines.storage.sources.factory import open_source

    source = source or _default_source(kind)
    if kind == "dataset" and output is None:
        raise UserError("convert dataset requires OUTPUT", expected=f"deitfast convert dataset {source} OUTPUT")
    output = output or Path("data") / kind
    with Bars(display) as bars:
        opened = open_source(
            kind, source, val_fraction=options.val_fraction, val_seed=options.val_seed, coarse=options.coarse,
            labels=options.labels, scratch=output, progress=bars.reach,
        )  # fmt: skip
        with closing(opened):
            for note in opened.notes:
                log.info("%s", note)
            return convert_source(opened, output, options, progress=bars.reach_images), output


def _default_source(kind: SourceKind) -> Path | None:
    """Return where a source is looked for when none is named; None for the demo set, which needs none.

    Raises:
        UserError: there is nothing, or no such rule for this kind.
    """
    if kind == "demo":
        return None
    if kind != "imagenet":
        raise UserError(
            f"convert {kind} requires SOURCE", expected=f"deitfast convert {kind} ARCHIVE_OR_FOLDER [OUTPUT]"
        )
    named = os.environ.get("IMAGENET_DIR")
    path = Path(named or "imagenet").expanduser()
    if not path.exists():
        raise UserError(
            f"ImageNet not found: {path} does not exist",
            expected="a folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or with train/ and val/",
            found=f"$IMAGENET_DIR is {named}" if named else "$IMAGENET_DIR is not set",
            remedy="deitfast convert imagenet FOLDER, or set IMAGENET_DIR",
        )
    return path


@app.command()
def info(folder: Annotated[Path, typer.Argument(help="A converted data set, a run or a teacher cache.")]) -> None:
    """Show what is in a data set, a run or a teacher cache."""
    from deitfast.cli.tables import describe_cache, describe_dataset, describe_run
    from deitfast.distill.cache import TeacherCache
    from deitfast.distill.cache_manifest import is_cache
    from deitfast.run_folder import RunFolder
    from pipelines.storage.dataset import read_spec

    run = RunFolder(folder)
    if is_cache(folder):
        out.print(describe_cache(TeacherCache.open(folder)))
    else:
        out.print(describe_run(run) if run.exists() else describe_dataset(read_spec(folder), folder))


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A converted data set or a teacher cache.")]) -> None:
    """Read a whole data set or teacher cache, compare it with its checksums, and decode every image."""
    from deitfast.distill.cache_manifest import is_cache

    if not (_verify_cache if is_cache(folder) else _verify_dataset)(folder, display()):
        raise typer.Exit(1)


def _verify_dataset(folder: Path, display: "Display") -> bool:
    """Check a data set, log what was found, and return whether all of it is intact."""
    from deitfast.progress import Bars
    from pipelines.storage.verify import verify

    with Bars(display) as bars:
        report = verify(folder, progress=bars.reach_images)
    for damage in report.damages[:SHOWN_DAMAGES]:
        sample = "" if damage.sample is None else f" sample {damage.sample} ({damage.label})"
        log.error("%s%s: %s", damage.split or "dataset.json", sample, damage.reason)
    if len(report.damages) > SHOWN_DAMAGES:
        log.error("... and %d more", len(report.damages) - SHOWN_DAMAGES)
    checked = ", ".join(f"{count:,} {name}" for name, count in report.samples.items())
    verdict = "all intact" if report.intact else f"{len(report.damages):,} damaged"
    how = "read and decoded" if report.unsealed else "read, compared with their CRC32 and decoded"
    log.info("%s: %s images %s: %s", folder, checked, how, verdict)
    if report.unsealed:
        log.info(
            "%d images have no CRC32, as FFCV writes none: a changed bit that decodes is not seen", report.unsealed
        )
    return report.intact


def _verify_cache(folder: Path, display: "Display") -> bool:
    """Read a whole teacher cache, log what is damaged, and return whether nothing is."""
    from deitfast.distill.cache import TeacherCache

    cache = TeacherCache.open(folder)
    damages = 0
    with display.bar(folder.name, cache.manifest.views) as bar:
        for done, problem in cache.check():
            bar.reach(done)
            damages += bool(problem)
            if problem:
                log.error("%s", problem)
    there, total = cache.count() if not damages else 0, cache.manifest.total
    intact = "intact and complete" if cache.complete else f"intact, {there / total:.1%} filled"
    log.info(
        "%s: %d views read and compared with their CRC32: %s",
        folder, cache.manifest.views, "damaged" if damages else intact,
    )  # fmt: skip
    return not damages
