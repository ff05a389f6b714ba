"""A record of tools/gpu_check for the terminal."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from tools.gpu_check.record import Figure, Record, Section


def table(section: Section) -> RenderableType:
    """Return one section: a line a figure, or why there are none."""
    memory = "".join(
        f", {name} {size / 1e9:.1f} GB"
        for name, size in (("torch at most", section.torch_bytes), ("GPU in use", section.device_bytes))
        if size
    )
    title = f"\n[bold]{section.name}[/bold] ({section.seconds:.0f} s{memory})"
    if section.outcome == "left out":
        return f"\n[bold]{section.name}[/bold] left out: {escape(section.reason)}"
    found = Table("", "median", "lowest", "highest", "n", "", "target", box=None, pad_edge=False)
    for figure in section.figures:
        numbers = (written(value, figure) for value in (figure.median, figure.lowest, figure.highest))
        found.add_row(escape(figure.name), *numbers, str(len(figure.samples)), escape(figure.what), target(figure))
    if section.outcome == "failed":
        return Group(title, found, f"[red]failed[/red]: {escape(section.reason.strip().splitlines()[-1])}")
    return Group(title, found)


def written(value: float, figure: Figure) -> str:
    """Return a value with its unit and as many digits as mean something."""
    match figure.unit:
        case "share":
            return f"{value:.1%}"
        case "count":
            return f"{value:,.0f}"
        case "ms" | "levels":
            return f"{value:.3g} {figure.unit}"
        case unit:
            return f"{value:,.0f}" if value >= 100 else f"{value:.3g} {unit}".removesuffix(" images/s")


def target(figure: Figure) -> str:
    """Return what a figure should be and whether it is; "" where there is no target."""
    if figure.met is None:
        return ""
    limits = [
        f"{sign} {written(limit, figure)}"
        for sign, limit in (("at least", figure.least), ("at most", figure.most))
        if limit is not None
    ]
    return f"{' and '.join(limits)}: {'met' if figure.met else '[red]missed[/red]'}"


def sentences(record: Record) -> Iterator[str]:
    """Yield what it all comes to."""
    figures = [figure for section in record.sections for figure in section.figures]
    judged = [figure for figure in figures if figure.met is not None]
    missed = [figure.name for figure in judged if not figure.met]
    if record.dry:
        yield "\nA dry run: every section ran in miniature; its figures mean nothing."
    else:
        yield f"\n{len(judged) - len(missed)} of {len(judged)} targets met" + (
            f"; missed: {', '.join(missed)}" if missed else ""
        )
    for outcome in ("failed", "left out"):
        if names := [section.name for section in record.sections if section.outcome == outcome]:
            yield f"{outcome}: {', '.join(names)}"
