"""Progress of long jobs: a live bar on a terminal, plain lines elsewhere; messages, and their copy in a file."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from pipelines.files import explain_os_error

log = logging.getLogger("deitfast")
LOGGERS = (log, logging.getLogger("pipelines"))
for _logger in LOGGERS:
    _logger.setLevel(logging.INFO)
LINE_SECONDS = 20.0
"""Least time between two plain lines of one bar."""


class Bar:
    """One long job's progress."""

    def __init__(self, label: str, total: int, progress: Progress | None) -> None:
        self._label, self._total, self._done, self._text = label, total, 0, ""
        self._first = 0
        self._progress = progress
        self._task = progress.add_task(label, total=total, text="") if progress else None
        self._began = self._printed = time.monotonic()

    def start(self, done: int) -> None:
        """Say that `done` were done before the bar appeared: the rate does not count them."""
        self._first = done
        self.reach(done)

    def advance(self, count: int = 1, text: str | None = None) -> None:
        """Count `count` more as done and show `text` behind the bar."""
        self.reach(self._done + count, text)

    def reach(self, done: int, text: str | None = None, total: int | None = None) -> None:
        """Show `done` as done, of `total` where that is only known now."""
        self._done, self._text = done, self._text if text is None else text
        self._total = self._total if total is None else total
        if self._progress and self._task is not None:
            self._progress.update(self._task, completed=done, total=self._total, text=self._text)
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            log.info("%s: %s", self._label, self._line())

    def rate(self) -> float:
        """Return how many a second have been done since the bar appeared."""
        return (self._done - self._first) / max(time.monotonic() - self._began, 1e-9)

    def _line(self) -> str:
        rate = self.rate()
        left = f"{duration((self._total - self._done) / rate)} left" if rate and self._done < self._total else ""
        return ", ".join(part for part in (f"{self._done:,} of {self._total:,}", self._text, left) if part)


class _Lines(Progress):
    """A bar and, on a line of its own, the text: both fit a terminal of 80 columns. One that is gone ends no job."""

    def start(self) -> None:
        """Appear, where there is a terminal still."""
        with suppress(OSError):
            super().start()

    def stop(self) -> None:
        """Go, where there is a terminal still."""
        with suppress(OSError):
            super().stop()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return what is on the screen."""
        yield self.make_tasks_table(self.tasks)
        yield from (Text(f"  {task.fields['text']}", overflow="ellipsis") for task in self.tasks if task.fields["text"])


class Display:
    """Hands out progress bars: live ones on a terminal, plain lines elsewhere, nothing on ranks other than 0."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        """Write to `console`; `quiet` (ranks other than 0) shows nothing."""
        self._console, self._quiet = console, quiet

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        """Show a job of `total` parts until the block ends."""
        if self._quiet or not self._console.is_terminal:
            yield Bar(label, total, None)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        )
        progress = _Lines(*columns, console=self._console, transient=True)
        bar = Bar(label, total, progress)
        with progress:
            yield bar


class Bars(ExitStack):
    """One bar at a time: a new one whenever the work has a new name."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display, self._name = display, ""
        self._bar: Bar | None = None

    def reach(self, what: str, done: int, total: int) -> None:
        """Show how far the work of that name is."""
        self._named(what, total).reach(done, total=total)

    def reach_images(self, what: str, done: int, total: int, size: int) -> None:
        """Show the same of images, with their rate and their size in bytes."""
        bar = self._named(what, total, done)
        bar.reach(done, f"{bar.rate():,.0f} images/s, {volume(size)}")

    def _named(self, name: str, total: int, done: int = 0) -> Bar:
        if self._bar is None or name != self._name:
            self.close()
            self._name, self._bar = name, self.enter_context(self._display.bar(name, total))
            self._bar.start(done)
        return self._bar


def start_logging(console: Console, *, quiet: bool = False) -> None:
    """Send deitfast's messages to the console: around live bars on a terminal, as unwrapped lines elsewhere."""
    if quiet:
        handler: logging.Handler = logging.NullHandler()
    elif console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    else:
        handler = logging.StreamHandler(console.file)
    for logger in LOGGERS:
        logger.handlers = [handler]
        logger.propagate = False


class _LogFile(logging.FileHandler):
    """A file of messages that nothing depends on: a full disk ends a run at its checkpoint, not here."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Go on: a later message brings along what the buffer keeps of those that found no room."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close the file, with the last messages or without."""
        with suppress(OSError):
            super().close()


@contextmanager
def logging_to(path: Path | None) -> Iterator[None]:
    """Copy deitfast's messages, with the time of day, to the end of a file while the block runs.

    Raises:
        DeitfastError: the file cannot be opened.
    """
    if path is None:
        yield
        return
    with explain_os_error(path):
        handler = _LogFile(path, errors="backslashreplace")  # a folder may have a name that is no text
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for logger in LOGGERS:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in LOGGERS:
            logger.removeHandler(handler)
        handler.close()


def duration(seconds: float) -> str:
    """Return a time span in human-readable form: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def volume(size: int) -> str:
    """Return bytes as GB, MB or kB."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{size / unit:,.3g} {name}"
