"""Put a report together and write it."""

import logging
from collections.abc import Sequence
from pathlib import Path

from deitfast.report.markdown import markdown
from deitfast.report.page import Pictures, page
from deitfast.report.read import RunRecord, read_runs
from deitfast.report.samples import samples_of
from deitfast.runlog import write_text

log = logging.getLogger("deitfast")
PAGE, TABLE = "report.html", "report.md"
"""Files of a run's own report, in its folder."""


def write_report(folders: Sequence[Path], out: Path, table: Path) -> list[RunRecord]:
    """Write the page of some runs to `out` and their tables, as Markdown, to `table`; return what was read.

    Raises:
        Mistake: one of the folders holds nothing of a run.
        Failure: a file cannot be written.
    """
    runs = read_runs(list(folders))
    return write(runs, [samples_of(run) for run in runs], out, table)


def write(runs: list[RunRecord], pictures: list[Pictures], out: Path, table: Path) -> list[RunRecord]:
    """Write both files of runs that have been read."""
    write_text(out, page(runs, pictures))
    write_text(table, markdown(runs))
    return runs
