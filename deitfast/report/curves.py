"""The curves of a report: loss, accuracy, learning rate and throughput of every run, by epoch and by time."""

from collections.abc import Callable

from markupsafe import Markup

from deitfast.report import figures
from deitfast.report.figures import Curve
from deitfast.report.read import RunRecord

DASHED_RUNS = 4
"""Most runs that get a second, dashed line in the same plot."""
Curves = list[tuple[RunRecord, Curve]]


def panels(runs: list[RunRecord]) -> list[Markup]:
    """Return eight plots: loss, top-1 and learning rate against epochs and against time, throughput, waiting."""
    hours = {run.name: run.hours() for run in runs}
    longest = max((value for each in hours.values() for value in each.values()), default=0.0)
    unit, scale = ("hours", 1.0) if longest >= 1 else ("minutes", 60.0)

    def by_time(run: RunRecord, curve: Curve) -> Curve:
        x = [scale * hours[run.name][int(epoch)] for epoch in curve.x]
        return Curve(curve.label, x, curve.y, curve.color, curve.dashed)

    learning = (
        ("loss", "", _losses(runs)),
        ("validation top-1 (%)", "share", _accuracies(runs)),
        ("learning rate", "rate", _one_each(runs, lambda run: run.series("lr"))),
    )
    drawn = []
    for title, form, curves in learning:
        legend = len(runs) == 1 and title != "learning rate"
        drawn.append(figures.panel(title, "epoch", [curve for _, curve in curves], unit=form, legend=legend))
    for title, form, curves in learning:
        drawn.append(figures.panel(title, f"{unit} of training", [by_time(*each) for each in curves], unit=form))
    for title, form, values in (
        ("images/s", "", RunRecord.rate_by_epoch),
        ("waiting for data (% of the time)", "part", RunRecord.waiting_by_epoch),
    ):
        drawn.append(figures.panel(title, "epoch", [curve for _, curve in _one_each(runs, values)], unit=form))
    return drawn


def panels_caption(runs: list[RunRecord]) -> str:
    """Return what the plots show, in sentences."""
    dashed = len(runs) <= DASHED_RUNS
    text = "Loss: the training loss, of augmented images"
    text += "; dashed: the validation loss of the published head." if dashed else "."
    if len(runs) > 1:
        text += " Top-1: the published head" + ("; dashed: averaged weights." if dashed else ".")
    return text + " Training time leaves evaluation out. The learning rate is that of each epoch's last step."


def _losses(runs: list[RunRecord]) -> Curves:
    found = []
    for number, run in enumerate(runs):
        found.append((run, Curve("training", *run.series("loss"), number)))
        if len(runs) <= DASHED_RUNS:
            found.append((run, Curve("validation", *run.evaluated("val", "", "loss"), number, dashed=True)))
    return found


def _accuracies(runs: list[RunRecord]) -> Curves:
    """A single run's heads one by one; of several runs the published heads."""
    found = []
    if len(runs) == 1:
        heads = list(runs[0].final()[1].get("val", {})) or ["class"]
        published = runs[0].final_head(dict.fromkeys(heads))
        heads.sort(key=lambda head: head != published)  # it gets the first color
        for number, head in enumerate(heads):
            found.append((runs[0], Curve(head, *runs[0].evaluated("val", head, "top1"), number)))
    else:
        found = _one_each(runs, lambda run: run.evaluated("val", "", "top1"))
    for number, run in enumerate(runs):
        averaged = run.evaluated("val_ema", "", "top1")
        if len(runs) <= DASHED_RUNS:
            found.append((run, Curve("averaged weights", *averaged, number, dashed=True)))
    return found


def _one_each(runs: list[RunRecord], values: Callable[[RunRecord], tuple[list[int], list[float]]]) -> Curves:
    return [(run, Curve(run.name, *values(run), number)) for number, run in enumerate(runs)]
