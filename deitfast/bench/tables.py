"""A benchmark record in words and tables, for the terminal."""

from collections.abc import Iterator, Sequence
from typing import get_args

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deitfast.bench.record import (
    OURS,
    Baseline,
    BaselineKind,
    BenchRecord,
    Change,
    Figure,
    LoaderScaling,
    Measured,
    Section,
    Setting,
)
from deitfast.progress import duration, volume
from pipelines.errors import pluralize

TITLES: dict[BaselineKind, str] = {
    "loader": "Loaders compared, one view per image",
    "crops": "The same crops by other libraries, decoded and resized on one thread",
    "step": "Training steps compared",
}
"""Of the tables of baselines."""


def show(record: BenchRecord) -> RenderableType:
    """Return the tables of a record of `deitfast bench`, and what they mean in sentences."""
    assert record.setting is not None
    parts: list[RenderableType] = [_stages(record, record.setting), *sentences(record)]
    if changes := (*record.suggestions, *record.trials):
        parts.append(_changes(changes))
    if record.loader_scaling:
        parts.append(_threads(record.loader_scaling))
    for title, baselines in compared(record):
        parts.append(_baselines(title, baselines))
        parts += [f"not measured: {each.name} ({each.skipped})" for each in baselines if not each.measured]
    return Group(*parts, *ratios(record), *record.notes)


def compared(record: BenchRecord) -> Iterator[tuple[str, list[Baseline]]]:
    """Yield what was compared with each other, with a title: by kind, and by how the images were stored."""
    for kind in get_args(BaselineKind):
        for stored in dict.fromkeys(each.stored for each in record.baselines if each.kind == kind):
            title = f"{TITLES[kind]}{f'; images {stored}' if stored else ''}"
            yield title, [each for each in record.baselines if (each.kind, each.stored) == (kind, stored)]


def headline(setting: Setting) -> str:
    """Return what was measured, in one line."""
    compiled = ", compiled" if setting.compiled else ""
    data = f"{setting.data} ({setting.images:,} images, {volume(setting.data_bytes)})"
    step = f"{setting.arch} at {setting.size} px, batch {setting.batch}, {setting.precision}{compiled}"
    return f"{step}, on {setting.device}; {data}, loader {setting.loader}, {pluralize(setting.workers, 'thread')}"


