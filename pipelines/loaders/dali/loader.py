"""The dali loader: DALI decodes each image once and cuts all its views; on the GPU beside the step, or on the CPU.

On CUDA, JPEGs that are not baseline (progressive, CMYK) and images stored raw are decoded by DALI's own threads on
the CPU. Which decoder takes a baseline JPEG depends on the batch it is in, and the GPU's decoders may differ from each
other by a level of 255: to that extent a batch of a resumed run may differ on CUDA. On the CPU it is the same bytes.
"""

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.batch.place import kernels_missing, place_crops
from pipelines.device import explain_oom, out_of_memory, to_device
from pipelines.loaders.batch_plan import BatchPlan
from pipelines.loaders.dali.decode_once import DecodeRun, decode_once
from pipelines.loaders.dali.graph import Graph, GraphSpec, release_memory
from pipelines.loaders.dali.setup import graph_spec, memory
from pipelines.loaders.dali.source import EncodedImages
from pipelines.loaders.prefetch import PrefetchingLoader

log = logging.getLogger(__name__)
BUFFER = "the images that the dali loader decodes"
REMEDY = "lower loader.prefetch, loader.workers or train.batch"


class DaliLoader(PrefetchingLoader):
    """Feeds stored images to DALI's graph, and assembles batches from the crops that it returns.

    DALI keeps `loader.prefetch` runs in flight on threads and streams of its own; besides, one batch waits for the
    step. Everything here happens in the thread that makes batches and on its stream. Memory: see `setup.memory`.
    """

    name = "dali"

    def __init__(self, plan: BatchPlan) -> None:
        self.plan, self.steps_per_epoch = plan, plan.sampler.steps_per_epoch
        self._source = EncodedImages(plan)
        self._spec: GraphSpec | None = None
        self._idle: list[Graph] = []
        """Graphs that no iteration uses now; building one takes a second on a GPU."""

    def close(self) -> None:
        """End DALI's threads, and return the memory that DALI caches to the device."""
        self._idle.clear()
        release_memory()

    def _ahead(self) -> int:
        return 1  # DALI's runs are made ahead as well

    def _batches(self, epoch: int, start_step: int, stop: Event) -> Iterator[Batch]:
        step, retried = start_step, -1
        while step < self.steps_per_epoch:
            try:
                for batch in self._run(epoch, step):
                    step += 1
                    yield batch
            except _RejectedError:  # an image to be skipped, known now: go on with another graph
                continue
            except (RuntimeError, MemoryError) as error:
                if step == retried or not out_of_memory(error):
                    with explain_oom(BUFFER, REMEDY):
                        raise
                retried, found = step, str(error).strip().splitlines()
            else:
                break
            # outside of the handler, as the exception keeps the graph and its memory alive
            log.info("dali: out of GPU memory (%s); torch's cache is emptied and the step tried again", found[-1])
            release_memory()
            torch.cuda.empty_cache()
        self._source.report()

    def _run(self, epoch: int, start_step: int) -> Iterator[Batch]:
        """Yield the epoch's batches from one graph. The graph is reused only if all its runs were taken."""
        graph = self._idle.pop() if self._idle else self._build()
        steps = range(start_step, self.steps_per_epoch)
        runs = decode_once(lambda step: self.plan.draw(epoch, step), steps, graph.spec.views)
        assembler = BatchAssembler(self.plan)
        started: deque[tuple[DecodeRun, np.ndarray | Exception]] = deque()

        def start(pool: ThreadPoolExecutor) -> None:
            if (run := next(runs, None)) is not None:
                try:
                    encoded, geometry, lost = self._source.fetch(pool, run)
                except Exception as error:  # raised in its turn, after the batches before it
                    started.append((run, error))
                    return
                if encoded:
                    graph.start(encoded, geometry)
                started.append((run, lost))

        with ThreadPoolExecutor(graph.spec.threads, thread_name_prefix="deitfast-dali") as pool:
            for _ in range(graph.spec.depth):
                start(pool)
            while started:
                run, lost = started[0]
                if isinstance(lost, Exception):
                    raise lost
                crops = self._take(graph, [run for run, _ in started])
                images, skipped = assembler.place(run, lost, crops)
                graph.release()
                del crops  # DALI's memory
                started.popleft()
                start(pool)
                yield self.plan.batch(images, run.rows, run.params, skipped, flipped=assembler.planar)
        self._idle.append(graph)

    def _build(self) -> Graph:
        if self._spec is None:
            self._spec = graph_spec(self.plan, self._source)
            usual, most = (memory(self.plan, self._spec, largest=largest) for largest in (False, True))
            parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in usual.items())
            text = "dali: usually %.2f GB on %s (%s); %.2f GB if the largest images came together"
            log.info(text, sum(usual.values()) / 1e9, self.plan.device, parts, sum(most.values()) / 1e9)
        return Graph(self._spec)

    def _take(self, graph: Graph, runs: list[DecodeRun]) -> list[Tensor]:
        """Return the crops of the first of `runs`, all of which are in flight; none where it has no images."""
        if not len(runs[0].samples):
            return []
        try:
            return graph.take()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            self._source.name_rejected(np.concatenate([run.samples for run in runs]), error)
            raise _RejectedError from error


