"""From (epoch, step) to a batch on the host: what every decoding loader shares."""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event
from typing import Protocol

import numpy as np
import torch

from pipelines.batch import Batch
from pipelines.errors import DeitfastError
from pipelines.loaders.bad_samples import BadSamples
from pipelines.loaders.geometry import Crop, Geometry, WantedImage, by_image
from pipelines.loaders.prefetch import broken_off, prefetched
from pipelines.rng.sampler import Rows, Sampler
from pipelines.rng.view_params import ViewParams, draw_eval, draw_train
from pipelines.spec import AugmentSpec, LoaderSpec
from pipelines.storage.reader import RAW, Reader
from pipelines.storage.transcode import BadImageError, stored_size
from pipelines.workers import usable_cores

KEPT_CANVASES = 4
"""Most free ones that are kept."""
CHUNK = 8
"""Images that a worker takes at once: a queue's round trip costs 20 us, decoding an image about 800."""


class BufferPool:
    """Host memory for batches, reused once nothing of a batch is held any more.

    Fresh memory costs a page fault every 4 KB, a tenth of the cpu loader's time on images of 400 px.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=KEPT_CANVASES)

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return uint8 of a shape, its values left over from whatever it held before."""
        array = self._free.popleft() if self._free else np.empty(shape, np.uint8)
        if array.shape != shape:
            array = np.empty(shape, np.uint8)
        lease = array.view()  # the tensor holds this object, and so does whatever shares the tensor's memory
        weakref.finalize(lease, self._free.append, array).atexit = False
        return torch.from_numpy(lease)


@dataclass(frozen=True)
class Plan:
    """All that decides which batches a loader makes and where they go."""

    reader: Reader
    augment: AugmentSpec
    spec: LoaderSpec
    sampler: Sampler
    train: bool
    """Draw windows at random (train) or take the recipe's center (evaluation)."""
    device: torch.device
    bad: BadSamples
    canvases: BufferPool = field(default_factory=BufferPool, repr=False, compare=False)

    @property
    def interpolation(self) -> str:
        """The filter of the resize: training's is bicubic, evaluation's as the spec says."""
        return "bicubic" if self.train else self.augment.eval_interpolation

    @property
    def workers(self) -> int:
        """Decoding threads: as asked for, or one for each core that this process may use."""
        return self.spec.workers or usable_cores()

    def draw(self, epoch: int, step: int) -> tuple[Rows, ViewParams]:
        """Return one step's rows and everything drawn for them."""
        rows = self.sampler.rows(epoch, step)
        draw = draw_train if self.train else draw_eval
        return rows, draw(self.augment, rows, self.reader.heights[rows.samples], self.reader.widths[rows.samples])

    def stored(self, sample: int) -> np.ndarray:
        """Return a sample's stored bytes, uint8 [n], checked against their CRC32 where the spec asks for it.

        Raises:
            DeitfastError: the bytes are not those that were converted.
        """
        return self.reader.read_verified(sample) if self.spec.check else self.reader.sample(sample)

    def canvas(self, rows: int, *, blank: bool = True) -> torch.Tensor:
        """Return uint8 [rows, S, S, 3], zeros if `blank`, in page-locked memory where the device is CUDA."""
        side = self.augment.size
        if self.device.type == "cuda":
            make = torch.zeros if blank else torch.empty
            return make(rows, side, side, 3, dtype=torch.uint8, pin_memory=True)
        images = self.canvases.take((rows, side, side, 3))
        return images.zero_() if blank else images

    def batch(
        self, images: torch.Tensor, rows: Rows, params: ViewParams, skipped: np.ndarray | Sequence[int] = ()
    ) -> Batch:
        """Return the batch of `rows` with `images`, uint8 [B, S, S, 3], on whatever device they are.

        `skipped` are the rows whose image cannot be read; they are black in `images`.
        """
        labels = torch.from_numpy(self.reader.labels[rows.samples])
        valid = rows.valid.copy()
        valid[np.asarray(skipped, np.int64)] = False
        valid &= valid[rows.partners]  # what is mixed with a black picture teaches nothing either
        return Batch(images, labels, torch.from_numpy(valid), params, len(skipped))


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


