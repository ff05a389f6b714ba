"""The ffcv loader: FFCV's own Loader, reader, threads and pixels over the same file, driven by our views.

Its pixels are FFCV's, not PIL's: libjpeg-turbo's fast inverse DCT, and OpenCV's INTER_AREA (bilinear where it
enlarges) instead of an antialiased bicubic; about 2/255 from `reference` on random resized crops of photographs.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from queue import Empty
from threading import Event, Lock
from typing import Any

import numba
import numpy as np
import torch

from pipelines.batch import Batch
from pipelines.errors import DeitfastError, UserError
from pipelines.loaders.batch_plan import BatchPlan, diagnose_rejected
from pipelines.loaders.geometry import Geometry
from pipelines.loaders.prefetch import PrefetchingLoader
from pipelines.rng.sampler import Rows
from pipelines.rng.view_params import ViewParams
from pipelines.storage.formats.beton import BetonReader
from pipelines.storage.reader import RAW, Reader


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's number of threads, which importing FFCV sets to one, and FFCV's deprecation warnings away."""
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)


with quiet():
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode, resize_crop
    from ffcv.loader import Loader, OrderOption
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler


def _set_num_threads(threads: int) -> None:
    """Take the place of `Compiler.set_num_threads`, which sets torch's threads too and fails above the cores."""
    Compiler.num_threads = min(threads, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    numba.set_num_threads(Compiler.num_threads)


Compiler.set_num_threads = _set_num_threads  # type: ignore[method-assign]


@contextmanager
def _interpreted() -> Iterator[None]:
    """Have FFCV leave the code around our loop as it is: compiling that again for every Loader takes seconds."""
    Compiler.set_enabled(False)
    try:
        yield
    finally:
        Compiler.set_enabled(True)


SAMPLE, ROW, WINDOW, RESIZED, OFFSET, HEIGHT, WIDTH, MODE, START, SIZE, STATUS = 0, 1, 2, 6, 8, 10, 11, 12, 13, 14, 15
"""First columns of a batch's table, int64 [B, 16], that takes the place of sample numbers in FFCV's thread."""
EMPTY = -1
"""In place of a sample: the row only fills up the batch."""

ONE_AT_A_TIME = Lock()
"""Where numba has neither TBB nor OpenMP, two threads in its parallel loops at once end the process."""


class FfcvLoader(PrefetchingLoader):
    """FFCV's Loader behind our contract.

    FFCV takes an order of sample numbers and has its decoders draw at random. Here every step's table (sample, window,
    resize, offset) is drawn by `rng.view_params` in FFCV's thread just before it decodes, and takes the place of the
    sample numbers: the windows are those of the other loaders because they are the same numbers.

    Memory: three output buffers of batch x S x S x 3 bytes, and one decoded image a worker. (FFCV's own crops
    allocate batch x largest image in each of five buffers: 37 GB for 1,024 images of at most 2,000 x 1,200 pixels.)
    The decoder is compiled in a process's first batch, which takes some seconds.

    Raises:
        UserError: the split is in shards, of which FFCV's reader knows nothing.
    """

    name = "ffcv"

    def __init__(self, plan: BatchPlan) -> None:
        self.plan, self.steps_per_epoch = plan, plan.sampler.steps_per_epoch
        self.reader = _beton(plan.reader)
        wanted: Any = {"image": [TableDecoder(plan.augment.size)], "label": None}
        with quiet(), _interpreted():
            self._loader: Any = Loader(
                str(plan.reader.path),
                batch_size=len(plan.sampler.rows(0, 0).samples),
                num_workers=plan.workers,
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                indices=[0],
                pipelines=wanted,
                batches_ahead=1,  # ours are made ahead by `PrefetchingLoader`
            )

    def close(self) -> None:
        """Let go of FFCV's buffers and its map of the file."""
        self._loader = None

    def _batches(self, epoch: int, start_step: int, stop: Event) -> Iterator[Batch]:
        if self._loader is None:
            raise RuntimeError("this loader is closed")
        if start_step >= self.steps_per_epoch:
            return
        run = _Run(self._loader, self.plan, self.reader, epoch, start_step)
        try:
            for _ in range(start_step, self.steps_per_epoch):
                decoded, rows, params, skipped = run.take()
                images = self.plan.allocate(len(decoded), zeroed=False)
                images.numpy()[:] = decoded  # FFCV writes the next batch into the same buffer
                yield self.plan.batch(images, rows, params, skipped)
        finally:
            run.end()


def _beton(reader: Reader) -> BetonReader:
    """Return the reader of the one format that FFCV reads. Raises UserError for another."""
    if isinstance(reader, BetonReader):
        return reader
    raise UserError(
        f"the ffcv loader cannot read {reader.path}",
        expected="FFCV's own format: one .beton file a split",
        found="tar shards",
        remedy="choose another loader (--loader cpu), or make a copy with "
        f"`deitfast convert dataset {reader.path.parent} OUTPUT`",
    )


class _Run(EpochIterator):
    """FFCV's thread for one epoch, with draws and checks before each batch, and without its three ways to hang."""

    def __init__(self, loader: Any, plan: BatchPlan, reader: BetonReader, epoch: int, start_step: int) -> None:
        self.plan, self.reader, self.at, self.start_step = plan, reader, epoch, start_step
        self.error: BaseException | None = None
        steps = plan.sampler.steps_per_epoch - start_step
        super().__init__(loader, range(steps * loader.batch_size))  # type: ignore[arg-type]  # starts the thread

    def run(self) -> None:
        """As FFCV's, keeping the exception that ended it: FFCV's consumer would wait for ever."""
        try:
            super().run()
        except BaseException as error:
            self.error = error

    def run_pipeline(self, b_ix: int, batch_indices: range, batch_slot: int, cuda_event: Any) -> Any:
        """Draw step `b_ix`, check its bytes, and let FFCV decode it."""
        if self.terminate_event.is_set():
            raise _EndedError
        self.reader.sample(-1)  # raises where the file has been cut: FFCV maps it, and reading on would end the process
        rows, params = self.plan.draw(self.at, self.start_step + b_ix)
        table = tabulate(self.reader, rows, params, self._damaged(rows) if self.plan.spec.check else ())
        (images,) = super().run_pipeline(b_ix, table, batch_slot, cuda_event)
        for sample in table[table[:, STATUS] != 0, SAMPLE].tolist():
            if failure := diagnose_rejected(
                self.reader, sample
            ):  # libjpeg's warnings come as failures, with all pixels there
                self.plan.bad.record(sample, failure)
        skipped = np.flatnonzero(rows.valid & np.isin(rows.samples, self.plan.bad.samples()))
        images[skipped] = 0
        return images, rows, params, skipped

    def _damaged(self, rows: Rows) -> list[int]:
        """Return the samples of a batch whose bytes are not those that were converted."""
        found = []
        for sample in np.unique(rows.samples[rows.valid]).tolist():
            try:
                self.plan.stored(sample)
            except DeitfastError as failure:
                self.plan.bad.record(sample, failure)
                found.append(sample)
        return found

    def take(self) -> tuple[np.ndarray, Rows, ViewParams, np.ndarray]:
        """Return the next batch's crops, rows, parameters and skipped rows, or raise what ended the thread."""
        while True:
            alive = self.is_alive()  # asked first: what a dying thread had put is still there
            try:
                return self.output_queue.get(timeout=0.2)[1]
            except Empty:
                if not alive:
                    raise self.error or RuntimeError("FFCV's thread ended early") from None

    def end(self) -> None:
        """Stop the thread and join it. It may be waiting to put a batch, or its end, into the full queue."""
        self.close()
        while self.is_alive():
            with self.output_queue.mutex:
                self.output_queue.queue.clear()
                self.output_queue.not_full.notify_all()
            self.join(timeout=0.02)


class _EndedError(Exception):
    """The consumer wants no more batches."""


def tabulate(reader: BetonReader, rows: Rows, params: ViewParams, damaged: Sequence[int]) -> np.ndarray:
    """Return a batch's table; rows of one sample are adjacent, and the status (0: fine) is still to be written."""
    geometry, count = Geometry.of(params), np.arange(len(rows.samples))
    samples = np.where(rows.valid & ~np.isin(rows.samples, damaged), rows.samples, EMPTY)
    stored = (reader.heights, reader.widths, reader.modes, reader.offsets, reader.sizes)
    drawn = (samples, count, geometry.crop_box, geometry.resized, geometry.offset)
    table = np.column_stack([*drawn, *(column[rows.samples] for column in stored), np.zeros_like(count)])
    return table[np.argsort(samples, kind="stable")]


class TableDecoder(SimpleRGBImageDecoder):
    """FFCV's operation that turns a batch's table into its crops."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        """Ask FFCV for uint8 [S, S, 3] a row."""
        shape, dtype = (self.size, self.size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        """Return the function that FFCV calls for every batch."""
        render = _compiled_render(Compiler.num_threads > 1)  # type: ignore[attr-defined]

        def decode(table, destination, metadata, storage_state):
            with ONE_AT_A_TIME:
                render(table, destination, storage_state[0])
            return destination

        return decode


@cache
def _compiled_render(parallel: bool) -> Callable:
    """Return the compiled loop over a batch: each image is decoded once, and all its views are cut out of it."""
    decode_jpeg, cut = numba.njit(imdecode), _compiled_cut()
    images: Any = numba.prange if parallel else range

    def render(table, out, file):
        for index in images(len(table)):
            i = np.int64(index)  # unsigned in a parallel loop, and unsigned with signed makes float
            sample = table[i, SAMPLE]
            if sample == EMPTY:
                out[table[i, ROW]] = 0
            elif i == 0 or table[i - 1, SAMPLE] != sample:
                height, width = table[i, HEIGHT], table[i, WIDTH]
                data = file[table[i, START] : table[i, START] + table[i, SIZE]]
                if table[i, MODE] == RAW:
                    image = data.reshape((height, width, 3))
                else:
                    image = np.empty((height, width, 3), np.uint8)
                    table[i, STATUS] = decode_jpeg(data, image, height, width, height, width, 0, 0, 1, 1, False, False)
                for j in range(i, len(table)):
                    if table[j, SAMPLE] != sample:
                        break
                    cut(image, table[j], out[table[j, ROW]])

    return numba.njit(render, nogil=True, parallel=parallel)


def _compiled_cut() -> Callable:
    """Return the compiled way from an image and a line of the table to uint8 [S, S, 3]; see `host.resize_crop`."""
    resize = numba.njit(resize_crop)

    def cut(image, line, out):
        top, left, height, width = line[WINDOW], line[WINDOW + 1], line[WINDOW + 2], line[WINDOW + 3]
        y, x, side = line[OFFSET], line[OFFSET + 1], out.shape[0]
        if line[RESIZED] == side and line[RESIZED + 1] == side and y == 0 and x == 0:
            resize(image, top, top + height, left, left + width, out)
            return
        resized = np.empty((line[RESIZED], line[RESIZED + 1], 3), np.uint8)
        resize(image, top, top + height, left, left + width, resized)
        y0, y1 = max(y, 0), min(y + side, resized.shape[0])
        x0, x1 = max(x, 0), min(x + side, resized.shape[1])
        out[:] = 0
        if y0 < y1 and x0 < x1:
            out[y0 - y : y1 - y, x0 - x : x1 - x] = resized[y0:y1, x0:x1]

    return numba.njit(cut)
