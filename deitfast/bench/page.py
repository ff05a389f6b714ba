"""A record of a bench as one HTML file that needs nothing else: bars are boxes with a width, there is no script."""

from collections.abc import Iterable
from html import escape

from deitfast.bench.record import Change, Measured, Peer, Record, versions
from deitfast.bench.tables import figure, headline, ratios, rows, sentences

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --faint: #667; --line: #d8dce2; --bar: #5b8def; --worst: #d9534f;
  --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --faint: #9aa3ad; --line: #3a4048; --bar: #6f9bf5;
  --worst: #ef6b66; --paper: #16191d; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1000px; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
p { margin: .3rem 0; } .faint { color: var(--faint); font-size: .85rem; }
.verdict { border-left: 4px solid var(--worst); padding: .3rem .8rem; margin: 1rem 0; }
.bars { display: grid; gap: .45rem; margin: 0; }
.row { display: grid; grid-template-columns: 13rem 1fr 6rem; gap: .2rem .7rem; align-items: center; }
.track { background: color-mix(in srgb, var(--line) 45%, transparent); height: 1.1rem; position: relative; }
.fill { background: var(--bar); height: 100%; } .worst .fill { background: var(--worst); }
.spread { position: absolute; top: 50%; border-top: 2px solid var(--ink); opacity: .75; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.row .what { grid-column: 2 / -1; margin-top: -.25rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .9rem; } dt { color: var(--faint); }
dd { margin: 0; }
@media (max-width: 600px) {
  .row { grid-template-columns: 1fr 5.5rem; } .row .track { grid-column: 1 / -1; grid-row: 2; }
  .row .what { grid-column: 1 / -1; margin-top: 0; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; }
}
"""
DOCUMENT = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width">
<link rel=icon href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
FAR = 4
"""Times the predicted rate at which the bars of limits end: what is further away is out of the way, however far."""


def page(record: Record) -> str:
    """Return the record as an HTML document."""
    setting, verdict = record.setting, record.verdict
    parts = [f"<h1>{escape(setting.arch)}: where the time goes</h1>", f"<p class=faint>{escape(headline(setting))}</p>"]
    found = [*sentences(record)]
    if verdict:
        parts.append(f"<div class=verdict>{''.join(map(_paragraph, found))}</div>")
        parts.append(f"<h2>What each part allows, images/s (bars end at {figure(FAR * verdict.predicted)})</h2>")
        parts.append(_limits(record))
    else:
        parts += map(_paragraph, found)
    parts += ["<h2>Microseconds an image, each stage alone</h2>", _stages(record)]
    if changes := [*record.remedies, *record.trials]:
        parts += ["<h2>What a change brings, images/s with loader and step together</h2>", _changes(changes)]
    for kind, title in (("loader", "Loaders side by side, images/s"), ("step", "Steps side by side, images/s")):
        if peers := [peer for peer in record.peers if peer.kind == kind]:
            parts += [f"<h2>{title}</h2>", _peers(peers)]
    parts += [_paragraph(line) for line in (*ratios(record), *record.notes)]
    parts += ["<h2>Measured on</h2>", _machine(record)]
    body = "\n".join(parts)
    return DOCUMENT.format(title=escape(f"deitfast bench: {setting.arch}"), style=STYLE, body=body)


def _limits(record: Record) -> str:
    assert record.verdict is not None
    limits = record.verdict.limits
    most = FAR * record.verdict.predicted
    lines = [_row(name, rate, most, worst=name == record.verdict.limit) for name, rate in limits.items()]
    if record.together:
        lines.append(_measured_row("loader and step together", record.together, most))
    return _bars(lines)


def _stages(record: Record) -> str:
    """Bars of microseconds, of a loader's threaded stages divided by its threads: what each takes of its lane."""
    worst = record.verdict.bottleneck if record.verdict else ""
    alone = [stage for stage in rows(record) if stage.lane and stage is not record.loader]
    times = {stage.name: stage.seconds * 1e6 / (record.setting.workers if stage.threaded else 1) for stage in alone}
    most = max(times.values(), default=1)
    lines = [
        _row(stage.name, times[stage.name], most, worst=stage.name == worst, note=_note(record, stage))
        for stage in alone
    ]
    return _bars(lines)


def _note(record: Record, stage: Measured) -> str:
    shared = f", shared by {record.setting.workers} threads" if stage.threaded else ""
    each = " on one of them" if stage.threaded else ""
    return f"{stage.what}{shared}; {figure(min(stage.rates))} to {figure(max(stage.rates))} images/s{each}"


def _peers(peers: list[Peer]) -> str:
    most = max((max(peer.measured.rates) for peer in peers if peer.measured), default=1)
    lines = [
        _measured_row(peer.name, peer.measured, most, peer.version)
        if peer.measured
        else f"<p class=faint>left out: {escape(peer.name)} ({escape(peer.left_out)})</p>"
        for peer in peers
    ]
    return _bars(lines)


def _changes(changes: list[Change]) -> str:
    rates = [rate for change in changes if change.measured for rate in change.measured.rates]
    most = max([*rates, *(change.predicted for change in changes if change.predicted)], default=1)
    lines = [
        _row(change.change, change.predicted or 0, most, note=f"predicted: {change.how}")
        + (_measured_row("measured", change.measured, most) if change.measured else "")
        for change in changes
    ]
    return _bars(lines)


def _measured_row(name: str, found: Measured, most: float, version: str = "") -> str:
    low, high = min(found.rates), max(found.rates)
    version = f" ({version})" if version else ""
    cost = f"{found.cpu_seconds * 1e6:,.0f} us of processor time an image"
    note = f"{found.what}{version}; {figure(low)} to {figure(high)}, {cost}"
    return _row(name, found.rate, most, note=note, spread=(low, high))


def _row(
    name: str,
    value: float,
    most: float,
    *,
    worst: bool = False,
    note: str = "",
    spread: tuple[float, float] | None = None,
) -> str:
    """Return a line with a bar of `value`, full at `most`, and a thin line from the lowest to the highest measured."""
    line = ""
    if spread:
        left, right = (min(100.0, 100 * edge / most) for edge in spread)
        line = f"<div class=spread style='left:{left:.2f}%;width:{max(right - left, 0.3):.2f}%'></div>"
    width = min(100.0, 100 * value / most)
    bar = f"<div class=track><div class=fill style='width:{width:.2f}%'></div>{line}</div>"
    number = f"<div class=number>{figure(value)}</div>"
    small = f"<div class='what faint'>{escape(note)}</div>" if note else ""
    return f"<div class='row{' worst' if worst else ''}'><div>{escape(name)}</div>{bar}{number}{small}</div>"


def _bars(lines: Iterable[str]) -> str:
    return f"<div class=bars>{''.join(lines)}</div>"


def _machine(record: Record) -> str:
    machine, setting = record.machine, record.setting
    facts = {
        "when": record.made,
        "processor": f"{machine['processor']}, {setting.cores} cores for this process",
        "device": f"{setting.device}, {setting.device_name}",
        "system": f"{machine['system']}, Python {machine['python']}",
        "versions": f"deitfast {machine['deitfast']}, {versions(machine)}",
        "command": " ".join(record.command),
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{escape(str(text))}</dd>" for name, text in facts.items()) + "</dl>"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"
