"""Figures as SVG to stand inside a page: its fonts, its colors in light and dark, the same bytes for the same run.

matplotlib's objects are used without pyplot, so nothing global is changed and no display is looked for. It cannot
write CSS variables, so figures are drawn in stand-in colors, which are replaced in the finished SVG.
"""

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from deitfast.report.compare import Efficiency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = 8
"""Colors for runs and heads (Okabe and Ito's, distinct for color-blind readers); the ninth run is dash-dotted."""
INK, SOFT, LINE, ACCENT = "#010101", "#010102", "#010103", "#010104"
STAND_IN = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", ACCENT: "var(--accent)"} | {
    f"#0201{number:02x}": f"var(--run-{number})" for number in range(COLORS)
}
PANEL = (3.7, 2.6)
"""Inches of one panel; a browser's 355 x 250 pixels."""
COLUMN = 4.6
"""Inches in width of a figure that has half of the page, or all of a telephone."""
MARKED = 30
"""Most points of a curve that are marked one by one."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "text.color": INK,
    "text.parse_math": False,  # class names are no formulas
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    """Number of its color, from 0."""
    dashed: bool = False


def panel(
    title: str,
    x_label: str,
    curves: Iterable[Curve],
    *,
    unit: str = "",
    legend: bool = False,
    size: tuple[float, float] = PANEL,
) -> Markup:
    """Return one small plot; curves without points are left out.

    Args:
        title: what the vertical axis shows.
        x_label: of the horizontal axis.
        curves: the lines.
        unit: "share" for values in [0, 1] shown in per cent, "part" for the same from 0 on and not enlarged beyond 5 %,
            "rate" for a learning rate, "" for plain numbers from 0.
        legend: name the lines below the plot.
        size: width and height in inches.
    """
    drawn = [curve for curve in curves if len(curve.x)]
    with _figure(title + x_label, size, title) as (figure, axes, svg):
        axes.set_title(title)
        axes.set_xlabel(x_label)
        for curve in drawn:
            style = "--" if curve.dashed else "-" if curve.color < COLORS else "-."
            marker = "o" if len(curve.x) <= MARKED else None
            axes.plot(curve.x, curve.y, style, color=color(curve.color), marker=marker, label=curve.label)
        if not drawn:
            axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color=SOFT)
            axes.set(xticks=[], yticks=[])
        else:
            _scale(axes, unit, x_label)
        if legend and len(drawn) > 1:
            figure.legend(loc="outside lower center", ncols=4, handlelength=1.4, columnspacing=1, labelcolor=SOFT)
    return svg[0]


def matrix(confusion: np.ndarray, classes: Sequence[str], *, named: bool) -> Markup:
    """Return a confusion matrix, int64 [C, C], as a heat map of each row's shares; `named` writes names and counts."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    count = len(classes)
    side = max(COLUMN, 0.34 * count + 1.2) if named else COLUMN + 1
    with _figure("confusion", (side, side), f"confusion matrix of {count} classes") as (_, axes, svg):
        if named:
            for row, column in np.ndindex(count, count):
                _cell(axes, row, column, int(confusion[row, column]), float(shares[row, column]))
            axes.set_xticks(range(count), classes, rotation=90)
            axes.set_yticks(range(count), classes)
        else:
            shaded = np.zeros((count, count, 4))
            shaded[..., :3] = (0.0, 0.45, 0.70)  # between the accents of light and dark, as a raster has one color
            shaded[..., 3] = np.sqrt(shares)
            axes.imshow(shaded, interpolation="nearest")
        axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), aspect="equal")
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return svg[0]


def bars(values: Sequence[float], names: Sequence[str]) -> Markup:
    """Return horizontal bars of shares in [0, 1], the first on top."""
    with _figure("bars", (COLUMN, 0.24 * len(values) + 0.7), "accuracy of each class") as (_, axes, svg):
        places = range(len(values))
        axes.barh(places, [100 * value for value in values], color=ACCENT, height=0.62)
        for place, value in zip(places, values, strict=True):
            axes.text(100 * value + 1.5, place, f"{100 * value:.0f}", va="center", color=SOFT)
        axes.set_yticks(places, names)
        axes.set(xlim=(0, 108), ylim=(len(values) - 0.4, -0.6), xlabel="images recognized (%)")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
    return svg[0]


def ranked(values: Sequence[float]) -> Markup:
    """Return the classes' shares in [0, 1] as one falling line: how even the classes are, however many."""
    ordered = sorted(values, reverse=True)
    with _figure("ranked", (COLUMN, 3.0), "accuracy of the classes, best to worst") as (_, axes, svg):
        axes.fill_between(range(1, len(ordered) + 1), [100 * v for v in ordered], color=ACCENT, alpha=0.25, linewidth=0)
        axes.plot(range(1, len(ordered) + 1), [100 * value for value in ordered], color=ACCENT)
        axes.set(xlim=(1, len(ordered)), ylim=(0, 100), xlabel="classes, best to worst", title="images recognized (%)")
    return svg[0]


def data_efficiency(curves: Sequence[Efficiency]) -> Markup:
    """Return top-1 against the share of the training images."""
    lines = [
        Curve(each.label, [100 * x for x, _ in each.points], [y for _, y in each.points], number)
        for number, each in enumerate(curves)
    ]
    return panel("top-1 (%)", "training images used (%)", lines, unit="share", size=(COLUMN, 3.0))


def color(number: int) -> str:
    """Return the stand-in of a run's color."""
    return f"#0201{number % COLORS:02x}"


@contextmanager
def _figure(salt: str, inches: tuple[float, float], label: str) -> Iterator[tuple["Figure", "Axes", list[Markup]]]:
    """Open a figure with one plot; when the block ends, its SVG is in the list."""
    import matplotlib
    from matplotlib.figure import Figure

    svg: list[Markup] = []
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # characters that its own font lacks: the browser's will have them
        figure = Figure(figsize=inches, layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        yield figure, axes, svg
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, facecolor="none")
    svg.append(_inline(file.getvalue(), label))


def _inline(svg: str, label: str) -> Markup:
    """Return matplotlib's SVG file as an element of a page: no prologue, no fixed size, the page's font and colors."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}|image[0-9a-f])[^"]*"', "", svg)  # groups, which every figure numbers from 1
    svg = re.sub(r"""font-family: [^;"]+|(?<=font: )([\d.]+px) [^;"]+""", r"\1", svg)
    for stand_in, variable in STAND_IN.items():
        svg = svg.replace(stand_in, variable)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    view = Markup(box[0]) if box else ""
    return Markup('<svg {} role="img" aria-label="{}">').format(view, label) + Markup(rest)


def _scale(axes: "Axes", unit: str, x_label: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=x_label == "epoch"))
    low, high = axes.get_ylim()
    bottom = low if unit == "share" and low > 0.15 * high else min(0.0, low)
    top = high if bottom else 1.04 * high  # the default margin is a share of the data's range, not of the axis
    axes.set_ylim(bottom, max(top, 0.05 * (unit == "part")))
    if unit in ("share", "part"):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    elif unit == "rate":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _cell(axes: "Axes", row: int, column: int, count: int, share: float) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.5, row - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, facecolor=ACCENT, alpha=0.85 * share**0.5, edgecolor="none"))
    if count:
        axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=7, color=INK)
