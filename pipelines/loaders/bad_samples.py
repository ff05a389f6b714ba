"""Samples that cannot be read: they end the run, or are left out, named and counted.

A sample that is left out keeps its row, black, in a batch of the same shape. The row is not `valid`, and neither is
the row that is mixed with it: no loss and no metric sees either. Nothing takes its place: every other row, and every
cached target, stays what it is without the damage.
"""

import logging
from threading import Lock

from pipelines.errors import DeitfastError

log = logging.getLogger(__name__)


class BadSamples:
    """The samples of a split that a loader could not read so far."""

    def __init__(self, skip: bool) -> None:
        self._skip, self._met, self._lock = skip, set[int](), Lock()

    def __contains__(self, sample: int) -> bool:
        return sample in self._met

    def samples(self) -> list[int]:
        """Return their numbers."""
        return sorted(self._met)

    def meet(self, sample: int, failure: DeitfastError) -> None:
        """Note a sample that cannot be read, and log it the first time. May be called from several threads.

        Raises:
            DeitfastError: `failure` itself, where nothing is to be skipped.
        """
        if not self._skip:
            raise failure
        with self._lock:
            first = sample not in self._met
            self._met.add(sample)
        if first:
            log.warning("skipped: %s", failure.problem)
