"""A study's answer as files: study.html, the same tables in study.md, and study.json for machines."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deitfast.environment import __version__
from deitfast.report.figures import Curve, panel
from deitfast.report.html import render
from deitfast.report.markdown import markdown_table, plain
from deitfast.study import tables
from deitfast.study.results import StudyResult
from pipelines.files import write_text

TEMPLATE = Path(__file__).parent / "templates" / "study.html"
FILES = ("study.html", "study.md", "study.json")


def write_study(result: StudyResult, comment: str) -> list[Path]:
    """Write the three files into the study's folder and return them.

    Args:
        result: what was found so far.
        comment: where the study's protocol comes from, as the head of its file says.
    """
    out = result.plan.options.out
    page, text, data = paths = [out / name for name in FILES]
    write_text(page, html(result, comment))
    write_text(text, markdown(result, comment))
    write_text(data, json.dumps(as_json(result), indent=1))
    return paths


def html(result: StudyResult, comment: str) -> str:
    """Return the page."""
    curves = [
        Curve(row.name, *row.runs[0].evaluated("val", "", "top1"), number)
        for number, row in enumerate(result.rows)
        if row.runs
    ]
    losses = [
        Curve(row.name, *row.runs[0].series("loss"), number) for number, row in enumerate(result.rows) if row.runs
    ]
    return render(
        TEMPLATE,
        title=result.plan.study.title,
        lead=tables.lead(result),
        comment=comment,
        spread=tables.spread_note(result),
        notes=[*tables.failures(result), *result.plan.notes],
        rows=tables.rows_table(result),
        shared=tables.rows_table(result, result.shared) if result.shared else None,
        claims=tables.claims_table(result),
        names=[row.name for row in result.rows],
        panels=[
            panel("validation top-1 (%)", "epoch", curves, unit="share"),
            panel("training loss", "epoch", losses),
        ]
        if curves
        else [],
        times=tables.time_table(result),
        machine=tables.machine_line(result),
        commands=list(result.plan.commands()),
    )


def markdown(result: StudyResult, comment: str) -> str:
    """Return the page's words and tables."""
    parts = [f"# {plain(result.plan.study.title)}", plain(tables.lead(result)), plain(comment)]
    parts += [f"- {plain(line)}" for line in tables.failures(result)]
    parts += [markdown_table(tables.rows_table(result)), tables.spread_note(result)]
    if result.shared:
        parts += ["## Teachers and starting points", markdown_table(tables.rows_table(result, result.shared))]
    if result.claims:
        parts += ["## Claims", markdown_table(tables.claims_table(result))]
    if any(row.runs for row in result.rows):
        parts += ["## Where the time went", markdown_table(tables.time_table(result))]
    parts += [tables.machine_line(result)]
    commands = list(result.plan.commands())
    if commands:
        parts += ["## Commands", "```sh\n" + "\n".join(commands) + "\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_json(result: StudyResult) -> dict[str, Any]:
    """Return everything that was found as plain values; shares are in [0, 1]."""
    plan, libraries = result.plan, result.machine.get("libraries")
    scale = plan.study.scales.get(plan.options.scale)  # pyright: ignore
    return {
        "study": plan.study.name,
        "title": plan.study.title,
        "command": plan.typed(),
        "scale": plan.options.scale,
        "about": scale.about if scale else tables.lead(result).rstrip("."),
        "columns": list(plan.study.columns),
        "seeds": plan.seeds,
        "versions": {"deitfast": __version__, **(libraries if isinstance(libraries, dict) else {})},
        "machine": result.machine,
        "rows": [
            {
                "name": row.name,
                "done": row.done,
                "planned": row.planned,
                "figures": {column: list(found.values) for column, found in row.figures.items()},
                "published": dict(row.published),
                "failures": list(row.failures),
            }
            for row in (*result.rows, *result.shared)
        ],
        "claims": [{**asdict(each.claim), "verdict": each.verdict, "reason": each.reason} for each in result.claims],
        "commands": list(plan.commands()),
    }
