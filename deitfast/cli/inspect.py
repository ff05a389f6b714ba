"""The commands that look: bench, report, doctor."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from deitfast.cli.app import Data, Device, Settings, app, display, out


@app.command()
def bench(
    part: Annotated[str, typer.Argument(help="all, loader, step or train (loader and step together).")] = "all",
    data: Data = None,
    arch: Annotated[str, typer.Option(help="Network of the step.")] = "deit_ti",
    batch: Annotated[int | None, typer.Option(help="Images in a batch. Default: the recipe's.")] = None,
    seconds: Annotated[
        float, typer.Option(min=0.05, help="Least time of one measurement; each is made five times.")
    ] = 0.5,
    settings: Settings = None,
    try_: Annotated[
        list[str] | None,
        typer.Option("--try", metavar="A.B=VALUE", help="Predict this change, then measure it; or data=FOLDER."),
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also measure timm, FFCV and DALI on the same files.")
    ] = False,
    nodes: Annotated[int, typer.Option(min=1, help="Predict for that many machines like this one.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="Predict for that many GPUs a machine.")] = 1,
    network: Annotated[float, typer.Option(metavar="GBITS", help="Bandwidth between two nodes, in Gbit/s.")] = 10.0,
    json_: Annotated[Path | None, typer.Option("--json", help="Write every measurement here, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write an HTML page here.")] = None,
    device: Device = "auto",
) -> None:
    """Measure every stage of training in images/s, say which one holds it back, and what would lift it."""
    from deitfast.bench.run import BenchOptions
    from deitfast.bench.scaling import Cluster
    from deitfast.cli.commands import BenchTarget, run_bench

    cluster = Cluster(nodes, gpus, network) if nodes > 1 or gpus > 1 else None
    tries, command = tuple(try_ or ()), tuple(sys.argv)
    options = BenchOptions(part, seconds, tries=tries, baselines=baselines, cluster=cluster, command=command)
    run_bench(BenchTarget(data, arch, batch, tuple(settings or ()), json_, html), options, device, display(), out)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; several are compared.")],
    out_: Annotated[
        Path | None, typer.Option("--out", help="The page. Default: RUN/report.html; of several runs ./report.html.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="The tables as Markdown. Default: beside the page, .md for .html.")
    ] = None,
) -> None:
    """Show what runs have learned: one HTML page with curves, metrics, classes and sample images; a Markdown table."""
    from deitfast.cli.commands import run_report

    display()
    run_report(runs, out_, markdown, out)


@app.command()
def doctor() -> None:
    """Say what this machine has, and which loaders and devices will work."""
    from deitfast.cli.doctor import examine

    out.print(examine())
