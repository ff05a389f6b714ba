"""The parts of the page, each from the runs to an element."""

from collections.abc import Sequence

import numpy as np

from deitfast.eval.evaluate import final_head
from deitfast.report import figures, summary
from deitfast.report.compare import efficiency, lessons
from deitfast.report.figures import COLORS, Curve
from deitfast.report.markup import Html, table, tag
from deitfast.report.read import RunRecord
from deitfast.report.samples import Sample
from deitfast.report.summary import TextTable

NAMED_CLASSES = 24
"""Most classes whose confusion matrix is written with names and counts, and whose accuracies are single bars."""
DRAWN_CLASSES = 200
"""Most classes whose confusion matrix is drawn at all: beyond them a cell is smaller than a pixel."""
DASHED_RUNS = 4
"""Most runs that get a second, dashed line in the same plot."""
NAME_LENGTH = 22
"""Letters of a class name on an axis."""


def curves(runs: list[RunRecord]) -> Html:
    """Return loss, top-1 and learning rate against epochs and against time, then throughput."""
    by_time = {run.name: run.hours() for run in runs}
    longest = max((hours for each in by_time.values() for hours in each.values()), default=0.0)
    unit, scale = ("hours", 1.0) if longest >= 1 else ("minutes", 60.0)
    panels = []
    for x_label, clock in (("epoch", None), (f"{unit} of training", by_time)):
        for title, form, lines in (
            ("loss", "", _losses(runs)),
            ("top-1 (%)", "share", _accuracies(runs)),
            ("learning rate", "rate", _one_each(runs, "lr")),
        ):
            moved = [_against(line, run, clock, scale) for run, line in lines]
            legend = len(runs) == 1 and title != "learning rate" and clock is None
            panels.append(figures.panel(title, x_label, moved, unit=form, legend=legend))
    speed = [line for _, line in _one_each(runs, "images_per_second")]
    panels.append(figures.panel("images/s", "epoch", speed))
    waiting = [_waiting(number, run) for number, run in enumerate(runs)]
    panels.append(figures.panel("waiting for data (% of the time)", "epoch", waiting, unit="part"))
    said = "Loss: the training loss, of augmented images"
    said += "; dashed: the validation loss of the published head." if len(runs) <= DASHED_RUNS else "."
    if len(runs) > 1:
        said += " Top-1: the published head" + ("; dashed: averaged weights." if len(runs) <= DASHED_RUNS else ".")
    said += " Training time leaves evaluation out. The learning rate is that of each epoch's last step."
    return _section("Learning", key(runs), tag("div", *panels, class_="panels"), tag("p", said, class_="soft"))


def key(runs: list[RunRecord]) -> Html:
    """Return which color is which run; nothing for a single one."""
    return _key([run.name for run in runs]) if len(runs) > 1 else Html()


def chip(number: int) -> Html:
    """Return a run's color as a dot; from the ninth run on as a dash."""
    class_ = "chip" if number < COLORS else "chip repeated"
    return tag("span", class_=class_, style=f"color: var(--run-{number % COLORS})")


def comparison(runs: list[RunRecord]) -> Html:
    """Return how the recipes differ, and what share of the data and teacher did; nothing for a single run."""
    if len(runs) == 1:
        return Html()
    parts = []
    differences = summary.differences_table(runs)
    if differences.rows:
        parts.append(_section("What differs between the recipes", text_table(differences)))
    else:
        parts.append(_section("What differs between the recipes", tag("p", "Nothing: all runs have the same recipe.")))
    if found := efficiency(runs):
        said = "Validation top-1 of the published head against the share of the training images that were used."
        names = _key([each.label for each in found]) if len(found) > 1 else Html()
        figure = tag("figure", figures.data_efficiency(found), tag("figcaption", said), class_="single")
        parts.append(_section("Data efficiency", names, figure))
    if taught := lessons(runs):
        parts.append(_section("Teachers and students", text_table(summary.lessons_table(taught))))
    return tag("", *parts)


def classes(run: RunRecord) -> Html:
    """Return which classes a run tells apart: confusion matrix, accuracy of each class, most confused pairs."""
    found = run.confusion()
    if found is None:
        return tag("p", "No confusion matrix is recorded for this run.", class_="soft")
    head, confusion = found
    names, count = [_shortened(name) for name in run.classes], len(run.classes)
    recalls = summary.recalls(confusion)
    parts: list[Html] = []
    beside: list[Html] = []
    if count <= DRAWN_CLASSES:
        told = "counts of images; " if count <= NAMED_CLASSES else ""
        caption = f"Rows: truth; columns: prediction of head “{head}”; {told}shade: square root of the row's share."
        drawn = figures.matrix(confusion, names, named=count <= NAMED_CLASSES)
        parts.append(tag("figure", drawn, tag("figcaption", caption), class_="single"))
    known = [(float(value), name) for value, name in zip(recalls, names, strict=True) if not np.isnan(value)]
    if count <= NAMED_CLASSES:
        known.sort(key=lambda pair: -pair[0])
        drawn = figures.bars([value for value, _ in known], [name for _, name in known])
        beside.append(tag("figure", drawn, tag("figcaption", "Share of each class's validation images recognized.")))
    else:
        drawn = figures.ranked([value for value, _ in known])
        parts.append(tag("figure", drawn, tag("figcaption", f"Accuracy of {len(known):,} classes, best to worst.")))
        for best in (False, True):
            title = "Recognized best" if best else "Recognized worst"
            parts.append(text_table(summary.extremes(confusion, run.classes, best=best), title))
    beside.append(text_table(summary.confused(confusion, run.classes), "Taken for each other most often"))
    return tag("div", *parts, tag("div", *beside), class_="columns")


