"""What a report says in words and tables, as plain text: the page and the Markdown file show the same."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from deitfast.progress import duration
from deitfast.report.compare import DistillationPair, differences, format_value
from deitfast.report.read import WEIGHTS, RunRecord
from pipelines.errors import pluralize

FIGURES = {
    "top1": "top-1 (%)",
    "top5": "top-5 (%)",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "auc": "AUC",
    "loss": "loss",
}
"""A head's figures and their headings: F1, precision and recall are macro means, AUC is one class against the rest."""
SUMMED_UP = ("top1", "top5", "f1", "auc")
"""Those of them that stand in the table of the runs."""
TARGETS = {"exact": "exact targets", "reused": "reused views", "per_image": "per-image targets (not DeiT)"}
"""Which targets a student learned from, by `distill.targets`."""
LISTED = 10
"""Classes, and pairs of classes, that are named one by one where there are many."""
NONE = "–"  # noqa: RUF001  an en dash stands for no value
LONGEST_FIGURE = 24
"""Characters: 12 h 34 min, 1,234,567 ± 12,345; what is longer is text."""


@dataclass(frozen=True)
class TextTable:
    """A table of plain text; the first column names the rows."""

    head: list[str]
    rows: list[list[str]]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers in every row; never the first."""
        columns = zip(*self.rows, strict=True)
        return [number > 0 and all(map(_is_figure, column)) for number, column in enumerate(columns)]


def _is_figure(cell: str) -> bool:
    """Return whether a cell is a figure, perhaps with its unit or spread, or stands for one; a sentence is not."""
    return cell[:1] in "0123456789-<–" and len(cell) <= LONGEST_FIGURE  # noqa: RUF001


def title(runs: list[RunRecord]) -> str:
    """Return the report's title."""
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    run = runs[0]
    arch, data = run.settings.get("model.arch"), run.dataset
    return " on ".join(str(part) for part in (arch, data) if part) or run.name


def state(run: RunRecord) -> str:
    """Return how far a run is, in words."""
    done, planned = run.epochs
    if planned is None:
        return pluralize(done, "epoch")
    return f"{done} of {pluralize(planned, 'epoch')}" + ("" if run.finished else " (not finished)")


def lead(run: RunRecord) -> str:
    """Return one run in a sentence or two."""
    mode = run.settings.get("distill.mode", "none")
    teacher = str(run.settings.get("distill.teacher", "")).rstrip("/").rpartition("/")[2]
    how = f"{distillation(run.settings)}, from {teacher or 'a teacher'}" if mode != "none" else "no distillation"
    fraction = run.settings.get("train.fraction", 1.0)
    part = f", on {share(fraction)} % of the training images" if isinstance(fraction, float) and fraction < 1 else ""
    epoch, found = run.final()
    heads = found.get("val") or found.get("val_ema") or {}
    if not heads:
        return f"{state(run)}, {how}{part}. No evaluation is recorded."
    head = run.final_head(heads)
    images = int(heads[head].get("samples", 0))
    of = f", head “{head}”" if len(heads) > 1 else ""
    shown = f"Figures are of epoch {epoch}{of}" + (f", over {images:,} validation images." if images else ".")
    return f"{state(run)}, {how}{part}. {shown}"


def key_figures(run: RunRecord) -> list[tuple[str, str]]:
    """Return the few figures that sum up one run: (value with unit, name)."""
    found = run.final()[1]
    heads = found.get("val") or found.get("val_ema") or {}
    figures = heads.get(run.final_head(heads), {})
    figure = [
        (f"{share(figures.get('top1'))} %", "top-1"),
        (f"{share(figures.get('top5'))} %", "top-5"),
        (decimal(figures.get("f1")), "macro F1"),
        (time(run), "training time"),
        (rate(run), "images/s"),
        (f"{waiting(run)} %", "of the time waiting for data"),
    ]
    return [(value, name) for value, name in figure if not value.startswith(NONE)]


def runs_table(runs: list[RunRecord]) -> TextTable:
    """Return a row a run: what it was, its published head's figures, and what it took."""
    figure = [FIGURES[name] for name in SUMMED_UP]
    head = ["run", *figure, "network", "distillation", "data", "images used (%)", "epochs"]
    rows = []
    for run in runs:
        settings, heads = run.settings, run.final()[1].get("val", {})
        done, planned = run.epochs
        figures = heads.get(run.final_head(heads), {})
        rows.append(
            [
                run.name,
                *cells(figures, SUMMED_UP),
                str(settings.get("model.arch", NONE)),
                distillation(settings),
                run.dataset or NONE,
                share(settings.get("train.fraction"), "g"),
                f"{done}/{planned}" if planned else str(done),
                time(run),
                rate(run),
                waiting(run),
            ]
        )
    return TextTable([*head, "training time", "images/s", "waiting (%)"], rows)


def distillation(settings: Mapping[str, object]) -> str:
    """Return a run's distillation in a few words: none; hard, exact targets; ..."""
    mode = str(settings.get("distill.mode", NONE))
    if mode in ("none", NONE):
        return mode
    return f"{mode}, {TARGETS.get(str(settings.get('distill.targets', 'exact')), NONE)}"


