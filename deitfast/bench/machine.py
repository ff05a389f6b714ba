"""What the machine can do: a matrix product, the arithmetic of a step, and reading from the disk."""

import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from deitfast.bench.record import Arithmetic, Disk, Measured, Measurement
from deitfast.bench.timing import BenchCase, Clock, TimingOptions, measure, processor_seconds
from deitfast.bench.workbench import Workbench
from deitfast.config.recipe import Recipe
from deitfast.models.vit import build_model
from deitfast.runtime import Runtime
from pipelines.errors import pluralize
from pipelines.loaders.factory import free_memory
from pipelines.storage.reader import Reader

PRODUCT_SIDE = {"cuda": 8192, "cpu": 2048}
"""Rows and columns of the matrices whose product the step is compared with."""
COLD_BYTES = 1 << 28
"""Most that one measurement of the disk reads."""
STILL_CACHED = 0.05
"""Share of the file that may have stayed in the page cache for a reading to be called cold."""


def flops_per_image(recipe: Recipe, classes: int) -> float:
    """Return the floating-point operations of forward and backward for one image, matrix products and convolutions.

    Counted on a model on the meta device, so nothing is computed. Each multiplication and each addition is one.
    """
    images = 2
    with torch.device("meta"):
        model = build_model(recipe.model, size=recipe.augment.size, classes=classes, distilled=recipe.distilled).eval()
        pixels = torch.empty(images, 3, recipe.augment.size, recipe.augment.size)
    with FlopCounterMode(display=False) as counter:
        torch.stack([head.sum() for head in model(pixels)]).sum().backward()
    return counter.get_total_flops() / images


def matrix_product(runtime: Runtime, clock: Clock, timing: TimingOptions) -> tuple[float, int]:
    """Return the FLOP/s of a square matrix product in the step's dtype, and the side of its matrices."""
    side = PRODUCT_SIDE.get(runtime.device.type, PRODUCT_SIDE["cpu"])
    one, other = (torch.randn(side, side, device=runtime.device).to(runtime.input_dtype) for _ in range(2))
    out = torch.empty_like(one)
    case = BenchCase("matrix product", "", "device", 1, lambda: torch.mm(one, other, out=out), on_device=True)
    (found,) = measure([case], clock, timing)
    return 2 * side**3 * found.rate, side


def arithmetic(bench: Workbench, step: Measured, timing: TimingOptions) -> Arithmetic:
    """Return the measured step's FLOP/s and those of a large matrix product on the same device."""
    flops = flops_per_image(bench.recipe, len(bench.dataset.spec.classes))
    product, side = matrix_product(bench.runtime, bench.clock, timing)
    return Arithmetic(flops, flops * step.rate, product, side)


def measure_disk(reader: Reader, repeats: int, threads: int, rounds: int) -> Disk:
    """Read stored images from the disk in a random order, by as many threads as the loader has.

    Args:
        reader: the split. Its images must not be in use yet: what a process has mapped stays in the page cache.
        repeats: training images (views) that one stored image serves in an epoch.
        threads: reading at once.
        rounds: measurements; the page cache is emptied before each.
    """
    fits = reader.file_size < free_memory(torch.device("cpu"))
    order = np.random.default_rng(0).permutation(reader.num_samples)
    wanted = order[: max(1, np.searchsorted(np.cumsum(reader.sizes[order]), COLD_BYTES))]
    served = len(wanted) * repeats
    found = []
    if not hasattr(os, "posix_fadvise"):
        return Disk(None, "this system cannot drop a file from the page cache: the disk was not measured", fits)
    with _files(reader) as files:
        for _ in range(rounds):
            for file in files.values():
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            kept = max(map(cached_share, files.values()))
            if kept > STILL_CACHED:
                note = f"the page cache kept {kept:.0%} of a file that it was asked to drop: the disk was not measured"
                return Disk(None, note, fits)
            found.append(_read_all(files, reader, wanted, served, threads))
    what = f"{len(wanted):,} images in random order on {pluralize(threads, 'thread')}, the page cache dropped before"
    return Disk(Measured("reading, disk", what, "disk", False, tuple(found)), "", fits)


def cached_share(file: int) -> float:
    """Return the share of an open file's pages that are in the page cache.

    The kernel says so of files that one owns or may write; of others it says that everything is there (mincore(2)).
    """
    with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as mapped:
        pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        start, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view))
        failed = ctypes.CDLL(None).mincore(start, length, ctypes.c_void_p(pages.ctypes.data))
        del view  # a map with views of it cannot be closed
    return 1.0 if failed else float(np.mean(pages & 1))


def _read_all(files: dict[Path, int], reader: Reader, samples: np.ndarray, served: int, threads: int) -> Measurement:
    def read(sample: int) -> None:
        place = reader.location(sample)
        os.pread(files[place.file], place.size, place.offset)

    with ThreadPoolExecutor(threads) as pool:
        spent, began = processor_seconds(), time.perf_counter()
        for _ in pool.map(read, samples.tolist()):
            pass
        return Measurement(served, time.perf_counter() - began, processor_seconds() - spent)


@contextmanager
def _files(reader: Reader) -> Iterator[dict[Path, int]]:
    """Open the files that a split's images lie in, for reading."""
    with ExitStack() as stack:
        files = {}
        for path in {reader.location(sample).file for sample in range(reader.num_samples)}:
            files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, files[path])
        yield files
