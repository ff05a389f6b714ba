"""A record of a bench for the terminal."""

from collections.abc import Iterator
from typing import get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deitfast.bench.record import OURS, Change, Kind, Measured, Peer, Record, Setting, counted
from deitfast.progress import duration, volume


def show(record: Record) -> RenderableType:
    """Return tables of the stages, the changes and the peers, with what follows from them."""
    parts: list[RenderableType] = [_stages(record), *sentences(record)]
    changes = (*record.remedies, *record.trials)
    if changes:
        parts.append(_changes(changes))
    for kind in get_args(Kind):
        if peers := [peer for peer in record.peers if peer.kind == kind]:
            parts.append(_peers(kind, peers))
            parts += [f"left out: {peer.name} ({peer.left_out})" for peer in peers if not peer.measured]
    return Group(*parts, *ratios(record), *record.notes)


def headline(setting: Setting) -> str:
    """Return what was measured, in one line."""
    compiled = ", compiled" if setting.compiled else ""
    data = f"{setting.data} ({setting.images:,} images, {volume(setting.data_bytes)})"
    step = f"{setting.arch} at {setting.size} px, batch {setting.batch}, {setting.precision}{compiled}"
    return f"{step}, on {setting.device}; {data}, loader {setting.loader}, {counted(setting.workers, 'thread')}"


def figure(rate: float) -> str:
    """Return a rate with as many digits as mean something."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def rows(record: Record) -> list[Measured]:
    """Return what was measured of the recipe itself, in the order of an image's way."""
    host = [stage for stage in record.stages if stage.lane == "loader"]
    rest = [stage for stage in record.stages if stage.lane != "loader"]
    cold = record.disk.cold if record.disk else None
    return [*filter(None, [cold, *host, record.loader, *rest, record.together])]


def threads(stage: Measured, setting: Setting) -> int:
    """Return how many threads a stage's rate is to be multiplied by for the loader's limit."""
    return setting.workers if stage.threaded else 1


def sentences(record: Record) -> Iterator[str]:
    """Yield what the figures mean, a sentence each."""
    verdict, together = record.verdict, record.together
    if verdict:
        others = ", ".join(f"{name} {figure(rate)}" for name, rate in verdict.limits.items())
        yield f"bottleneck: {verdict.bottleneck} (limits in images/s: {others}); {verdict.advice}"
    if verdict and together:
        off = together.rate / verdict.predicted - 1
        yield f"together: predicted {figure(verdict.predicted)} images/s, measured {figure(together.rate)} ({off:+.0%})"
    if together:
        yield f"the step waited {together.waiting:.0%} of the time"
    if found := record.arithmetic:
        side = found.product_size
        yield (
            f"the step: {found.flops_per_image / 1e9:.2f} GFLOP an image, {found.step_flops / 1e12:.3g} TFLOP/s, "
            f"{found.utilization:.0%} of a {side} x {side} matrix product's {found.product_flops / 1e12:.3g}"
        )
    if record.disk and record.disk.note:
        yield record.disk.note
    if run := record.outlook:
        yield (
            f"the recipe's {run.epochs:,} epochs of {run.images / run.epochs:,.0f} images: {duration(run.seconds)}; "
            f"data {volume(record.setting.data_bytes)}, a teacher's hard labels {volume(run.cache_bytes)}"
        )


def ratios(record: Record) -> Iterator[str]:
    """Yield what the others' loaders cost in processor time against ours."""
    loaders = [peer for peer in record.peers if peer.kind == "loader" and peer.measured]
    ours = next((peer.measured for peer in loaders if peer.name == OURS), None)
    if ours is None:
        return
    for peer in loaders:
        if peer.measured and peer.measured is not ours:
            theirs = peer.measured.cpu_seconds
            yield (
                f"processor time an image: {peer.name} {theirs * 1e6:,.0f} us, ours {ours.cpu_seconds * 1e6:,.0f} us: "
                f"{theirs / ours.cpu_seconds:.2f} times as much"
            )


def _table(title: str) -> Table:
    """Return an empty table."""
    return Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False)


def _line(what: str) -> Text:
    """Return words of a last column: cut off, not folded, as a narrow terminal is the figures'."""
    return Text(what, no_wrap=True, overflow="ellipsis")


def _stages(record: Record) -> Table:
    table = _table(headline(record.setting))
    table.add_column("stage", no_wrap=True)
    for column in ("images/s", "lowest", "highest", "x threads", "CPU us"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what")
    for stage in rows(record):
        times = threads(stage, record.setting)
        limit = figure(stage.rate * times) if times > 1 else ""
        table.add_row(stage.name, *_rates(stage), limit, f"{stage.cpu_seconds * 1e6:,.0f}", _line(stage.what))
    count = len(rows(record)[0].samples)
    table.caption = f"each alone, median of {count} measurements; CPU: processor time an image, all threads"
    table.caption_justify = "left"
    return table


def _changes(changes: tuple[Change, ...]) -> Table:
    table = _table("what a change brings, loader and step together, images/s")
    table.add_column("change", overflow="fold")
    for column in ("predicted", "measured", "lowest", "highest"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("predicted from")
    for change in changes:
        predicted = figure(change.predicted) if change.predicted else "-"
        rates = _rates(change.measured) if change.measured else "-  "
        table.add_row(change.change, predicted, *rates, _line(change.how))
    return table


def _peers(kind: str, peers: list[Peer]) -> Table:
    title = {"loader": "loaders side by side, one view an image", "step": "steps side by side"}[kind]
    table = _table(title)
    table.add_column("whose", overflow="fold")
    for column in ("images/s", "lowest", "highest", "CPU us"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what")
    for peer in peers:
        if found := peer.measured:
            what = _line(f"{found.what} ({peer.version})")
            table.add_row(peer.name, *_rates(found), f"{found.cpu_seconds * 1e6:,.0f}", what)
    return table


def _rates(stage: Measured) -> list[str]:
    return [figure(rate) for rate in (stage.rate, min(stage.rates), max(stage.rates))]
