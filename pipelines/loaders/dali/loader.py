"""The dali loader: DALI decodes each image once and cuts all its views; on the GPU beside the step, or on the CPU.

On CUDA, JPEGs that are not baseline (progressive, CMYK) and images stored raw are decoded by DALI's own threads on
the CPU. Which decoder takes a baseline JPEG depends on the batch it is in, and the GPU's decoders may differ from each
other by a level of 255: to that extent a batch of a resumed run may differ on CUDA. On the CPU it is the same bytes.
"""

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.device import explain_oom, out_of_memory, to_device
from pipelines.loaders.dali.decode_once import Work, decode_once
from pipelines.loaders.dali.graph import Graph, GraphSpec, release_memory
from pipelines.loaders.dali.setup import graph_spec, memory
from pipelines.loaders.dali.source import EncodedImages
from pipelines.loaders.host import Plan
from pipelines.loaders.prefetch import prefetched

log = logging.getLogger(__name__)


class DaliLoader:
    """Feeds DALI's graph out of the mapped file, and puts the crops that it cuts where batches want them.

    DALI keeps `loader.prefetch` runs under way on threads and streams of its own; besides, one batch waits for the
    step. Everything here happens in the thread of `prefetched` and on its stream. Memory: see `dali_setup.memory`.
    """

    name = "dali"

    def __init__(self, plan: Plan) -> None:
        self.plan, self.steps_per_epoch = plan, plan.sampler.steps_per_epoch
        self._source = EncodedImages(plan)
        self._spec: GraphSpec | None = None
        self._idle: list[Graph] = []
        """Graphs that no iteration uses: building one takes a second on a GPU."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` from `start_step` on; see `pipelines.batch.Loader`."""
        return prefetched(lambda: self._batches(epoch, start_step), 1, self.plan.device)

    def close(self) -> None:
        """End DALI's threads, and have DALI hand the memory that it keeps back to the device."""
        self._idle.clear()
        release_memory()

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        step = start_step
        while step < self.steps_per_epoch:
            try:
                for batch in self._run(epoch, step):
                    step += 1
                    yield batch
            except _RefusedError:  # an image that is to be skipped, and is known now: go on with another graph
                continue
        self._source.report()

    def _run(self, epoch: int, start_step: int) -> Iterator[Batch]:
        """Keep a graph busy to the end of the epoch. It is used again only if all its runs were taken."""
        graph = self._idle.pop() if self._idle else self._built()
        steps = range(start_step, self.steps_per_epoch)
        works = decode_once(lambda step: self.plan.draw(epoch, step), steps, graph.spec.views)
        placing = _Placing(self.plan)
        started: deque[tuple[Work, np.ndarray | Exception]] = deque()

        def start(pool: ThreadPoolExecutor) -> None:
            if (work := next(works, None)) is not None:
                try:
                    encoded, geometry, lost = self._source.fetch(pool, work)
                except Exception as error:  # raised in its turn, behind the batches before it
                    started.append((work, error))
                    return
                if encoded:
                    graph.start(encoded, geometry)
                started.append((work, lost))

        with ThreadPoolExecutor(self.plan.workers, thread_name_prefix="deitfast-dali") as pool:
            for _ in range(graph.spec.depth):
                start(pool)
            while started:
                work, lost = started[0]
                if isinstance(lost, Exception):
                    raise lost
                crops = self._take(graph, [work for work, _ in started])
                images, skipped = placing.place(work, lost, crops)
                graph.let_go()
                del crops  # DALI's memory
                started.popleft()
                start(pool)
                yield self.plan.batch(images, work.rows, work.params, skipped)
        self._idle.append(graph)

    def _built(self) -> Graph:
        if self._spec is None:
            self._spec = graph_spec(self.plan, self._source)
            usual, most = (memory(self.plan, self._spec, largest=largest) for largest in (False, True))
            parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in usual.items())
            text = "dali: usually %.2f GB on %s (%s); %.2f GB if the largest images came together"
            log.info(text, sum(usual.values()) / 1e9, self.plan.device, parts, sum(most.values()) / 1e9)
        with explain_oom("the dali loader's graph", "lower loader.prefetch, loader.workers or train.batch"):
            return Graph(self._spec)

    def _take(self, graph: Graph, works: list[Work]) -> list[Tensor]:
        """Return the crops of the first of `works`, all of which are under way; none where it has no images."""
        if not len(works[0].samples):
            return []
        with explain_oom("the images that the dali loader decodes", "lower loader.prefetch or train.batch"):
            try:
                return graph.take()
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                self._source.name_refused(np.concatenate([work.samples for work in works]), error)
                raise _RefusedError from error


class _RefusedError(Exception):
    """DALI could not decode an image, which is to be skipped."""


class _Placing:
    """Gathers the crops of run after run into batches."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._begun: deque[tuple[Tensor, list[int]]] = deque()
        """Batches that have some of their crops, the next one first, and their rows that are skipped."""

    def place(self, work: Work, lost: np.ndarray, crops: list[Tensor]) -> tuple[Tensor, list[int]]:
        """Put a run's crops, R times uint8 [n, S, S, 3], where they belong, and return the batch that is whole now.

        Returns:
            uint8 [B, S, S, 3] on the device, memory of torch's; and the rows whose image cannot be read.
        """
        size = len(work.rows.samples)
        view, line = np.nonzero(work.place >= 0)
        ahead, row = np.divmod(work.place[view, line], size)
        while len(self._begun) <= ahead.max(initial=0):
            self._begun.append((self._canvas(size), []))
        order = np.lexsort((view, ahead))
        lines, rows = to_device(torch.from_numpy(np.stack([line, row])[:, order]), self._plan.device)
        pairs, counts = np.unique(np.stack([ahead, view]), axis=1, return_counts=True)  # sorted as `order` is
        parts = zip(*pairs.tolist(), lines.split(counts.tolist()), rows.split(counts.tolist()), strict=True)
        for step, crop, taken, put in parts:
            _lumps(self._begun[step][0]).index_copy_(0, put, _lumps(crops[crop]).index_select(0, taken))
        for step, skipped in zip(ahead[lost[line]].tolist(), row[lost[line]].tolist(), strict=True):
            self._begun[step][1].append(skipped)
        return self._begun.popleft()

    def _canvas(self, rows: int) -> Tensor:
        """Return room for a batch, black where evaluation only fills it up."""
        side, make = self._plan.augment.size, torch.empty if self._plan.train else torch.zeros
        return make(rows, side, side, 3, dtype=torch.uint8, device=self._plan.device)


def _lumps(crops: Tensor) -> Tensor:
    """Return a view of uint8 [n, S, S, 3], [n, ...], of 8 bytes to an element if they fit: indexing moves elements."""
    rows = crops.flatten(1)
    return rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows
