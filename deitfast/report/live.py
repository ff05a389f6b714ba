"""A run's own report, kept up while it trains: never for more than a hundredth of the time, never at a run's cost."""

import logging
import time
from pathlib import Path

from deitfast.report.page import Pictures
from deitfast.report.read import read_runs
from deitfast.report.samples import samples_of
from deitfast.report.write import PAGE, TABLE, write

log = logging.getLogger("deitfast")
TIME_SHARE = 0.01
"""Most of a run's time that refreshing may take; the report at its end is always written."""
FIRST_SECONDS = 3.0
"""What the first report is taken to cost: importing matplotlib, and making the sample images, which is done once."""


class LiveReport:
    """Writes RUN/report.html and RUN/report.md."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._began = time.monotonic()
        self._spent, self._cost = 0.0, FIRST_SECONDS
        self._pictures: Pictures | None = None

    def refresh(self) -> None:
        """Write the report if that keeps within TIME_SHARE of the time since the run (or its resumption) began."""
        if self._spent + self._cost <= TIME_SHARE * (time.monotonic() - self._began):
            self.write()

    def write(self, *, final: bool = False) -> None:
        """Write the report, and say where it is if it is the `final` one; a warning where that fails."""
        began = time.monotonic()
        try:
            (run,) = read_runs([self._folder])
            if self._pictures is None:
                self._pictures = samples_of(run)
            write([run], [self._pictures], self._folder / PAGE, self._folder / TABLE)
            if final:
                log.info("report: %s", self._folder / PAGE)
        except Exception as error:  # whatever it is, training is worth more than its report
            log.warning("the report could not be written: %s: %s", type(error).__name__, error)
        self._cost = time.monotonic() - began
        self._spent += self._cost
