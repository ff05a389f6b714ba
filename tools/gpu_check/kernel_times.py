"""How long augmentation takes on a GPU, by the GPU's own clock: the kernels and the reference."""

import torch

from pipelines.augment.chain import augment
from pipelines.batch import Batch
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
    if batch.images.device.type != "cuda":
        raise UserError("only a CUDA device has the clock to time kernels by", found=f"{batch.images.device}")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in PATHS}
    for run in range(WARM_UP + runs):
        for name, kernels in PATHS.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP)
            start.record()
            augment(batch, spec, dtype=dtype, train=True, patch=patch, kernels=kernels)
            end.record()
            if run >= WARM_UP:
                events[name].append((start, end))
    torch.cuda.synchronize(batch.images.device)
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}