class _RejectedError(Exception):
    """DALI rejected an image, which is to be skipped from now on."""


class BatchAssembler:
    """Copies the crops of one run after the other into the batches that they belong to.

    On a GPU a kernel does it, which mirrors them as well and separates them into the planes that augmentation reads;
    where kernels cannot run, and on the CPU, they are copied as they are.
    """

    def __init__(self, plan: BatchPlan) -> None:
        self._plan = plan
        self.planar = plan.device.type == "cuda" and not kernels_missing(plan.device)
        """Whether batches are mirrored, and planes in memory."""
        self._partial: deque[tuple[Tensor, list[int]]] = deque()
        """Batches that have some of their crops, the next one first, with their rows that are skipped."""

    def place(self, run: DecodeRun, lost: np.ndarray, crops: list[Tensor]) -> tuple[Tensor, list[int]]:
        """Copy a run's crops, R times uint8 [n, S, S, 3], to their rows, and return the batch that is complete now.

        Entry (crop, slot) of `run.destination` says k x B + row: `crops[crop][slot]` becomes that row of the batch k
        steps ahead. Crops with the same k and from the same tensor are copied together; which, and where to, are parts
        of one array, so that a single copy carries all of it to the device.

        Args:
            run: what was decoded.
            lost: bool [n], images that could not be read; their crops are black.
            crops: the decoder's output.

        Returns:
            uint8 [B, S, S, 3] on the device, memory of torch's; and the rows whose image cannot be read.
        """
        batch_rows = len(run.rows.samples)
        crop, slot = np.nonzero(run.destination >= 0)
        step, row = np.divmod(run.destination[crop, slot], batch_rows)
        while len(self._partial) <= step.max(initial=0):
            self._partial.append((self._allocate(batch_rows), []))

        order = np.lexsort((crop, step))  # by step, then by crop
        groups, sizes = np.unique(np.stack([step, crop]), axis=1, return_counts=True)  # in the same order
        moves = np.stack([slot, row, run.mirror[crop, slot], 0 * slot], axis=1)[order].astype(np.int32)
        parts = to_device(torch.from_numpy(moves), self._plan.device).split(sizes.tolist())
        for (ahead, source), part in zip(groups.T.tolist(), parts, strict=True):
            batch, _ = self._partial[ahead]
            if self.planar:
                place_crops(crops[source], part, batch.permute(0, 3, 1, 2), kernel=batch.is_cuda)
            else:
                from_slots, to_rows = part[:, :2].long().unbind(1)
                _as_int64(batch).index_copy_(0, to_rows, _as_int64(crops[source]).index_select(0, from_slots))

        for ahead, skipped in zip(step[lost[slot]].tolist(), row[lost[slot]].tolist(), strict=True):
            self._partial[ahead][1].append(skipped)
        return self._partial.popleft()

    def _allocate(self, rows: int) -> Tensor:
        """Return device memory for a batch; in evaluation zeros, as its last batch has rows without an image."""
        side, make = self._plan.augment.size, torch.empty if self._plan.train else torch.zeros
        shape = (rows, 3, side, side) if self.planar else (rows, side, side, 3)
        batch = make(shape, dtype=torch.uint8, device=self._plan.device)
        return batch.permute(0, 2, 3, 1) if self.planar else batch


def _as_int64(crops: Tensor) -> Tensor:
    """Return uint8 [n, S, S, 3] viewed as int64 [n, bytes / 8] where that fits: indexing then moves 8 bytes at once."""
    rows = crops.flatten(1)
    return rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows
