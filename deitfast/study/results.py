"""What a study found: every row's figures over its seeds, and whether they show what was claimed."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deitfast.report.read import RunRecord, read_run
from deitfast.run_folder import RunFolder
from deitfast.study.plan import PlannedRow, StudyPlan, parameters
from deitfast.study.spec import Claim

SMALLER_IS_BETTER = ("loss", "minutes", "parameters")
"""Columns in which the better row has the smaller figure."""


@dataclass(frozen=True)
class Measurements:
    """One figure of one row."""

    values: tuple[float, ...]
    """One a finished run."""

    @property
    def mean(self) -> float:
        """Mean over the runs."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the runs; None: there is one run, which tells nothing of it."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class RowResult:
    """One row of the table."""

    name: str
    figures: dict[str, Measurements]
    """By column; a column without a finished run is left out."""
    published: Mapping[Any, float]
    runs: tuple[RunRecord, ...] = ()
    """Those that were begun."""
    done: int = 0
    """Runs that are finished."""
    planned: int = 0
    failures: tuple[str, ...] = ()
    """Why runs failed, a sentence each."""


@dataclass(frozen=True)
class ClaimResult:
    """A claim, and what the runs say of it."""

    claim: Claim
    verdict: str
    """shown, contradicted, not decided, or not measured."""
    reason: str
    """The figures behind it, in a sentence."""


@dataclass(frozen=True)
class StudyResult:
    """All that a study found so far."""

    plan: StudyPlan
    rows: tuple[RowResult, ...]
    shared: tuple[RowResult, ...] = ()
    """Teachers and pretrained networks."""
    claims: tuple[ClaimResult, ...] = ()
    machine: dict[str, object] = field(default_factory=dict)


def gather(plan: StudyPlan, failures: Mapping[str, str]) -> StudyResult:
    """Read what the runs of a plan have left.

    Args:
        plan: the study.
        failures: why a run failed, by its name.
    """
    rows = tuple(_row(plan, row, failures) for row in plan.rows)
    own = {name for row in plan.rows for name in row.runs}
    others = [run.name for run in plan.runs if run.name not in own]
    shared = tuple(_result(plan, name, (name,), ("val", "auto"), {}, failures) for name in others)
    records = [record for row in (*rows, *shared) for record in row.runs]
    machine = next((record.environment for record in records if record.environment), {})
    claims = tuple(judge(claim, rows) for claim in plan.study.claims)
    return StudyResult(plan, rows, shared, claims, machine)


def _row(plan: StudyPlan, row: PlannedRow, failures: Mapping[str, str]) -> RowResult:
    key = "val_ema" if row.row.weights == "averaged" else "val"
    return _result(plan, row.row.name, row.runs, (key, row.head), row.row.published, failures)


def _result(
    plan: StudyPlan, name: str, runs: tuple[str, ...], shown: tuple[str, str], published: Mapping[Any, float],
    failures: Mapping[str, str],
) -> RowResult:  # fmt: skip
    begun = [RunFolder(plan.folder(run)) for run in runs if RunFolder(plan.folder(run)).exists()]
    records = [read_run(folder.path) for folder in begun]
    done = [record for record in records if record.finished]
    found: dict[str, list[float]] = {}
    for record in done:
        for column, value in figures(record, *shown).items():
            found.setdefault(column, []).append(value)
    values = {column: Measurements(tuple(found[column])) for column in plan.study.columns if column in found}
    why = tuple(f"{run}: {failures[run]}" for run in runs if run in failures)
    return RowResult(name, values, published, tuple(records), len(done), len(runs), why)


def figures(record: RunRecord, weights: str = "val", head: str = "auto") -> dict[str, float]:
    """Return a finished run's figures by column, of its last epoch.

    Args:
        record: the run.
        weights: val: the weights as they are; val_ema: their average.
        head: whose prediction counts; auto, or a head that it does not have: the one that predicts.
    """
    heads = record.final()[1].get(weights, {})
    own = heads.get(head) or heads.get(record.final_head(heads), {})
    found = {name: own[name] for name in ("top1", "top5", "precision", "recall", "f1", "auc", "loss") if name in own}
    hours = record.hours()
    found["minutes"] = 60 * max(hours.values(), default=0.0)
    if (rate := record.rate()) is not None:
        found["images_per_second"] = rate
    if record.classes:
        found["parameters"] = parameters(RunFolder(record.path).recipe(), len(record.classes))
    return found


def judge(claim: Claim, rows: tuple[RowResult, ...]) -> ClaimResult:
    """Return whether every run of one row is better than every run of the other.

    Anything less is inside the spread, and no difference. Where nothing differs but chance, n and m runs come out so
    sorted in one of C(n + m, n) cases (the rank-sum test's smallest one-sided level).
    """
    measured = [_measured(name, claim.column, rows) for name in (claim.better, claim.than)]
    if measured[0] is None or measured[1] is None:
        missing = claim.better if measured[0] is None else claim.than
        return ClaimResult(claim, "not measured", f"there is no finished run of {missing}")
    sign = -1 if claim.column in SMALLER_IS_BETTER else 1
    better, than = ([sign * value for value in each.values] for each in measured if each)
    one, other = measured[0].mean, measured[1].mean
    numbers = f"{format_figure(claim.column, one)} against {format_figure(claim.column, other)}"
    cases = math.comb(len(better) + len(than), len(better))
    if min(len(better), len(than)) < 2:
        return ClaimResult(claim, "not decided", f"{numbers}: with one run of a row, its spread is not known")
    chance = f"by chance alone in 1 of {cases} cases"
    if min(better) > max(than):
        return ClaimResult(claim, "shown", f"{numbers}, every run better than every run; {chance}")
    if max(better) < min(than):
        return ClaimResult(claim, "contradicted", f"{numbers}, every run worse than every run; {chance}")
    return ClaimResult(claim, "not decided", f"{numbers}: the difference is inside the spread over seeds")


def _measured(name: str, column: str, rows: tuple[RowResult, ...]) -> Measurements | None:
    return next((row.figures.get(column) for row in rows if row.name == name), None)


def format_figure(column: str, value: float | None) -> str:
    """Return a figure as the table shows it; shares in per cent."""
    if value is None:
        return "–"  # noqa: RUF001
    match column:
        case "top1" | "top5":
            return f"{100 * value:.2f}"
        case "minutes":
            return f"{value:.1f}"
        case "parameters" | "size":
            return f"{value:,.0f}"
        case "images_per_second" | "eager" | "compiled":
            return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:.3f}"
