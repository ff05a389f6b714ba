"""The loaders that decode on the host with worker threads: `cpu` and `reference`, which differ in their codec."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import Protocol

import numpy as np

from pipelines.batch import Batch
from pipelines.errors import DeitfastError
from pipelines.loaders.batch_plan import CHUNK, BatchPlan, undecodable_error
from pipelines.loaders.codecs.turbo import TurboCodec
from pipelines.loaders.geometry import Crop, CropTable, Geometry, ImageCrops, by_image
from pipelines.loaders.prefetch import PrefetchingLoader
from pipelines.rng.sampler import Rows
from pipelines.rng.view_params import ViewParams
from pipelines.storage.reader import RAW, Reader


class Codec(Protocol):
    """Decodes and resizes for one thread at a time."""

    def decode(self, data: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Return a window of a JPEG, uint8 [height, width, 3].

        Raises:
            ValueError: `data` is no JPEG that can be decoded.
        """
        ...

    def resize(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """Resize uint8 [h, w, 3] into uint8 [H, W, 3], bicubic and antialiased as PIL does it."""
        ...


class HostLoader(PrefetchingLoader):
    """Decodes on the host with worker threads, each image once a batch however many of its views the batch holds."""

    def __init__(self, name: str, plan: BatchPlan, codec: Callable[[], Codec]) -> None:
        self.name, self.plan, self.steps_per_epoch = name, plan, plan.sampler.steps_per_epoch
        self.new_codec = codec
        self._codecs: SimpleQueue[Codec] = SimpleQueue()  # a worker borrows one for the time of a chunk
        for _ in range(plan.workers):
            self._codecs.put(codec())

    def close(self) -> None:
        """Nothing outlives an iteration: each one joins its own threads."""

    def _batches(self, epoch: int, start_step: int, stop: Event) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(self.plan.workers, thread_name_prefix=f"deitfast-{self.name}")
        in_flight: deque[Callable[[], Batch]] = deque()
        try:
            for rows, params in self.plan.draws(epoch, start_step):
                in_flight.append(self._submit(pool, rows, params, stop))
                if len(in_flight) > 1:  # while a batch waits for its last images, idle threads work on the next
                    yield in_flight.popleft()()
            while in_flight:
                yield in_flight.popleft()()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, rows: Rows, params: ViewParams, stop: Event) -> Callable[[], Batch]:
        """Start rendering a batch in the pool; return a function that waits for it and returns it."""
        geometry = Geometry.of(params)
        covered = rows.valid.all() and geometry.fills(self.plan.augment.size)
        images = self.plan.allocate(len(rows.samples), zeroed=not covered)
        out, work = images.numpy(), by_image(rows, geometry)
        chunks = [work[start : start + CHUNK] for start in range(0, len(work), CHUNK)]
        skipped = pool.map(lambda chunk: self._render_chunk(chunk, out, stop), chunks)
        return lambda: self.plan.batch(images, rows, params, [row for part in skipped for row in part])

    def _render_chunk(self, chunk: list[ImageCrops], out: np.ndarray, stop: Event) -> list[int]:
        """Render images and return the rows of those that cannot be read."""
        codec, skipped = self._codecs.get(), []
        try:
            for sample, window, crops in chunk:
                if stop.is_set():  # no more batches are consumed: do not finish this one
                    break
                try:
                    pixels = decode_window(self.plan, codec, sample, *window)
                    for crop in crops:
                        resize_crop(codec, pixels, crop, out)
                except DeitfastError as failure:
                    self.plan.bad.record(sample, failure)
                    rows = [crop.row for crop in crops]
                    out[rows] = 0
                    skipped += rows
        finally:
            self._codecs.put(codec)
        return skipped


