"""The commands that measure and show: bench, report, recipes, docs, doctor."""

import logging
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from deitfast.cli.app import (
    MEASURING,
    MODEL,
    OUTPUT,
    PREDICTION,
    Batch,
    Data,
    Device,
    Loader,
    Settings,
    app,
    complete_recipe,
    complete_setting,
    display,
    out,
)
from deitfast.config.choices import Arch
from pipelines.errors import UserError

log = logging.getLogger("deitfast")
CPU_BATCH = 64
"""Largest batch of `bench` on a CPU, if none is given."""


@app.command()
def bench(
    part: Annotated[
        str, typer.Argument(help="all, loader, step or train (loader and step together).", metavar="PART")
    ] = "all",
    data: Data = None,
    loader: Loader = None,
    arch: Annotated[
        Arch, typer.Option(metavar="ARCH", help="Architecture of the step.", rich_help_panel=MODEL)
    ] = "deit_ti",
    batch: Batch = None,
    settings: Settings = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.05, help="Shortest time of one measurement; each is made five times.", rich_help_panel=MEASURING
        ),
    ] = 0.5,
    try_: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="FIELD=VALUE",
            help="Predict this change of the recipe, or data=FOLDER, then measure it; repeatable.",
            autocompletion=complete_setting,
            rich_help_panel=MEASURING,
        ),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option("--baselines", help="Also measure other libraries on the same files.", rich_help_panel=MEASURING),
    ] = False,
    sizes: Annotated[
        bool,
        typer.Option(
            "--sizes",
            help="With --baselines: crops also of a few images as stored and at most 400, 160, 96 px.",
            rich_help_panel=MEASURING,
        ),
    ] = False,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Predict for this many machines like this one.", rich_help_panel=PREDICTION),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Predict for this many GPUs per machine.", rich_help_panel=PREDICTION)
    ] = None,
    network: Annotated[
        float,
        typer.Option(
            min=0.001,
            metavar="GBITS",
            help="Bandwidth between two machines, in Gbit/s.",
            rich_help_panel=PREDICTION,
        ),
    ] = 10.0,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write all measurements to this file.", rich_help_panel=OUTPUT)
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write an HTML page to this file.", rich_help_panel=OUTPUT)
    ] = None,
    device: Device = "auto",
) -> None:
    """Measure every stage of training in images/s; name the bottleneck and what would relieve it."""
    from contextlib import closing

    from deitfast.bench.page import page
    from deitfast.bench.record import save
    from deitfast.bench.run import BenchOptions, benchmark
    from deitfast.bench.scaling import Cluster
    from deitfast.bench.tables import show
    from deitfast.cli.data_facts import data_facts, data_folder
    from deitfast.cli.demo import make_demo_data
    from deitfast.cli.options import RecipeOptions, make_recipe
    from deitfast.runtime import choose_device, start
    from pipelines.files import write_text
    from pipelines.storage.dataset import Dataset

    shown, folder = display(), data_folder(data)
    cluster = Cluster(nodes or 1, gpus or 1, network) if nodes or gpus else None
    tries, command = tuple(try_ or ()), ("deitfast", *sys.argv[1:])
    wanted = BenchOptions(
        part, seconds, tries=tries, baselines=baselines, sizes=sizes, cluster=cluster, command=command
    )
    options = RecipeOptions.of(loader=loader, arch=arch, batch=batch, settings=settings)
    slow = choose_device(device, 0).type == "cpu" and part != "loader"
    recipe, notes = make_recipe(options, data_facts(folder), None, largest_batch=CPU_BATCH if slow else None)
    wanted = replace(wanted, notes=tuple(notes))
    make_demo_data(folder, shown)
    with closing(Dataset.open(folder)) as dataset, start(recipe.train, device) as runtime:
        found = benchmark(dataset, recipe, runtime, wanted, shown)
    out.print(show(found))
    if json_:
        save(found, json_)
    if html:
        write_text(html, page(found))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    out_: Annotated[
        Path | None,
        typer.Option(
            "--out", help="HTML page. Default: RUN/report.html; of several runs ./report.html.", rich_help_panel=OUTPUT
        ),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="Tables as Markdown. Default: the page's name with .md.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Report what runs have learned: an HTML page with curves, metrics, classes and sample images; a Markdown table."""
    from deitfast.report.write import PAGE, write_report

    display()
    page = out_ or (runs[0] / PAGE if len(runs) == 1 else Path(PAGE))
    table = markdown or page.with_suffix(".md")
    if page == table:
        raise UserError(f"{page} cannot be both page and table", remedy="name two files with --out and --markdown")
    for remark in write_report(runs, page, table):
        log.warning("%s", remark)
    for file in (page, table):
        out.print(f"wrote {file}", highlight=False, soft_wrap=True)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Show all fields of this recipe.", autocompletion=complete_recipe)
    ] = None,
) -> None:
    """List the built-in recipes, methods and ablations, or show one recipe as TOML."""
    from deitfast.cli.tables import ablation_table, method_table
    from deitfast.config import recipe

    if name:
        out.print(recipe.dump(recipe.load(name)), highlight=False)
        return
    for each in recipe.names():
        out.print(each, style="bold")
        out.print(recipe.head(each), highlight=False, style="dim")
    out.print(method_table())
    out.print(ablation_table())


def complete_document(incomplete: str) -> Iterable[str]:
    """Return the documents that begin so."""
    return (name for name in _documents() if name.startswith(incomplete))


def _documents() -> dict[str, Path]:
    """Return the documents that come with deitfast, by name."""
    import deitfast

    return {path.stem: path for path in sorted((Path(deitfast.__file__).parent / "docs").glob("*.md"))}


@app.command()
def docs(
    name: Annotated[str | None, typer.Argument(help="Print this document.", autocompletion=complete_document)] = None,
) -> None:
    """List the documents that come with deitfast, with their paths, or print one."""
    found = _documents()
    if name is None:
        for title, path in found.items():
            heading = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            out.print(f"{title}: {heading}\n  {path}", highlight=False, soft_wrap=True)
    elif name.removesuffix(".md") in found:
        out.print(found[name.removesuffix(".md")].read_text(encoding="utf-8"), highlight=False, soft_wrap=True)
    else:
        raise UserError(f"document not found: {name}", expected=f"one of: {', '.join(found)}")


@app.command()
def doctor() -> None:
    """Diagnose this machine: devices, memory, libraries, and which loaders work."""
    from deitfast.cli.tables import describe_machine

    out.print(describe_machine())
