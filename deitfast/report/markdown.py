"""The report's tables as Markdown, to paste where figures cannot go."""

from deitfast.report import summary
from deitfast.report.compare import distillation_pairs, notes_of
from deitfast.report.read import RunRecord
from deitfast.report.summary import TextTable

SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\|`*<>[]"} | {"\n": " "})
"""What would be markup in a cell."""


def markdown(runs: list[RunRecord]) -> str:
    """Return the report's words and tables."""
    parts = [f"# {plain(summary.title(runs))}"]
    parts += [plain(summary.lead(run)) for run in runs if len(runs) == 1]
    if notes := notes_of(runs):
        parts.append("\n".join(f"- {plain(note)}" for note in notes))
    parts.append(markdown_table(summary.runs_table(runs)))
    parts += ["## Every head, on the validation split", markdown_table(summary.heads_table(runs))]
    if len(runs) > 1:
        parts += ["## What differs between the recipes", markdown_table(summary.differences_table(runs))]
    if pairs := distillation_pairs(runs):
        parts += ["## Teachers", markdown_table(summary.teachers_table(pairs))]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(table: TextTable) -> str:
    """Return a table in Markdown, numbers to the right."""
    if not table.rows:
        return "Nothing is recorded." if table.head[0] != "field" else "Nothing."
    rule = ["---:" if right else "---" for right in table.numeric]
    rows = [[plain(cell) for cell in row] for row in (table.head, *table.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def plain(text: str) -> str:
    """Return text in which nothing is markup."""
    return text.translate(SPECIAL)
