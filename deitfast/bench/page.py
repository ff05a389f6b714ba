"""A benchmark record as one HTML file that needs nothing else: bars are boxes with a width, there is no script."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deitfast.bench.record import Baseline, BenchRecord, Change, LoaderScaling, Measured, Setting, versions
from deitfast.bench.tables import compared, format_rate, headline, ratios, sentences, stages_in_order
from deitfast.report.html import render

FAR = 4
"""Times the predicted rate at which the bars of limits end: what is further away is far from limiting anything."""

RESOURCE_NOTES = {
    "disk": "reading the data set from the disk",
    "loader": "drawing, reading, decoding and cropping, on all loader threads",
    "copy": "batches from the host to the device",
    "device": "augmentation, targets and step",
    "cores": "processor time of all of this, shared by the cores",
}
"""What each resource is used for."""


@dataclass(frozen=True)
class Bar:
    """A line with a name, a bar and a number."""

    name: str
    value: float
    note: str = ""
    limiting: bool = False
    low: float | None = None
    high: float | None = None
    """Lowest and highest measured, drawn as a thin line; None without."""


@dataclass(frozen=True)
class Chart:
    """Bars of one unit under a heading."""

    title: str
    bars: list[Bar]
    most: float
    """Value at which a bar is full."""
    skipped: list[str]
    """What was not measured, and why."""


def page(record: BenchRecord) -> str:
    """Return a record of `deitfast bench` as an HTML document."""
    assert record.setting is not None
    return render(
        Path(__file__).with_name("bench.html"),
        title=f"{record.setting.arch}: where the time goes",
        headline=headline(record.setting),
        verdict=record.verdict is not None,
        sentences=list(sentences(record)),
        charts=list(_charts(record, record.setting)),
        closing=[*ratios(record), *record.notes],
        facts=_machine(record, record.setting),
        rate=format_rate,
    )


def _charts(record: BenchRecord, setting: Setting) -> list[Chart]:
    charts = []
    if record.verdict:
        charts.append(_limits(record))
    charts.append(_stages(record, setting))
    if changes := [*record.suggestions, *record.trials]:
        charts.append(_chart("What a change brings: loader and step together, images/s", _changes(changes)))
    if record.loader_scaling:
        charts.append(_threads(record.loader_scaling))
    for title, baselines in compared(record):
        bars = [_measured(each.name, each.measured, _version(each)) for each in baselines if each.measured]
        charts.append(_chart(f"{title}, images/s", bars, baselines))
    return charts


def _chart(title: str, bars: list[Bar], baselines: Sequence[Baseline] = ()) -> Chart:
    skipped = [f"not measured: {each.name} ({each.skipped})" for each in baselines if not each.measured]
    return Chart(title, bars, max((max(bar.value, bar.high or 0) for bar in bars), default=1), skipped)


def _limits(record: BenchRecord) -> Chart:
    assert record.verdict is not None
    verdict = record.verdict
    bars = [Bar(name, rate, RESOURCE_NOTES[name], name == verdict.limit) for name, rate in verdict.limits.items()]
    if record.together:
        bars.append(_measured("loader and step together, measured", record.together))
    most = FAR * verdict.predicted
    return Chart(f"What each resource allows at most, images/s (bars end at {format_rate(most)})", bars, most, [])


def _stages(record: BenchRecord, setting: Setting) -> Chart:
    """Bars of microseconds per image; of a loader's threaded stages, divided by its threads."""
    slowest = record.verdict.bottleneck if record.verdict else ""
    bars = []
    for stage in stages_in_order(record):
        if stage.resource and stage is not record.loader:
            micros = stage.seconds * 1e6 / (setting.workers if stage.threaded else 1)
            rates = f"{format_rate(min(stage.rates))} to {format_rate(max(stage.rates))} images/s"
            shared = f"shared by {setting.workers} threads; one alone: " if stage.threaded else ""
            bars.append(Bar(stage.name, micros, f"{stage.what}; {shared}{rates}", stage.name == slowest))
    return _chart("Microseconds per image, each stage alone", bars)


def _changes(changes: Sequence[Change]) -> list[Bar]:
    bars = []
    for change in changes:
        bars.append(Bar(change.change, change.predicted or 0, f"predicted from: {change.basis}"))
        if change.measured:
            bars.append(_measured("measured", change.measured))
    return bars


def _measured(name: str, found: Measured, version: str = "") -> Bar:
    low, high = min(found.rates), max(found.rates)
    note = f"{found.what}{f' ({version})' if version else ''}; {format_rate(low)} to {format_rate(high)} images/s, "
    note += f"{found.cpu_seconds * 1e6:,.0f} us of processor time per image"
    return Bar(name, found.rate, note, low=low, high=high)


def _threads(found: LoaderScaling) -> Chart:
    bars = [Bar(f"{count} threads", rate, limiting=count >= found.bend) for count, rate in found.predicted.items()]
    bars += [_measured(f"{each.name}, measured", each) for each in found.measured]
    return _chart("The loader on more threads, a core each, images/s; marked: they wait for Python's lock", bars)


def _version(baseline: Baseline) -> str:
    """Return a baseline's version, and how far its pixels are from Pillow's."""
    off = baseline.difference
    return baseline.version + (f"; pixels {off:.2f} of 255 from Pillow's on average" if off is not None else "")


def _machine(record: BenchRecord, setting: Setting) -> list[tuple[str, str]]:
    machine = record.machine
    return [
        ("when", record.made),
        ("processor", f"{machine['processor']}, {setting.cores} cores for this process"),
        ("device", f"{setting.device}, {setting.device_name}"),
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("versions", f"deitfast {machine['deitfast']}, {versions(machine)}"),
        ("command", " ".join(record.command)),
    ]