class TurboLoader(HostLoader):
    """The same in compiled code: a chunk of images is one call, which needs no Python and does not hold its lock.

    Images that the compiled codec does not take (PNGs of shards, damaged or odd files) are rendered one by one.
    """

    def _submit(self, pool: ThreadPoolExecutor, rows: Rows, params: ViewParams, stop: Event) -> Callable[[], Batch]:
        geometry, plan = Geometry.of(params), self.plan
        covered = rows.valid.all() and geometry.fills(plan.augment.size)
        images = plan.allocate(len(rows.samples), zeroed=not covered)
        out, table = images.numpy(), CropTable.of(rows, geometry)
        sources = image_table(plan.reader, table)
        chunk = min(max(len(sources) // (4 * plan.workers), CHUNK), 8 * CHUNK)

        def render(start: int) -> list[int]:
            if stop.is_set():
                return []
            codec = self._codecs.get()
            assert isinstance(codec, TurboCodec)
            try:
                statuses = codec.render(sources[start : start + chunk], table.crops, out, check=plan.spec.check)
            finally:
                self._codecs.put(codec)
            others = (start + np.flatnonzero(statuses)).tolist()
            return [row for one in others for row in self._render_chunk(table.images(one, one + 1), out, stop)]

        skipped = pool.map(render, range(0, len(sources), chunk))
        return lambda: plan.batch(images, rows, params, [row for part in skipped for row in part])


def image_table(reader: Reader, table: CropTable) -> np.ndarray:
    """Return what `TurboCodec.render` reads of each image of a batch, int64 [n, IMAGE_COLUMNS]."""
    samples = table.samples
    descriptors, offsets = reader.stored_in(samples)
    crcs = reader.crcs[samples].astype(np.int64) if reader.has_crcs else np.full(len(samples), -1)
    sizes, modes, heights, widths = (
        column[samples].astype(np.int64) for column in (reader.sizes, reader.modes, reader.heights, reader.widths)
    )
    stored = (descriptors, offsets, sizes, crcs, modes, heights, widths)
    return np.column_stack([*stored, table.windows, table.first_crop, table.counts])


def decode_window(
    plan: BatchPlan, codec: Codec, sample: int, top: int, left: int, height: int, width: int
) -> np.ndarray:
    """Return a window of a stored image, uint8 [height, width, 3].

    Raises:
        DeitfastError: the stored bytes are damaged or cannot be decoded; the message names the sample.
    """
    data = plan.stored(sample)
    if plan.reader.modes[sample] == RAW:
        image = data.reshape(int(plan.reader.heights[sample]), int(plan.reader.widths[sample]), 3)
        return image[top : top + height, left : left + width]
    try:
        return codec.decode(data, top, left, height, width)
    except (ValueError, OSError) as error:
        raise undecodable_error(plan.reader, sample, str(error)) from error


def resize_crop(codec: Codec, pixels: np.ndarray, crop: Crop, out: np.ndarray) -> None:
    """Crop a view from its image's decoded window, uint8 [h, w, 3], resize it, and write it to its row of `out`.

    `out` is the batch, uint8 [B, S, S, 3]; it must be black where the view does not reach.
    """
    row, top, left, height, width, resized_height, resized_width, offset_top, offset_left = crop
    image, target = pixels[top : top + height, left : left + width], out[row]
    if (height, width) != (resized_height, resized_width):
        if target.shape[:2] == (resized_height, resized_width) and offset_top == offset_left == 0:
            codec.resize(image, target)
            return
        cropped, image = image, np.empty((resized_height, resized_width, 3), np.uint8)
        codec.resize(cropped, image)
    paste(image, offset_top, offset_left, target)


def paste(image: np.ndarray, top: int, left: int, out: np.ndarray) -> None:
    """Copy the part of `image` seen through an S x S frame at (top, left) to `out`; leave the rest of `out` alone."""
    side = len(out)
    y0, y1 = max(top, 0), min(top + side, image.shape[0])
    x0, x1 = max(left, 0), min(left + side, image.shape[1])
    if y0 < y1 and x0 < x1:
        out[y0 - top : y1 - top, x0 - left : x1 - left] = image[y0:y1, x0:x1]
