"""The command `deitfast study`: many runs, one table."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from deitfast.cli.app import (
    OUTPUT,
    RUN,
    Data,
    Device,
    Settings,
    app,
    complete_study,
    display,
    out,
)
from pipelines.errors import DeitfastError, UserError, pluralize
from pipelines.workers import world_size

if TYPE_CHECKING:
    from deitfast.progress import Display
    from deitfast.report.summary import TextTable
    from deitfast.study.plan import StudyPlan
    from deitfast.study.results import StudyResult

log = logging.getLogger("deitfast")


@app.command()
def study(
    name: Annotated[
        str | None,
        typer.Argument(help="A built-in study or a TOML file. Without: list them.", autocompletion=complete_study),
    ] = None,
    data: Data = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="ROW", help="Only this row; repeatable.", rich_help_panel=RUN),
    ] = None,
    scale: Annotated[
        Literal["cpu", "gpu", "paper"] | None,
        typer.Option(help="How much is trained. Default: gpu where there is one, else cpu.", rich_help_panel=RUN),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="Runs of each row. Default: the scale's.", rich_help_panel=RUN),
    ] = None,
    settings: Settings = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, dealt out to the GPUs.", rich_help_panel=RUN)] = 1,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show every command, and what hours and GB to expect; train nothing.", rich_help_panel=RUN
        ),
    ] = False,
    out_: Annotated[
        Path | None, typer.Option("--out", help="Folder. Default: studies/NAME.", rich_help_panel=OUTPUT)
    ] = None,
    device: Device = "auto",
) -> None:
    """Train every row of a comparison, and answer it with one table; type it again to go on where it stopped."""
    from deitfast.cli.demo import DEMO_DATA, make_demo_data
    from deitfast.cli.options import data_facts, data_folder
    from deitfast.config.fit_to_data import DataFacts
    from deitfast.runtime import choose_device
    from deitfast.study.plan import StudyOptions, plan_study
    from deitfast.study.spec import load_study

    if name is None:
        out.print(_list_studies())
        return
    shown = display()
    spec, comment = load_study(name)
    timed = spec.kind == "throughput"
    if jobs > 1 and (world_size() > 1 or timed):
        raise UserError("--jobs goes neither with torchrun nor with a study that measures throughput")
    scale = scale or ("gpu" if choose_device(device, 0).type == "cuda" else "cpu")
    options = StudyOptions(
        data=Path("-") if timed else data_folder(data), out=out_ or Path("studies") / spec.name, scale=scale,
        seeds=1 if timed else seeds, only=tuple(only or ()), settings=tuple(settings or ()), device=device,
    )  # fmt: skip
    as_imagenet = DataFacts("imagenet", 256, (1300,) * 1000, "", validated=True)
    plan = plan_study(spec, options, (lambda _: as_imagenet) if timed else data_facts, DEMO_DATA, world_size())
    for note in plan.notes:
        log.info("%s", note)
    if dry_run:
        _predict(plan, shown)
        return
    for folder in {run.data for run in plan.runs if not timed}:
        make_demo_data(folder, shown)
    result = _measured(plan, shown) if timed else _trained(plan, comment, jobs, shown)
    if result:
        _show(result, comment)


def _list_studies() -> Table:
    from deitfast.config.builtin import study_names
    from deitfast.study.spec import load_study

    table = Table("study", "what it answers", "rows")
    for name in study_names():
        found, _ = load_study(name)
        table.add_row(name, found.title, ", ".join(found.row_names))
    return table


def _trained(plan: "StudyPlan", comment: str, jobs: int, shown: "Display") -> "StudyResult | None":
    """Train what is not finished, and write the files anew after each run; None on ranks other than 0."""
    import torch

    from deitfast.runtime import start
    from deitfast.study.page import write_study
    from deitfast.study.results import gather
    from deitfast.study.run import Failures, train_all, train_here, unfinished, write_recipes
    from deitfast.study.side_by_side import train_side_by_side
    from pipelines.files import file_lock

    _check_disk(plan)

    def told(failures: Failures) -> None:
        write_study(gather(plan, failures), comment)

    with start(plan.runs[0].recipe.train, plan.options.device) as runtime:
        main = runtime.is_main_process
        with file_lock(plan.options.out, "study") if main else nullcontext():
            if main:
                write_recipes(plan)
            if jobs > 1:
                failures = train_side_by_side(plan, jobs, torch.cuda.device_count(), told, runtime)
            else:
                left = runtime.broadcast_from_rank0([run.name for run in unfinished(plan)])
                failures = train_all(plan, left, train_here(plan, runtime, shown), told if main else lambda _: None)
    return gather(plan, failures) if main else None


def _measured(plan: "StudyPlan", shown: "Display") -> "StudyResult":
    from deitfast.runtime import start
    from deitfast.study.throughput import measure_throughput

    with start(plan.runs[0].recipe.train, plan.options.device) as runtime:
        return measure_throughput(plan, runtime, shown)


def _show(result: "StudyResult", comment: str) -> None:
    """Write the study's files, and print the table; raise if a row failed."""
    from deitfast.study import tables
    from deitfast.study.page import write_study

    files = write_study(result, comment)
    out.print(_rich(tables.terminal_table(result)))
    if any(row.published for row in result.rows):
        out.print("In parentheses: what was published.", highlight=False)
    out.print(tables.spread_note(result), highlight=False)
    for claim in result.claims:
        out.print(
            f"{claim.claim.better} better than {claim.claim.than}: {claim.verdict} ({claim.reason})", highlight=False
        )
    for file in files:
        out.print(f"wrote {file}", highlight=False, soft_wrap=True)
    if failed := tables.failures(result):
        raise DeitfastError(
            f"{len(failed)} of {pluralize(len(result.plan.runs), 'run')} failed", found="; ".join(failed),
            remedy="the same command trains what is missing",
        )  # fmt: skip