def format_rate(rate: float) -> str:
    """Return a rate with as many digits as mean something."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def stages_in_order(record: BenchRecord) -> list[Measured]:
    """Return what was measured of the recipe itself, in the order in which an image passes."""
    host = [stage for stage in record.stages if stage.resource == "loader"]
    rest = [stage for stage in record.stages if stage.resource != "loader"]
    cold = record.disk.cold if record.disk else None
    return [*filter(None, [cold, *host, record.loader, *rest, record.together])]


def sentences(record: BenchRecord) -> Iterator[str]:
    """Yield what the figures mean, a sentence or two each."""
    verdict, together = record.verdict, record.together
    if verdict:
        limits = ", ".join(f"{name} {format_rate(rate)}" for name, rate in verdict.limits.items())
        yield f"Bottleneck: {verdict.bottleneck}. At most, in images/s: {limits}. Advice: {verdict.advice}."
    if together:
        text = f"Loader and step together: {format_rate(together.rate)} images/s"
        if verdict:
            off = together.rate / verdict.predicted - 1
            text += f" ({format_rate(verdict.predicted)} predicted, {off:+.0%})"
        yield f"{text}; the step waited for data {together.waiting:.0%} of the time."
    if found := record.arithmetic:
        side = found.product_size
        yield (
            f"Arithmetic of the step: {found.flops_per_image / 1e9:.2f} GFLOP per image, "
            f"{found.step_flops / 1e12:.3g} TFLOP/s, {found.utilization:.0%} of the {found.product_flops / 1e12:.3g} "
            f"TFLOP/s that a {side} x {side} matrix product reaches here."
        )
    if record.disk and record.disk.note:
        yield f"{record.disk.note[0].upper()}{record.disk.note[1:]}."
    if run := record.full_run:
        data = f"the data set takes {volume(record.setting.data_bytes)}, " if record.setting else ""
        yield (
            f"The recipe's {run.epochs:,} epochs of {run.images / run.epochs:,.0f} images would take "
            f"{duration(run.seconds)}; {data}a teacher's hard labels {volume(run.cache_bytes)} of disk."
        )
    if threads := record.loader_scaling:
        python, whole = threads.python.cpu_seconds, threads.python.cpu_seconds + threads.free_seconds
        yield (
            f"Of the {whole * 1e6:,.0f} us that a view takes the loader, {python * 1e6:.1f} are Python, whose lock "
            f"all threads share: at most {1 / python:,.0f} images/s; the curve bends at {threads.bend:,} threads."
        )
    if scaling := record.scaling:
        unit = "process" if record.setting and record.setting.device == "cpu" else "GPU"
        each = " each" if scaling.nodes > 1 else ""
        size = f"{pluralize(scaling.nodes, 'node')} with {pluralize(scaling.gpus, unit)}{each}"
        limits = ", ".join(f"{name} {format_rate(rate)}" for name, rate in scaling.limits.items())
        gradients, milliseconds = volume(scaling.gradient_bytes), scaling.exchange_seconds * 1000
        exchange = f" Exchanging {gradients} of gradients takes {milliseconds:.3g} ms a step." if milliseconds else ""
        yield (
            f"Predicted for {size}: {format_rate(scaling.predicted)} images/s, {scaling.efficiency:.0%} of "
            f"{scaling.nodes * scaling.gpus} times this process; limited by {scaling.limit} "
            f"(at most, in images/s: {limits}).{exchange}"
        )
        for job in scaling.jobs:
            what = f"{job.name[0].upper()}{job.name[1:]}: {job.images:,} images at {format_rate(job.rate)} images/s"
            yield f"{what} take {duration(job.seconds)}, limited by {job.limit}."
        yield f"Assumed: {'; '.join(scaling.assumptions)}."


def ratios(record: BenchRecord) -> Iterator[str]:
    """Yield what other loaders cost in processor time compared with ours."""
    for _, baselines in compared(record):
        ours = next((each.measured for each in baselines if each.name == OURS), None)
        for each in baselines:
            if ours and each.measured and each.measured is not ours and each.kind != "step":
                theirs = each.measured.cpu_seconds
                made = ", crops alone" if each.kind == "crops" else ""
                stored = f", images {each.stored}" if each.stored else ""
                yield (
                    f"Processor time per image{made}{stored}: "
                    f"{each.name} {theirs * 1e6:,.0f} us, {OURS} {ours.cpu_seconds * 1e6:,.0f} "
                    f"us: {theirs / ours.cpu_seconds:.2f} times as much."
                )


def section_table(section: Section) -> RenderableType:
    """Return one section of tools/gpu_check: a line for each figure, or why there are none."""
    if section.outcome == "left out":
        return f"\n[bold]{section.name}[/bold] left out: {escape(section.reason)}"
    memory = "".join(
        f", {name} {size / 1e9:.1f} GB"
        for name, size in (("torch at most", section.torch_bytes), ("GPU in use", section.device_bytes))
        if size
    )
    table = _table("", "", ("median", "lowest", "highest", "n"), "", "target")
    for figure in section.figures:
        values = (figure.median, min(figure.samples), max(figure.samples))
        numbers = (format_value(value, figure) for value in values)
        count, what = str(len(figure.samples)), escape(figure.what)
        table.add_row(escape(figure.name), *numbers, count, what, format_target(figure))
    parts: list[RenderableType] = [f"\n[bold]{section.name}[/bold] ({section.seconds:.0f} s{memory})", table]
    if section.outcome == "failed":
        parts.append(f"[red]failed[/red]: {escape(section.reason.strip().splitlines()[-1])}")
    return Group(*parts)


def section_sentences(record: BenchRecord, *, dry: bool) -> Iterator[str]:
    """Yield which targets of tools/gpu_check are met, and which sections failed or were left out."""
    judged = [figure for section in record.sections for figure in section.figures if figure.met is not None]
    missed = [figure.name for figure in judged if not figure.met]
    if dry:
        yield "\nA dry run: every section ran in miniature; its figures mean nothing."
    else:
        names = f"; missed: {', '.join(missed)}" if missed else ""
        yield f"\n{len(judged) - len(missed)} of {len(judged)} targets met{names}"
    for outcome in ("failed", "left out"):
        if names := [section.name for section in record.sections if section.outcome == outcome]:
            yield f"{outcome}: {', '.join(names)}"


def format_value(value: float, figure: Figure) -> str:
    """Return a figure's value with its unit and as many digits as mean something."""
    match figure.unit:
        case "share":
            return f"{value:.1%}"
        case "count":
            return f"{value:,.0f}"
        case "ms" | "levels":
            return f"{value:.3g} {figure.unit}"
        case unit:
            return f"{value:,.0f}" if value >= 100 else f"{value:.3g} {unit}".removesuffix(" images/s")


