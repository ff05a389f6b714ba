"""The report as one HTML file: style, plots and images inside, no script, nothing fetched."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from deitfast.report import figures, summary
from deitfast.report.compare import distillation_pairs, efficiency, notes_of
from deitfast.report.curves import panels, panels_caption
from deitfast.report.html import TEMPLATES, render
from deitfast.report.read import RunRecord
from deitfast.report.samples import ShownImage
from deitfast.report.summary import TextTable

Pictures = tuple[list[ShownImage], str]
"""A run's training images, and a sentence on what is missing of them."""
NAMED_CLASSES = 24
"""Most classes whose confusion matrix is written with names and counts, and whose accuracies are single bars."""
DRAWN_CLASSES = 200
"""Most classes whose confusion matrix is drawn at all: beyond them a cell is smaller than a pixel."""
NAME_LENGTH = 22
"""Letters of a class name on an axis."""


def page(runs: list[RunRecord], pictures: list[Pictures]) -> str:
    """Return the whole file.

    Args:
        runs: at least one.
        pictures: of each run.
    """
    curves = efficiency(runs)
    pairs = distillation_pairs(runs)
    return render(
        TEMPLATES / "report.html",
        title=summary.title(runs),
        several=len(runs) > 1,
        notes=notes_of(runs),
        key_figures=summary.key_figures(runs[0]),
        runs=[_run(*each) for each in zip(runs, pictures, strict=True)],
        panels=panels(runs),
        panels_caption=panels_caption(runs),
        heads_table=summary.heads_table(runs),
        joint=any("joint" in run.final()[1].get("val", {}) for run in runs),
        joint_predicts=all(run.settings.get("model.prediction", "auto") in ("auto", "joint") for run in runs),
        runs_table=summary.runs_table(runs),
        differences_table=summary.differences_table(runs),
        efficiency={"labels": [each.label for each in curves], "figure": figures.data_efficiency(curves)}
        if curves
        else None,
        teachers_table=summary.teachers_table(pairs) if pairs else None,
    )


def _run(run: RunRecord, pictures: Pictures) -> dict[str, Any]:
    """Return what the page shows of one run alone."""
    images, note = pictures
    return {
        "name": run.name,
        "lead": summary.lead(run),
        "classes": _classes(run),
        "images": images,
        "images_note": note,
        "images_caption": " ".join(_images_caption(run)),
        "facts": TextTable([], [list(pair) for pair in summary.facts(run)]),
        "settings": summary.settings_table(run),
    }


@dataclass(frozen=True)
class _Classes:
    """How well a run recognizes each class."""

    named: bool
    """Whether the classes are few enough to be named one by one."""
    matrix: Markup | None
    """The confusion matrix; None where there are too many classes to draw one."""
    matrix_caption: str
    accuracies: Markup
    confused: TextTable
    best: TextTable
    worst: TextTable


def _classes(run: RunRecord) -> _Classes | None:
    found = run.confusion()
    if found is None:
        return None
    head, confusion = found
    names, count = [_shortened(name) for name in run.classes], len(run.classes)
    named = count <= NAMED_CLASSES
    known = [(float(r), name) for r, name in zip(summary.recalls(confusion), names, strict=True) if not np.isnan(r)]
    known.sort(key=lambda pair: -pair[0])
    values = [value for value, _ in known]
    counts = "counts of images; " if named else ""
    return _Classes(
        named=named,
        matrix=figures.matrix(confusion, names, named=named) if count <= DRAWN_CLASSES else None,
        matrix_caption=f"Rows: true class; columns: prediction of head “{head}”; {counts}"
        "shade: square root of the share of the row. Validation split.",
        accuracies=figures.bars(values, [name for _, name in known]) if named else figures.ranked(values),
        confused=summary.confused(confusion, run.classes),
        best=summary.extremes(confusion, run.classes, best=True),
        worst=summary.extremes(confusion, run.classes, best=False),
    )


def _images_caption(run: RunRecord) -> Iterator[str]:
    yield "The first images of the run's first step, as the network gets them: cropped, augmented, mixed."
    smoothing = run.settings.get("train.smoothing")
    if isinstance(smoothing, float) and smoothing:
        yield f"Percentages are those of the mixture, before label smoothing of {smoothing:g}."
    if isinstance(repeats := run.settings.get("augment.repeats"), int) and repeats > 1:
        yield f"An epoch shows an image {repeats} times, each time in another view."


def _shortened(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
