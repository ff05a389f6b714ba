"""What every loader is opened with, and the errors for images that cannot be decoded."""

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from pipelines.batch import Batch
from pipelines.errors import DeitfastError
from pipelines.loaders.bad_samples import BadSamples
from pipelines.rng.sampler import Rows, Sampler
from pipelines.rng.view_params import ViewParams, draw_eval, draw_train
from pipelines.spec import AugmentSpec, LoaderSpec
from pipelines.storage.reader import Reader
from pipelines.storage.transcode import BadImageError, stored_size
from pipelines.workers import local_world_size, usable_cores

MAX_FREE_BUFFERS = 4
"""Most unused buffers that are kept."""
CHUNK = 8
"""Images that a worker takes at once: a queue's round trip costs 20 us, decoding an image about 800."""

DRAWN_TOGETHER = 1024
"""Views that are drawn in one go: a drawing is some hundred calls of numpy, which take as long for few."""
ROW_COLUMNS = tuple(column.name for column in fields(Rows))


class BufferPool:
    """Host memory for batches, reused once no tensor refers to it.

    Fresh memory costs a page fault every 4 KB, a tenth of the cpu loader's time on images of 400 px.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=MAX_FREE_BUFFERS)

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return an uint8 tensor of a shape, not initialized."""
        array = self._free.popleft() if self._free else np.empty(shape, np.uint8)
        if array.shape != shape:
            array = np.empty(shape, np.uint8)
        owner = array.view()  # alive as long as any tensor that shares the memory: its end frees the buffer
        weakref.finalize(owner, self._free.append, array).atexit = False
        return torch.from_numpy(owner)


@dataclass(frozen=True)
class BatchPlan:
    """What every loader is opened with: the data, what is drawn, and where batches go."""

    reader: Reader
    augment: AugmentSpec
    spec: LoaderSpec
    sampler: Sampler
    train: bool
    """Draw windows at random (train) or take the recipe's center (evaluation)."""
    device: torch.device
    bad: BadSamples
    buffers: BufferPool = field(default_factory=BufferPool, repr=False, compare=False)

    @property
    def interpolation(self) -> str:
        """The filter of the resize: training's is bicubic, evaluation's as the spec says."""
        return "bicubic" if self.train else self.augment.eval_interpolation

    @property
    def workers(self) -> int:
        """Decoding threads: as asked for, or this process's share of the cores that processes of its run may use."""
        return self.spec.workers or max(1, usable_cores() // max(1, local_world_size()))

    def draw(self, epoch: int, step: int) -> tuple[Rows, ViewParams]:
        """Return one step's rows and everything drawn for them."""
        rows = self.sampler.rows(epoch, step)
        return rows, self._params(rows)

    def draws(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Rows, ViewParams]]:
        """Yield what `draw` gives for each step of an epoch from `start_step` on, several steps drawn at once."""
        pending: list[Rows] = []
        for step in range(start_step, self.sampler.steps_per_epoch):
            pending.append(self.sampler.rows(epoch, step))
            if sum(len(rows.samples) for rows in pending) >= DRAWN_TOGETHER:
                yield from self._draw_together(pending)
                pending = []
        yield from self._draw_together(pending)

    def _draw_together(self, steps: list[Rows]) -> Iterator[tuple[Rows, ViewParams]]:
        """Yield each step's rows and parameters; these depend on their own row alone, so they are drawn for all."""
        if not steps:
            return
        params = self._params(Rows(*(np.concatenate([getattr(rows, name) for rows in steps]) for name in ROW_COLUMNS)))
        ends = np.cumsum([len(rows.samples) for rows in steps]).tolist()
        for rows, end in zip(steps, ends, strict=True):
            yield rows, ViewParams(params.table[end - len(rows.samples) : end])

    def _params(self, rows: Rows) -> ViewParams:
        draw = draw_train if self.train else draw_eval
        return draw(self.augment, rows, self.reader.heights[rows.samples], self.reader.widths[rows.samples])

    def stored(self, sample: int) -> np.ndarray:
        """Return a sample's stored bytes, uint8 [n], checked against their CRC32 where the spec asks for it.

        Raises:
            DeitfastError: the bytes are not those that were converted.
        """
        return self.reader.read_verified(sample) if self.spec.check else self.reader.sample(sample)

    def allocate(self, rows: int, *, zeroed: bool = True) -> torch.Tensor:
        """Return host memory for a batch, uint8 [rows, S, S, 3]; page-locked where the device is CUDA."""
        side = self.augment.size
        if self.device.type == "cuda":
            make = torch.zeros if zeroed else torch.empty
            return make(rows, side, side, 3, dtype=torch.uint8, pin_memory=True)
        images = self.buffers.take((rows, side, side, 3))
        return images.zero_() if zeroed else images

    def batch(
        self,
        images: torch.Tensor,
        rows: Rows,
        params: ViewParams,
        skipped: np.ndarray | Sequence[int] = (),
        *,
        flipped: bool = False,
    ) -> Batch:
        """Return the batch of `rows` with `images`, uint8 [B, S, S, 3], on whatever device they are.

        `skipped` are the rows whose image cannot be read; they are black in `images`. `flipped`: see `Batch`.
        """
        labels = torch.from_numpy(self.reader.labels[rows.samples])
        valid = rows.valid.copy()
        valid[np.asarray(skipped, np.int64)] = False
        valid &= valid[rows.partners]  # a row that is mixed with a black image is of no use either
        return Batch(images, labels, torch.from_numpy(valid), params, len(skipped), flipped)


def undecodable_error(reader: Reader, sample: int, found: str = "") -> DeitfastError:
    """Return the error for a sample whose bytes are those that were converted, but cannot be decoded."""
    return DeitfastError(
        f"sample {sample} of {reader.location(sample).file} cannot be decoded",
        expected=f"a JPEG of {reader.widths[sample]} x {reader.heights[sample]} pixels",
        found=found,
        remedy="run deitfast verify on the data set and convert it again, or leave it out with loader.skip_bad",
    )


def diagnose_rejected(reader: Reader, sample: int) -> DeitfastError | None:
    """Return the error for a JPEG that a decoder rejected; None where Pillow reads it, at the size that is stored."""
    try:
        height, width = stored_size(reader.sample(sample).tobytes())
    except BadImageError as error:
        return undecodable_error(reader, sample, str(error))
    if (height, width) == (reader.heights[sample], reader.widths[sample]):
        return None
    return undecodable_error(reader, sample, f"one of {width} x {height}")
