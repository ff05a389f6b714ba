"""The commands that make and check data sets: convert, info, verify."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from deitfast.cli.app import app, display, out
from pipelines.choices import SourceKind
from pipelines.errors import UserError

KINDS: tuple[str, ...] = get_args(SourceKind)
MB = 1_000_000


@app.command()
def convert(
    kind: Annotated[str, typer.Argument(help=f"What SOURCE is: {', '.join(KINDS)}.")],
    source: Annotated[
        Path | None, typer.Argument(help="Archive or folder. Default for imagenet: $IMAGENET_DIR, else ./imagenet.")
    ] = None,
    output: Annotated[Path | None, typer.Argument(help="Folder of the data set. Default: data/KIND.")] = None,
    max_side: Annotated[
        int, typer.Option(min=0, help="Shrink larger images to this longest side, in pixels; 0: shrink none.")
    ] = 0,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Re-encode JPEGs at this quality, where that makes them smaller.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="beton: one file per split; wds: WebDataset tar shards with DALI's indices.")
    ] = "beton",
    shard_size: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Most MB in a shard, for --format wds. Default: 1000.")
    ] = None,
    val_fraction: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            help="Draw this share of each training class as val; the source's val is then test.",
        ),
    ] = 0.0,
    val_seed: Annotated[int, typer.Option(min=0, help="Seed of --val-fraction's draw.")] = 0,
    allow_huge: Annotated[
        bool,
        typer.Option("--allow-huge", help="Read images of up to 500 million pixels, in up to 4 GB a worker."),
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out damaged files and list them, instead of stopping.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one per core.")] = 0,
) -> None:
    """Convert a data set to the files that loaders read. Goes on where it was interrupted."""
    from deitfast.cli.datasets_impl import convert_dataset, describe_dataset
    from pipelines.storage.convert.options import ConvertOptions
    from pipelines.storage.formats.format import named_format

    if kind not in KINDS:
        raise UserError(f"there is no kind of data set called {kind}", expected=", ".join(KINDS))
    if kind == "demo" and output is None:
        source, output = None, source
    options = ConvertOptions(
        max_side=max_side,
        quality=quality,
        allow_huge=allow_huge,
        form=named_format(format_, shard_size and shard_size * MB),
        val_fraction=val_fraction,
        val_seed=val_seed,
        skip_bad=skip_bad,
        workers=workers,
    )
    spec, folder = convert_dataset(kind, source, output, options, display())
    out.print(describe_dataset(spec, folder))


@app.command()
def info(folder: Annotated[Path, typer.Argument(help="A converted data set, a run or a teacher cache.")]) -> None:
    """Say what is in a data set, a run or a teacher cache."""
    from deitfast.cli.datasets_impl import describe_dataset
    from deitfast.cli.tables import describe_cache, describe_run
    from deitfast.distill.cache import TeacherCache
    from deitfast.distill.cache_files import is_cache
    from deitfast.run_folder import RunFolder
    from pipelines.storage.dataset import read_spec

    run = RunFolder(folder)
    if is_cache(folder):
        out.print(describe_cache(TeacherCache.open(folder)))
    else:
        out.print(describe_run(run) if run.exists() else describe_dataset(read_spec(folder), folder))


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A converted data set or a teacher cache.")]) -> None:
    """Read all of a data set, decode every image and compare it with what was converted; or all of a teacher cache."""
    from deitfast.cli.datasets_impl import verify_cache, verify_dataset
    from deitfast.distill.cache_files import is_cache

    if not (verify_cache if is_cache(folder) else verify_dataset)(folder, display()):
        raise typer.Exit(1)
