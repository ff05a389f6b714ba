"""Samples that cannot be read: they end the run, or are skipped: logged and counted.

A sample that is skipped keeps its row, black, in a batch of the same shape. The row is not `valid`, and neither is
the row that is mixed with it: both are left out of losses and metrics. No other sample replaces it: every other row,
and every cached target, is what it would be without the damage.
"""

import logging
from threading import Lock

from pipelines.errors import DeitfastError

log = logging.getLogger(__name__)


class BadSamples:
    """The samples of a split that a loader could not read so far. Safe to use from several threads."""

    def __init__(self, skip: bool) -> None:
        self._skip, self._found, self._lock = skip, set[int](), Lock()

    def __contains__(self, sample: int) -> bool:
        return sample in self._found

    def samples(self) -> list[int]:
        """Return their numbers."""
        return sorted(self._found)

    def record(self, sample: int, failure: DeitfastError) -> None:
        """Remember a sample that cannot be read, and log it the first time.

        Raises:
            DeitfastError: `failure` itself, unless bad samples are to be skipped.
        """
        if not self._skip:
            raise failure
        with self._lock:
            first = sample not in self._found
            self._found.add(sample)
        if first:
            log.warning("skipped: %s", failure.problem)
