"""What looks on while a run trains: its report, and TensorBoard where it is asked for."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from deitfast.report.live import LiveReport
from pipelines.errors import UserError

log = logging.getLogger("deitfast")
RUNNING, EPOCH = "running", "epoch"
"""Tags of what is known inside an epoch (means since its start) and of its row in metrics.jsonl."""


class Callbacks:
    """A run's onlookers. Nothing that goes wrong here ends a run."""

    def __init__(self, folder: Path | None, *, tensorboard: bool) -> None:
        """Callbacks over the run in `folder`; None (ranks other than 0): watch nothing.

        Raises:
            UserError: TensorBoard is asked for and not installed.
        """
        self._report = LiveReport(folder) if folder else None
        self._board = TensorBoard(folder / "tensorboard") if folder and tensorboard else None

    def log_step(self, step: int, **figures: float) -> None:
        """Show figures of the current epoch so far; `step` counts from the run's start, and is not the epoch's last."""
        if self._board:
            self._board.write(step, {f"{RUNNING}/{name}": value for name, value in figures.items()})

    def log_epoch(self, step: int, row: dict[str, Any], *, last: bool) -> None:
        """Show an epoch's row of metrics.jsonl, which is written already."""
        if self._board:
            waiting = row["waited_seconds"] / max(row["seconds"], 1e-9)
            whole = {"loss": row["loss"], "images_per_second": row["images_per_second"], "waiting": waiting}
            self._board.write(step, _scalars(EPOCH, row) | _scalars(RUNNING, whole))
        if self._report and last:
            self._report.write(final=True)
        elif self._report:
            self._report.refresh()

    def close(self) -> None:
        """Write what is still in memory."""
        if self._board:
            self._board.close()


class TensorBoard:
    """Event files, opened at the first point, which takes the place of all that an earlier process put there or later.

    So a run that went back to a checkpoint has every point once.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise UserError(
                "--tensorboard: TensorBoard is not installed",
                found=str(error),
                remedy="pip install 'deitfast[tensorboard]', or pip install tensorboard",
            ) from None
        self._folder, self._open = folder, SummaryWriter
        self._writer: Any = None
        self._last = -1

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add points at a step; a warning, once, where that fails."""
        if self._open is None:
            return
        try:
            if self._writer is None or step < self._last:
                self.close()
                self._writer = self._open(str(self._folder), purge_step=step)
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
            self._last = step
        except (OSError, RuntimeError) as error:
            log.warning("TensorBoard's files cannot be written, and are left as they are: %s", error)
            self._open = None

    def close(self) -> None:
        """Close the file that is open, if any."""
        if self._writer is not None:
            with suppress(OSError, RuntimeError):  # every point was flushed when it came: `write` has told what failed
                self._writer.close()
            self._writer = None


def _scalars(prefix: str, tree: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by their full names; an evaluation's stand under its own: val/joint/top1."""
    found: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _scalars(name if prefix == EPOCH else f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}/{name}"] = value
    return found
