"""Put a report together and write it."""

from pathlib import Path

from deitfast.report.compare import notes_of
from deitfast.report.markdown import markdown
from deitfast.report.page import Pictures, page
from deitfast.report.read import RunRecord, read_runs
from deitfast.report.samples import samples_of
from pipelines.files import write_text

PAGE, TABLE = "report.html", "report.md"
"""Files of a run's own report, in its folder."""


def write_report(folders: list[Path], out: Path, table: Path) -> list[str]:
    """Write the page of some runs to `out` and their tables, as Markdown, to `table`.

    Returns:
        What a reader must know first, a sentence each: what is missing, damaged or not comparable.

    Raises:
        UserError: one of the folders holds nothing of a run.
        DeitfastError: a file cannot be written.
    """
    runs = read_runs(folders)
    write(runs, [samples_of(run) for run in runs], out, table)
    return notes_of(runs)


def write(runs: list[RunRecord], pictures: list[Pictures], out: Path, table: Path) -> None:
    """Write both files of runs that have been read; raises DeitfastError as `write_report`."""
    write_text(out, page(runs, pictures))
    write_text(table, markdown(runs))
