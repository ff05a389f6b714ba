"""A study's result in words and tables of plain text: page, Markdown file and terminal show the same."""

from collections.abc import Mapping
from typing import Any

from deitfast.progress import duration
from deitfast.report.read import RunRecord
from deitfast.report.summary import TextTable
from deitfast.study.results import RowResult, StudyResult, format_figure
from deitfast.study.spec import SHARES
from pipelines.errors import pluralize

NONE = "–"  # noqa: RUF001  an en dash stands for no value
HEADINGS = {
    "top1": "top-1 (%)", "top5": "top-5 (%)", "f1": "F1", "auc": "AUC", "images_per_second": "images/s",
    "minutes": "minutes", "size": "px", "eager": "eager, images/s", "compiled": "compiled, images/s",
}  # fmt: skip


def lead(result: StudyResult) -> str:
    """Return how far the study is, in a sentence or two."""
    plan = result.plan
    rows = pluralize(len(result.rows), "row")
    if plan.study.kind == "throughput":
        return f"{rows}. Networks in evaluation, on random images that lie on the device."
    done, planned = (sum(getattr(row, name) for row in result.rows) for name in ("done", "planned"))
    seeds = "one seed" if plan.seeds == 1 else f"{plan.seeds} seeds"
    about = plan.study.scales.get(plan.options.scale)  # pyright: ignore
    scale = f"Scale {plan.options.scale}" + (f": {about.about}" if about and about.about else "")
    state = "" if done == planned else f" {done} of {pluralize(planned, 'run')} finished; the others do not count yet."
    return f"{rows}, {seeds} each. {scale.rstrip('.')}.{state}"


def spread_note(result: StudyResult) -> str:
    """Return what stands behind the plus-minus signs."""
    if result.plan.study.kind == "throughput":
        return "Mean and standard deviation of repeated measurements of one network."
    if result.plan.seeds == 1:
        return "One run of each row: how far another seed would be away is not known, so no difference is claimed."
    return (
        "Mean and standard deviation over seeds, which draw initialization, stochastic depth and dropout; all see the "
        "same views of the images. Figures are of the last epoch."
    )


def rows_table(result: StudyResult, rows: tuple[RowResult, ...] | None = None) -> TextTable:
    """Return a row of figures for every row of the study, each with what was published beside it."""
    rows = result.rows if rows is None else rows
    published = [column for column in result.plan.study.columns if any(column in row.published for row in rows)]
    head = ["row"]
    for column in result.plan.study.columns:
        head += [HEADINGS.get(column, column), *(["published"] if column in published else [])]
    cells = []
    for row in rows:
        line = [row.name if row.done == row.planned else f"{row.name} ({row.done} of {pluralize(row.planned, 'run')})"]
        for column in result.plan.study.columns:
            line.append(_cell(row, column))
            if column in published:
                line.append(published_figure(row.published, column))
        cells.append(line)
    return TextTable(head, cells)


def terminal_table(result: StudyResult) -> TextTable:
    """Return the same table for a terminal: what was published stands in parentheses under ours."""
    head = ["row", *(HEADINGS.get(column, column) for column in result.plan.study.columns)]
    lines = []
    for row in result.rows:
        cells = [_cell(row, column) for column in result.plan.study.columns]
        beside = [published_figure(row.published, column) for column in result.plan.study.columns]
        lines.append([row.name, *(a if b == NONE else f"{a}\n({b})" for a, b in zip(cells, beside, strict=True))])
    return TextTable(head, lines)


def _cell(row: RowResult, column: str) -> str:
    found = row.figures.get(column)
    if found is None:
        return NONE
    shown = format_figure(column, found.mean)
    return f"{shown} ± {format_figure(column, found.spread)}" if found.spread else shown


def published_figure(published: Mapping[Any, float], column: str) -> str:
    """Return what was published of a row, as our own figure is shown; an en dash where nothing was."""
    value = published.get(column)
    return NONE if value is None else format_figure(column, value / 100 if column in SHARES else value)


def claims_table(result: StudyResult) -> TextTable:
    """Return every claim with its verdict."""
    rows = [
        [f"{each.claim.better} better than {each.claim.than}", HEADINGS.get(each.claim.column, each.claim.column),
         each.claim.source or NONE, each.verdict, each.reason]
        for each in result.claims
    ]  # fmt: skip
    return TextTable(["claim", "by", "who says so", "verdict", "figures"], rows)


def time_table(result: StudyResult) -> TextTable:
    """Return where the time went, run by run."""
    rows = []
    for row in (*result.shared, *result.rows):
        for run in row.runs:
            rows.append([run.name, row.name, *_times(run)])
    unique = list({row[0]: row for row in rows}.values())
    return TextTable(["run", "row", "epochs", "training", "waiting for data (%)", "images/s"], unique)


def _times(run: RunRecord) -> list[str]:
    seconds = 3600 * max(run.hours().values(), default=0.0)
    waiting, rate = run.waiting(), run.rate()
    return [
        str(run.epochs[0]),
        duration(seconds),
        NONE if waiting is None else f"{100 * waiting:.1f}",
        NONE if rate is None else f"{rate:,.0f}",
    ]


def failures(result: StudyResult) -> list[str]:
    """Return what failed, a sentence each."""
    return [line for row in (*result.shared, *result.rows) for line in row.failures]


def machine_line(result: StudyResult) -> str:
    """Return where the runs were made."""
    machine = result.machine
    if not machine:
        return ""
    devices = machine.get("devices") or [machine.get("processor", "")]
    libraries = machine.get("libraries")
    versions = ", ".join(f"{k} {v}" for k, v in libraries.items() if v) if isinstance(libraries, dict) else ""
    where = ", ".join(map(str, devices)) if isinstance(devices, list) else str(devices)
    return "; ".join(part for part in (where, f"{machine.get('cores', '?')} cores", versions) if part)