class HostLoader:
    """Decodes on the host with worker threads, each image once a batch however many of its views the batch holds."""

    def __init__(self, name: str, plan: Plan, codec: Callable[[], Codec]) -> None:
        self.name, self.plan, self.steps_per_epoch = name, plan, plan.sampler.steps_per_epoch
        self.new_codec = codec
        self._codecs: SimpleQueue[Codec] = SimpleQueue()  # a worker borrows one for the time of a chunk
        for _ in range(plan.workers):
            self._codecs.put(codec())

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` from `start_step` on; see `pipelines.batch.Loader`."""
        return prefetched(lambda: self._batches(epoch, start_step), self.plan.spec.prefetch, self.plan.device)

    def close(self) -> None:
        """Nothing outlives an iteration: each one joins its own threads."""

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(self.plan.workers, thread_name_prefix=f"deitfast-{self.name}")
        begun: deque[Callable[[], Batch]] = deque()
        try:
            for step in range(start_step, self.steps_per_epoch):
                begun.append(self._begin(pool, *self.plan.draw(epoch, step)))
                if len(begun) > 1:  # while a batch waits for its last images, the other threads are at the next
                    yield begun.popleft()()
            while begun:
                yield begun.popleft()()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, rows: Rows, params: ViewParams) -> Callable[[], Batch]:
        """Have the threads render a batch; return what waits for them and gives it."""
        geometry = Geometry.of(params)
        covered = rows.valid.all() and geometry.fills(self.plan.augment.size)
        images = self.plan.canvas(len(rows.samples), blank=not covered)
        out, work, stop = images.numpy(), by_image(rows, geometry), broken_off()
        chunks = [work[start : start + CHUNK] for start in range(0, len(work), CHUNK)]
        skipped = pool.map(lambda chunk: self._render_chunk(chunk, out, stop), chunks)
        return lambda: self.plan.batch(images, rows, params, [row for part in skipped for row in part])

    def _render_chunk(self, chunk: list[WantedImage], out: np.ndarray, stop: Event) -> list[int]:
        """Render images and return the rows of those that cannot be read."""
        codec, skipped = self._codecs.get(), []
        try:
            for sample, window, crops in chunk:
                if stop.is_set():  # Ctrl-C, while images come slowly: this batch will not be looked at
                    break
                try:
                    pixels = decoded(self.plan, codec, sample, *window)
                    for crop in crops:
                        cut(codec, pixels, crop, out)
                except DeitfastError as failure:
                    self.plan.bad.meet(sample, failure)
                    rows = [crop.row for crop in crops]
                    out[rows] = 0
                    skipped += rows
        finally:
            self._codecs.put(codec)
        return skipped


def decoded(plan: Plan, codec: Codec, sample: int, top: int, left: int, height: int, width: int) -> np.ndarray:
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
        raise undecodable(plan.reader, sample, str(error)) from error


def undecodable(reader: Reader, sample: int, found: str = "") -> DeitfastError:
    """Return the error for a sample whose bytes are those that were converted, but cannot be decoded."""
    return DeitfastError(
        f"sample {sample} of {reader.location(sample).file} cannot be decoded",
        expected=f"a JPEG of {reader.widths[sample]} x {reader.heights[sample]} pixels",
        found=found,
        remedy="run deitfast verify on the data set and convert it again, or leave it out with loader.skip_bad",
    )


def refused(reader: Reader, sample: int) -> DeitfastError | None:
    """Return what to raise for a JPEG that a decoder did not take: nothing where Pillow reads it as it is stored."""
    try:
        height, width = stored_size(reader.sample(sample).tobytes())
    except BadImageError as error:
        return undecodable(reader, sample, str(error))
    if (height, width) == (reader.heights[sample], reader.widths[sample]):
        return None
    return undecodable(reader, sample, f"one of {width} x {height}")


def cut(codec: Codec, pixels: np.ndarray, crop: Crop, out: np.ndarray) -> None:
    """Cut a view out of what was decoded of its image, uint8 [h, w, 3], resize it, and write it to its row of `out`.

    `out` is the whole batch, uint8 [B, S, S, 3]; it is black already where the view does not reach.
    """
    row, top, left, height, width, resized_height, resized_width, offset_top, offset_left = crop
    image, target = pixels[top : top + height, left : left + width], out[row]
    if (height, width) != (resized_height, resized_width):
        if target.shape[:2] == (resized_height, resized_width) and offset_top == offset_left == 0:
            codec.resize(image, target)
            return
        window, image = image, np.empty((resized_height, resized_width, 3), np.uint8)
        codec.resize(window, image)
    paste(image, offset_top, offset_left, target)


def paste(image: np.ndarray, top: int, left: int, out: np.ndarray) -> None:
    """Copy the part of `image` seen through an S x S frame at (top, left) to `out`; leave the rest of `out` alone."""
    side = len(out)
    y0, y1 = max(top, 0), min(top + side, image.shape[0])
    x0, x1 = max(left, 0), min(left + side, image.shape[1])
    if y0 < y1 and x0 < x1:
        out[y0 - top : y1 - top, x0 - left : x1 - left] = image[y0:y1, x0:x1]