def format_target(figure: Figure) -> str:
    """Return what a figure should be and whether it is; "" where there is no target."""
    if figure.met is None:
        return ""
    limits = [
        f"{sign} {format_value(limit, figure)}"
        for sign, limit in (("at least", figure.least), ("at most", figure.most))
        if limit is not None
    ]
    return f"{' and '.join(limits)}: {'met' if figure.met else '[red]missed[/red]'}"


def _table(title: str, first: str, numbers: Sequence[str], *rest: str) -> Table:
    """Return an empty table: names, numbers to the right, then text."""
    table = Table(title=f"\n{title}" if title else None, title_justify="left", box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    for column in rest:
        table.add_column(column)
    return table


def _line(what: str) -> Text:
    """Return a last column's words: cut off, not folded, so that a narrow terminal still shows the figures."""
    return Text(what, no_wrap=True, overflow="ellipsis")


def _stages(record: BenchRecord, setting: Setting) -> Table:
    stages = stages_in_order(record)
    columns = ("images/s", "lowest", "highest", "all threads", "CPU us")
    table = _table(headline(setting), "stage", columns, "what")
    for stage in stages:
        together = format_rate(stage.rate * setting.workers) if stage.threaded and setting.workers > 1 else ""
        table.add_row(stage.name, *_rates(stage), together, f"{stage.cpu_seconds * 1e6:,.0f}", _line(stage.what))
    table.caption = (
        f"Each stage alone: median, lowest and highest of {len(stages[0].samples)} measurements. all threads: "
        f"images/s on {pluralize(setting.workers, 'thread')}. CPU us: processor time per image in microseconds."
    )
    table.caption_justify = "left"
    return table


def _changes(changes: Sequence[Change]) -> Table:
    columns = ("predicted", "measured", "lowest", "highest")
    table = _table("What a change brings: loader and step together, images/s", "change", columns, "predicted from")
    for change in changes:
        predicted = format_rate(change.predicted) if change.predicted else "-"
        rates = _rates(change.measured) if change.measured else "-  "
        table.add_row(change.change, predicted, *rates, _line(change.basis))
    return table


def _threads(found: LoaderScaling) -> Table:
    table = _table("The loader on more threads, each on a core of its own", "threads", ("images/s", "measured"), "")
    measured = {each.name.partition(" ")[0]: each for each in found.measured}
    for threads, rate in found.predicted.items():
        here = format_rate(measured[str(threads)].rate) if str(threads) in measured else ""
        bent = "the curve has bent: threads wait for Python's lock" if threads >= found.bend else ""
        table.add_row(str(threads), format_rate(rate), here, _line(bent))
    return table


def _baselines(title: str, baselines: Sequence[Baseline]) -> Table:
    pixels = ("from Pillow",) if any(each.difference is not None for each in baselines) else ()
    table = _table(title, "", ("images/s", "lowest", "highest", "CPU us", *pixels), "what")
    for each in baselines:
        if found := each.measured:
            what = _line(f"{found.what} ({each.version})")
            off = [f"{each.difference:.2f}"] if each.difference is not None else []
            table.add_row(each.name, *_rates(found), f"{found.cpu_seconds * 1e6:,.0f}", *off, what)
    if pixels:
        table.caption, table.caption_justify = "from Pillow: mean difference of the pixels, of 255", "left"
    return table


def _rates(stage: Measured) -> list[str]:
    return [format_rate(rate) for rate in (stage.rate, min(stage.rates), max(stage.rates))]
