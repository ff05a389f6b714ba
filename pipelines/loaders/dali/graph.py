"""The dali loader's graph: n encoded images in, up to R crops of each out; the same on the CPU and on the GPU."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import backend as library
from nvidia.dali import fn as operators
from nvidia.dali import types as compiled
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

backend: Any = library
fn: Any = operators  # generated modules that type checkers see little of
types: Any = compiled

PIXEL = np.frombuffer(b"P6\n1 1\n255\n\0\0\0", np.uint8)
"""A black pixel, encoded: for an image that cannot be read."""
DEVICE_PADDING = 16 << 20
HOST_PADDING = 8 << 20
"""Bytes that DALI's decoder keeps for each of its threads on the GPU, and twice for each in page-locked memory."""


@dataclass(frozen=True)
class GraphSpec:
    """What a graph is built from."""

    images: int
    """Most images in one run."""
    views: int
    """R: crops of each image."""
    side: int
    """S: side of the crops in pixels."""
    framed: bool
    """Crops are an S x S frame of a window that was resized to something else; else windows are resized to S x S."""
    threads: int
    """Decoding threads."""
    depth: int
    """Runs in flight at a time."""
    device: torch.device
    """CUDA: JPEGs are decoded and crops cut on that GPU; else on the CPU."""
    typical: int
    """Bytes of a typical decoded image: what DALI allocates at first."""
    interpolation: str = "bicubic"
    """Filter of the resize: bicubic or bilinear."""
    hw_decoder_load: float = 0.65
    """Share of the JPEGs that the GPU's own JPEG decoder takes, where it has one."""


class Graph:
    """A DALI pipeline. To be used by one thread at a time.

    DALI's graph is static and a run has one batch size, so each image gets R windows; unused ones are one pixel wide.
    An image is decoded once and resized R times, each time from one window (ROI).

    Raises:
        RuntimeError: DALI's, from `take`, if an image of the run cannot be decoded; the graph is of no use then.
    """

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec
        self._in_use: deque[list[np.ndarray]] = deque(maxlen=spec.depth + 1)
        """Inputs of the runs in flight and of the last one taken: DALI reads the encoded images in place."""
        self._writers: set[int] = set()
        """DALI's CUDA streams that wrote the crops taken last."""
        self._pipeline: Pipeline = define(spec)
        self._pipeline.build()
        nothing = np.zeros((spec.views, 1, 8), np.int64)
        nothing[..., 2:6] = 1
        for _ in range(spec.depth):  # DALI's first run starts as many as its queue is deep: make those empty ones
            self._feed([PIXEL], nothing)
        self._pipeline.schedule_run()
        for _ in range(spec.depth):
            self.take()

    def start(self, encoded: list[np.ndarray], geometry: np.ndarray) -> None:
        """Start a run; at most `depth` may be in flight.

        Args:
            encoded: n arrays uint8 [bytes], JPEG or PPM, which must stay as they are until the run is taken.
            geometry: int64 [R, n, 8]: window, resized, offset of each crop.
        """
        self._feed(encoded, geometry)
        self._pipeline.schedule_run()

    def take(self) -> list[Tensor]:
        """Wait for the oldest run and return its crops: R times uint8 [n, S, S, 3] on the device, in DALI's memory.

        On CUDA the host waits only until the run's last kernel is enqueued, and torch's current stream waits for the
        rest. DALI reuses the memory as soon as the tensors are dropped: call `release` before.
        """
        device = self.spec.device
        if device.type != "cuda":
            return [torch.from_dlpack(output.as_tensor()) for output in self._pipeline.outputs()]
        outputs = [output.as_tensor() for output in self._pipeline.outputs(torch.cuda.current_stream(device))]
        self._writers = writing_streams(outputs)
        # not by DLPack: for tensors that it exports DALI synchronizes the whole device at every run, in a thread, which
        # costs a core and memory, and ends the capture of a CUDA graph
        return [torch.as_tensor(output, device=device) for output in outputs]

    def release(self) -> None:
        """Make DALI's streams, which will reuse the crops' memory, wait for torch's current stream."""
        for writer in self._writers:
            reader = torch.cuda.current_stream(self.spec.device)
            torch.cuda.ExternalStream(writer, self.spec.device).wait_stream(reader)

    def _feed(self, encoded: list[np.ndarray], geometry: np.ndarray) -> None:
        self._in_use.append(encoded)
        self._pipeline.feed_input("encoded", encoded)
        corner, extent, resized, offset = (geometry[..., at : at + 2] for at in (0, 2, 4, 6))
        for view in range(self.spec.views):
            self._pipeline.feed_input(f"start{view}", corner[view].astype(np.float32))
            self._pipeline.feed_input(f"end{view}", (corner + extent)[view].astype(np.float32))
            if self.spec.framed:
                self._pipeline.feed_input(f"size{view}", resized[view].astype(np.float32))
                self._pipeline.feed_input(f"offset{view}", offset[view].astype(np.int32))


def writing_streams(outputs: list[Any]) -> set[int]:
    """Return the CUDA streams that write DALI's GPU tensors; one in the host's order has none (its stream is None)."""
    return {output.stream for output in outputs if output.stream is not None}


def define(spec: GraphSpec) -> Pipeline:
    """Return the pipeline, not built yet: inputs encoded, start0, end0, (size0, offset0,) start1, ...; R outputs."""
    gpu = spec.device.type == "cuda"
    pipeline = Pipeline(
        batch_size=spec.images,
        num_threads=spec.threads,
        device_id=spec.device.index if gpu else None,
        prefetch_queue_depth=spec.depth,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        images = fn.decoders.image(
            encoded,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,  # windows are drawn in the image as stored; PIL does not turn it either
            jpeg_fancy_upsampling=True,  # the CPU's (and PIL's) chroma on the GPU
            hw_decoder_load=spec.hw_decoder_load,
            affine=False,  # ranks that share a machine would all pin their threads to the same cores
            device_memory_padding=DEVICE_PADDING,
            host_memory_padding=HOST_PADDING,
            bytes_per_sample_hint=spec.typical,
        )
        pipeline.set_outputs(*(resize_view(images, view, spec) for view in range(spec.views)))
    return pipeline


def resize_view(images: Any, view: int, spec: GraphSpec) -> Any:
    """Return one crop of each image, uint8 [S, S, 3], resized with antialiasing as PIL does it; black outside."""

    def numbers(name: str, dtype: Any = types.FLOAT) -> Any:
        return fn.external_source(name=f"{name}{view}", dtype=dtype, ndim=1)

    side = (spec.side, spec.side)
    crops = fn.resize(
        images,
        roi_start=numbers("start"),
        roi_end=numbers("end"),
        size=numbers("size") if spec.framed else side,
        interp_type=types.INTERP_LINEAR if spec.interpolation == "bilinear" else types.INTERP_CUBIC,
        antialias=True,
        bytes_per_sample_hint=spec.side * spec.side * 3,
    )
    if not spec.framed:
        return crops
    return fn.slice(
        crops, start=numbers("offset", types.INT32), shape=side, axes=(0, 1), out_of_bounds_policy="pad", fill_values=0
    )


def release_memory() -> None:
    """Return device memory and page-locked memory that DALI caches and no graph uses."""
    backend.ReleaseUnusedMemory()
