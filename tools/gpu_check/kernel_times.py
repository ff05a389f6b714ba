"""How long augmentation takes on a GPU, by the GPU's own clock: the kernels and the reference."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from pipelines.augment.chain import augment
from pipelines.batch import Batch
from pipelines.batch.place import place_crops
from pipelines.choices import Kernels
from pipelines.errors import UserError
from pipelines.spec import AugmentSpec

SLEEP = 40_000_000
"""GPU cycles, some 20 ms: while it sleeps the host starts all of a run, so that no gap between kernels is timed."""
WARM_UP = 5
PATHS: dict[str, Kernels] = {"reference": "off", "kernels": "on"}


def augment_times(
    batch: Batch, spec: AugmentSpec, *, dtype: torch.dtype = torch.bfloat16, patch: int = 16, runs: int = 100
) -> dict[str, list[float]]:
    """Return milliseconds of every run of the reference and of the kernels, run alternately.

    What is timed is all that happens on the device from drawn parameters and crops to the model's input.

    Args:
        batch: on a CUDA device.
        spec: what the batch was drawn from.
        dtype: of the model's input.
        patch: side of the patches it is cut into; 0: pixels.
        runs: of each, after a warm-up in which the kernels are compiled.

    Raises:
        UserError: the batch is on another device.
    """
    calls = {
        name: partial(augment, batch, spec, dtype=dtype, train=True, patch=patch, kernels=kernels)
        for name, kernels in PATHS.items()
    }
    return _milliseconds(calls, batch.images.device, runs)


def place_times(batch: Batch, *, runs: int = 100) -> dict[str, list[float]]:
    """Return milliseconds of every run of `place_crops` with a batch's crops, by torch and by its kernel, alternately.

    The crops come in another order than their rows', and half of them are mirrored. Arguments are `augment_times`'s.

    Raises:
        UserError: the batch is on another device.
    """
    crops, rows = batch.crops().contiguous(), len(batch.labels)
    numbers = torch.arange(rows, dtype=torch.int32)
    moves = torch.stack([numbers.flip(0), numbers, numbers % 2, numbers * 0], 1).to(crops.device)
    out = torch.empty((rows, 3, *crops.shape[1:3]), dtype=torch.uint8, device=crops.device)
    calls = {name: partial(place_crops, crops, moves, out, kernel=on == "on") for name, on in PATHS.items()}
    return _milliseconds(calls, crops.device, runs)


def _milliseconds(calls: Mapping[str, Callable[[], object]], device: torch.device, runs: int) -> dict[str, list[float]]:
    """Time calls by the GPU's own clock, alternately, after a warm-up."""
    if device.type != "cuda":
        raise UserError("only a CUDA device has the clock to time kernels by", found=f"{device}")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for run in range(WARM_UP + runs):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP)
            start.record()
            call()
            end.record()
            if run >= WARM_UP:
                events[name].append((start, end))
    torch.cuda.synchronize(device)
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}