def heads_table(runs: list[RunRecord]) -> TextTable:
    """Return a row for every head of every run, plain and averaged weights; runs are named where there are several."""
    several = len(runs) > 1
    rows = []
    for run in runs:
        for key, heads in run.final()[1].items():
            for head, figures in heads.items():
                own = [run.name] if several else []
                rows.append([*own, head, WEIGHTS[key], *cells(figures)])
    return TextTable([*(["run"] if several else []), "head", "weights", *FIGURES.values()], rows)


def differences_table(runs: list[RunRecord]) -> TextTable:
    """Return a row for every field of the recipe that is not the same in all runs."""
    found = differences(runs)
    return TextTable(["field", *(run.name for run in runs)], [[each.field, *each.values] for each in found])


def teachers_table(pairs: list[DistillationPair]) -> TextTable:
    """Return a row for every student: its teacher, the teacher's top-1 and its own."""
    rows = [
        [
            each.student.name,
            str(each.student.settings.get("model.arch", NONE)),
            each.mode,
            each.teacher,
            each.arch or NONE,
            share(each.top1),
            share(each.student.top1()),
        ]
        for each in pairs
    ]
    head = ["student", "its network", "distillation", "teacher", "teacher's network", "teacher's top-1 (%)"]
    return TextTable([*head, "student's top-1 (%)"], rows)


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """Return where and how a run was made, as far as its folder tells: (name, value)."""
    machine = run.environment
    libraries = machine.get("libraries")
    versions = libraries if isinstance(libraries, dict) else {}
    start = run.info.get("start")
    known = {
        "folder": str(run.path),
        "command": " ".join(map(str, run.info.get("command") or ())),
        "started from": start.get("file", "") if isinstance(start, dict) else "",
        "data set": f"{run.info['data']} (fingerprint {run.info.get('fingerprint')})" if "data" in run.info else "",
        "machine": ", ".join(map(str, machine.get("devices") or [machine.get("processor", "")])),
        "cores": str(machine.get("cores", "")),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "deitfast": str(machine.get("deitfast", "")),
    }
    extras = {name.replace("_", " "): value for name, value in run.extras().items()}
    return [(name, value) for name, value in (known | extras).items() if value]


def settings_table(run: RunRecord) -> TextTable:
    """Return every field of a run's recipe."""
    return TextTable(["field", "value"], [[field, format_value(value)] for field, value in run.settings.items()])


def recalls(confusion: np.ndarray) -> np.ndarray:
    """Return the share of each class's images that were recognized, float64 [C]; NaN for a class without images."""
    images = confusion.sum(1)
    return np.where(images > 0, confusion.diagonal() / np.maximum(images, 1), np.nan)


def confused(confusion: np.ndarray, classes: tuple[str, ...]) -> TextTable:
    """Return the pairs of classes that are taken for each other most often, by the number of images."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    images = confusion.sum(1)
    rows = []
    for true, predicted in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if count := int(wrong[true, predicted]):
            rows.append([classes[true], classes[predicted], f"{count:,}", share(count / images[true], ".1f")])
    return TextTable(["true class", "taken for", "images", "of the class (%)"], rows)


def extremes(confusion: np.ndarray, classes: tuple[str, ...], *, best: bool) -> TextTable:
    """Return the classes that are recognized best, or worst, with their images."""
    found = recalls(confusion)
    known = np.flatnonzero(~np.isnan(found))
    order = known[np.argsort(-found[known] if best else found[known], kind="stable")][:LISTED]
    rows = [[classes[n], share(float(found[n]), ".1f"), f"{int(confusion[n].sum()):,}"] for n in order]
    return TextTable(["class", "recognized (%)", "images"], rows)


def cells(figures: dict[str, float], names: Iterable[str] = FIGURES) -> list[str]:
    """Return the figures of those names: top-1 and top-5 in per cent, the others as they are."""
    return [share(figures.get(name)) if name in ("top1", "top5") else decimal(figures.get(name)) for name in names]


def share(value: object, form: str = ".2f") -> str:
    """Return a share in [0, 1] in per cent, without the sign."""
    return f"{100 * value:{form}}" if isinstance(value, int | float) else NONE


def decimal(value: float | None) -> str:
    """Return a figure with three decimals."""
    return NONE if value is None else f"{value:.3f}"


def time(run: RunRecord) -> str:
    """Return the time spent training, evaluation not counted."""
    return duration(3600 * max(run.hours().values())) if run.rows else NONE


def rate(run: RunRecord) -> str:
    """Return images/s over the run."""
    return NONE if (value := run.rate()) is None else f"{value:,.0f}"


def waiting(run: RunRecord) -> str:
    """Return the share of the training time spent waiting for data, in per cent."""
    if (value := run.waiting()) is None:
        return NONE
    return "<0.1" if 0 < value < 0.001 else f"{100 * value:.1f}"
