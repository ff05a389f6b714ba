"""Several runs compared: what differs between their recipes, and what that changed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deitfast.config.recipe import RESUME_SAFE_FIELDS
from deitfast.report.read import RunRecord, number, read_run
from pipelines.errors import UserError

NOT_LEARNING = ("name", *RESUME_SAFE_FIELDS)
"""Fields that do not decide what is learned: runs that differ in nothing else are runs of one recipe."""
MISSING = "not recorded"


@dataclass(frozen=True)
class Difference:
    """One field of the recipe that is not the same in all runs."""

    field: str
    values: tuple[str, ...]
    """A value a run, in the runs' order."""


@dataclass(frozen=True)
class Efficiency:
    """Runs that differ in `train.fraction` alone: a curve of top-1 against the share of the data."""

    label: str
    points: tuple[tuple[float, float], ...]
    """(share of the training images, top-1), by rising share."""


@dataclass(frozen=True)
class DistillationPair:
    """A student and the teacher it was distilled from."""

    student: RunRecord
    mode: str
    teacher: str
    """Name of the teacher's folder."""
    arch: str
    """The teacher's network, "" where its folder is not there."""
    top1: float | None
    """The teacher's own top-1, None where its folder does not tell."""


def differences(runs: list[RunRecord]) -> list[Difference]:
    """Return the recipe's fields in which the runs differ, in the recipe's order."""
    fields = {key: None for run in runs if run.settings for key in run.settings}
    found = []
    for field in fields:
        values = [run.settings.get(field, MISSING) for run in runs]
        if any(value != values[0] for value in values):
            found.append(Difference(field, tuple(map(format_value, values))))
    return found


def format_value(value: Any) -> str:
    """Return a setting for a reader: on and off, lists with commas."""
    if isinstance(value, list | tuple):
        return ", ".join(map(format_value, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def notes_of(runs: list[RunRecord]) -> list[str]:
    """Return what a reader must know first: what cannot be compared, and what is missing of which run."""
    by_note: dict[str, list[str]] = {}
    for run in runs:
        for note in run.notes:
            by_note.setdefault(note, []).append(run.name)
    if len(runs) == 1:
        return list(by_note)
    return warnings(runs) + [f"{', '.join(names)}: {note}" for note, names in by_note.items()]


def warnings(runs: list[RunRecord]) -> list[str]:
    """Return what speaks against comparing the runs' figures, a sentence each."""
    found, first = [], runs[0]
    for run in runs[1:]:
        prints = [each.info.get("fingerprint") for each in (first, run)]
        if None not in prints and prints[0] != prints[1]:
            kinds = [each.dataset or "unknown" for each in (first, run)]
            data = f"{kinds[0]} and {kinds[1]}" if kinds[0] != kinds[1] else f"two versions of {kinds[0]}"
            found.append(
                f"{first.name} and {run.name} were trained on different data sets ({data}): "
                "their figures cannot be compared."
            )
    unknown = [run.name for run in runs if "fingerprint" not in run.info]
    if unknown and len(runs) > 1:
        found.append(f"Whether {', '.join(unknown)} had the same data set as the others is not known.")
    return found


def efficiency(runs: list[RunRecord]) -> list[Efficiency]:
    """Return curves of top-1 against `train.fraction`, one for each recipe otherwise the same; [] where it is one."""
    evaluated = [run for run in runs if run.top1() is not None and number(run.settings.get("train.fraction"))]
    if len({run.settings["train.fraction"] for run in evaluated}) < 2:
        return []
    fields = [each.field for each in differences(evaluated) if _learned(each.field) and each.field != "train.fraction"]
    curves: dict[str, list[tuple[float, float]]] = {}
    for run in evaluated:
        label = ", ".join(_short(field, run.settings.get(field, MISSING)) for field in fields)
        curves.setdefault(label, []).append((run.settings["train.fraction"], run.top1() or 0.0))
    return [Efficiency(label, tuple(sorted(points))) for label, points in curves.items()]


def distillation_pairs(runs: list[RunRecord]) -> list[DistillationPair]:
    """Return each distilled run with its teacher where the runs differ in their teachers; [] where they do not."""
    taught = [run for run in runs if run.settings.get("distill.mode", "none") != "none"]
    if len({str(run.settings.get("distill.teacher")) for run in taught}) < 2:
        return []
    found = []
    for run in taught:
        folder = Path(str(run.settings.get("distill.teacher", "")))
        try:
            teacher = read_run(folder)
        except UserError:
            teacher = None
        arch = str(teacher.settings.get("model.arch", "")) if teacher else ""
        mode = str(run.settings["distill.mode"])
        found.append(DistillationPair(run, mode, folder.name, arch, teacher.top1() if teacher else None))
    return found


def _learned(field: str) -> bool:
    return not field.startswith(NOT_LEARNING)


def _short(field: str, value: Any) -> str:
    """Return a setting in a legend: networks by their name alone, paths by their end."""
    if field == "model.arch":
        return str(value)
    text = format_value(value)
    return f"{field.partition('.')[2] or field} {Path(text).name if '/' in text else text}"