def _rich(table: "TextTable") -> Table:
    shown = Table()
    for heading, right in zip(table.head, table.numeric or [False] * len(table.head), strict=True):
        shown.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    return shown


def _check_disk(plan: "StudyPlan") -> None:
    """Refuse to begin what will not fit the disk."""
    import shutil

    from deitfast.progress import volume
    from deitfast.study.plan import disk_bytes
    from deitfast.study.run import unfinished

    left = unfinished(plan)
    needed = disk_bytes(left)
    folder = next(path for path in (plan.options.out, *plan.options.out.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DeitfastError(
            f"{plan.options.out}: not enough room for {pluralize(len(left), 'run')}",
            expected=volume(needed), found=volume(free), remedy="free some space, or give --out on another disk",
        )  # fmt: skip


def _predict(plan: "StudyPlan", shown: "Display") -> None:
    """Print every command, and what hours and GB to expect."""
    from deitfast.cli.demo import make_demo_data
    from deitfast.progress import duration, volume
    from deitfast.runtime import start
    from deitfast.study.plan import disk_bytes
    from deitfast.study.predict import predict_runs
    from deitfast.study.run import unfinished

    for command in plan.commands():
        out.print(command, highlight=False, soft_wrap=True)
    left = unfinished(plan)
    if plan.study.kind == "throughput" or not left:
        return
    for folder in {run.data for run in left}:
        make_demo_data(folder, shown)
    with start(plan.runs[0].recipe.train, plan.options.device) as runtime:
        predicted = list(predict_runs(plan, left, runtime, shown))
    table = Table("run", "predicted")
    for run in predicted:
        table.add_row(run.name, duration(run.seconds))
    out.print(table)
    total = sum(run.seconds for run in predicted)
    out.print(
        f"{len(left)} of {pluralize(len(plan.runs), 'run')} to be trained: {duration(total)} by one short measurement "
        f"of each network, evaluations not counted; {volume(disk_bytes(left))} on disk.",
        highlight=False,
    )