def samples(run: RunRecord, pictures: Sequence[Sample], note: str) -> Html:
    """Return what the network sees: images after augmentation with their targets."""
    parts = [tag("p", note, class_="soft")] if note else []
    if not pictures:
        return tag("", *parts)
    said = "The first images of the run's first step, as the network gets them: cropped, augmented, mixed."
    smoothing = run.settings.get("train.smoothing")
    if smoothing:
        said += f" Shares are those of the mixture, before label smoothing of {smoothing:g}."
    if isinstance(repeats := run.settings.get("augment.repeats"), int) and repeats > 1:
        said += f" An epoch shows an image {repeats} times, each time in another view."
    parts.append(tag("p", said, class_="soft"))
    parts.append(tag("ul", *map(_picture, pictures), class_="samples"))
    return tag("", *parts)


def text_table(plain: TextTable, caption: str = "", *, chips: bool = False) -> Html:
    """Return a table with its numbers to the right; `chips` puts the runs' colors before the first column."""
    if not plain.rows:
        return tag("p", "Nothing is recorded.", class_="soft")
    columns = list(zip(*plain.rows, strict=True))
    numeric = [n > 0 and all(cell[:1] in "0123456789-<–" for cell in column) for n, column in enumerate(columns)]  # noqa: RUF001
    right = ["number" if each else None for each in numeric]
    rows = []
    for number, row in enumerate(plain.rows):
        first = tag("", chip(number), row[0]) if chips else row[0]
        rows.append([first, *row[1:]])
    return table(plain.head, rows, right, caption=caption)


def _key(names: list[str]) -> Html:
    return tag("ul", *(tag("li", chip(number), name) for number, name in enumerate(names)), class_="key")


def _section(title: str, *inner: str) -> Html:
    return tag("section", tag("h2", title), *inner)


def _losses(runs: list[RunRecord]) -> list[tuple[RunRecord, Curve]]:
    found = []
    for number, run in enumerate(runs):
        found.append((run, Curve("training", *run.series("loss"), number)))
        if len(runs) <= DASHED_RUNS:
            found.append((run, Curve("validation", *run.evaluated("val", "", "loss"), number, dashed=True)))
    return found


def _accuracies(runs: list[RunRecord]) -> list[tuple[RunRecord, Curve]]:
    """A single run's heads one by one; of several runs the published heads."""
    found = []
    if len(runs) == 1:
        heads = list(runs[0].final()[1].get("val", {})) or ["class"]
        published = final_head(dict.fromkeys(heads))
        heads.sort(key=lambda head: head != published)  # it gets the first color
        for number, head in enumerate(heads):
            found.append((runs[0], Curve(head, *runs[0].evaluated("val", head, "top1"), number)))
    else:
        found = [(run, Curve(run.name, *run.evaluated("val", "", "top1"), n)) for n, run in enumerate(runs)]
    for number, run in enumerate(runs):
        averaged = run.evaluated("val_ema", "", "top1")
        if len(runs) <= DASHED_RUNS:
            found.append((run, Curve("averaged weights", *averaged, number, dashed=True)))
    return found


def _one_each(runs: list[RunRecord], name: str) -> list[tuple[RunRecord, Curve]]:
    return [(run, Curve(run.name, *run.series(name), number)) for number, run in enumerate(runs)]


def _waiting(number: int, run: RunRecord) -> Curve:
    seconds, waited = (dict(zip(*run.series(name), strict=True)) for name in ("seconds", "waited_seconds"))
    shares = {epoch: waited[epoch] / seconds[epoch] for epoch in waited if seconds.get(epoch, 0) > 0}
    return Curve(run.name, list(shares), list(shares.values()), number)


def _against(line: Curve, run: RunRecord, clock: dict[str, dict[int, float]] | None, scale: float) -> Curve:
    """Return the curve over training time instead of epochs, where there is a clock."""
    if clock is None:
        return line
    hours = clock[run.name]
    return Curve(line.label, [scale * hours[int(epoch)] for epoch in line.x], line.y, line.color, line.dashed)


def _picture(sample: Sample) -> Html:
    """One image with its target, its teacher's label and what was done to it."""
    if len(sample.target) == 1:
        target = tag("b", sample.target[0][0])
    else:
        shares = sorted(sample.target, key=lambda pair: -pair[1])
        parts = [tag("span", tag("b", name), f" {100 * share:.0f} %", class_="part") for name, share in shares]
        target = tag("", *parts)
    teacher = tag("span", f"teacher: {sample.teacher}", class_="soft") if sample.teacher else Html()
    done = tag("span", ", ".join(sample.done) or "cropped only", class_="soft")
    class_ = "pixels" if sample.side <= 64 else None
    words = " and ".join(name for name, _ in sample.target)
    return tag("li", tag("img", src=sample.image, alt=f"training image: {words}", class_=class_), target, teacher, done)


def _shortened(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
