"""What the dali loader feeds its graph: stored images, their bytes and headers checked before DALI sees them."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipelines.errors import DeitfastError
from pipelines.loaders.batch_plan import CHUNK, BatchPlan, diagnose_rejected, undecodable_error
from pipelines.loaders.dali.decode_once import UNUSED_CROP, DecodeRun
from pipelines.loaders.dali.graph import PIXEL
from pipelines.storage.jpeg import read_frame
from pipelines.storage.reader import RAW

log = logging.getLogger(__name__)
UNSEEN, BASELINE, OTHER = 0, 1, 2
"""What is known of a sample's JPEG so far."""


class EncodedImages:
    """A split's encoded images, checked: an image that DALI rejects costs the graph, as it is of no use afterwards."""

    def __init__(self, plan: BatchPlan) -> None:
        self._plan, self._reader = plan, plan.reader
        self._kinds = np.zeros(plan.reader.num_samples, np.uint8)
        self._reported = 0

    def fetch(self, pool: ThreadPoolExecutor, run: DecodeRun) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Return what a graph needs for `run`, and which of its images cannot be read: those are one black pixel.

        The threads of `pool` read every byte, for the CRC32, which also brings them in from the disk.

        Returns:
            encoded, n arrays uint8 [bytes]; geometry, int64 [R, n, 8]; lost, bool [n].

        Raises:
            DeitfastError: a sample is damaged and nothing is to be skipped.
        """
        chunks = (run.samples[start : start + CHUNK].tolist() for start in range(0, len(run.samples), CHUNK))
        parts = pool.map(lambda chunk: [self._fetch(sample) for sample in chunk], chunks)
        found = [image for part in parts for image in part]
        lost = np.array([image is None for image in found], np.bool_)
        geometry = np.where(lost[:, None], UNUSED_CROP, run.geometry)
        return [PIXEL if image is None else image for image in found], geometry, lost

    def _fetch(self, sample: int) -> np.ndarray | None:
        if sample in self._plan.bad:
            return None
        try:
            data = self._plan.stored(sample)
            if self._reader.modes[sample] == RAW:
                header = f"P6\n{self._reader.widths[sample]} {self._reader.heights[sample]}\n255\n".encode()
                return np.concatenate([np.frombuffer(header, np.uint8), data])  # a PPM: DALI decodes those, too
            if self._kinds[sample] == UNSEEN:
                self._kinds[sample] = self._check_header(sample, data)
            return data
        except DeitfastError as failure:
            self._plan.bad.record(sample, failure)
            return None

    def _check_header(self, sample: int, data: np.ndarray) -> int:
        """Return what kind of JPEG a sample is, once its header gives the size that the index says."""
        try:
            frame = read_frame(data.tobytes())
        except ValueError as error:
            raise undecodable_error(self._reader, sample, str(error)) from error
        if (frame.height, frame.width) != (self._reader.heights[sample], self._reader.widths[sample]):
            raise undecodable_error(self._reader, sample, f"one of {frame.width} x {frame.height}")
        return BASELINE if frame.baseline else OTHER

    def name_rejected(self, samples: np.ndarray, error: RuntimeError) -> None:
        """Find out which of `samples` DALI could not decode, as DALI does not say.

        Raises:
            DeitfastError: one of them is broken and nothing is to be skipped, or none is.
        """
        broken = 0
        for sample in samples[self._reader.modes[samples] != RAW].tolist():
            if sample in self._plan.bad:  # DALI had a black pixel instead
                continue
            if failure := diagnose_rejected(self._reader, sample):
                broken += 1
                self._plan.bad.record(sample, failure)
        if not broken:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            message = next((line for line in lines if "rror" in line and not line.startswith("Critical")), lines[0])
            raise DeitfastError(
                f"DALI failed on {self._reader.path}",
                found=message,
                remedy="--loader cpu does without DALI; --debug shows all that DALI said",
            ) from error

    def report(self) -> None:
        """Log how many JPEGs no hardware decoder takes, if more were found since the last report."""
        others = np.count_nonzero(self._kinds == OTHER)
        if others > self._reported:
            seen = np.count_nonzero(self._kinds)
            text = "%s: %s of %s JPEGs are progressive or CMYK: the CPU decodes them, as no hardware decoder does"
            log.info(text, self._reader.path, f"{others:,}", f"{seen:,}")
        self._reported = others
