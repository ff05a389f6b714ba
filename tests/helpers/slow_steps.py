"""Trains under torchrun with steps of a known length and a real exchange: slow_steps.py SECONDS BYTES COMMAND...

The step sleeps and then reduces a buffer of BYTES over all ranks, as DDP does with gradients. Before, the exchange is
timed alone, and its bandwidth in Gbit/s written to exchange.json in the working folder.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from deitfast.cli import main
from deitfast.train.step import TrainStep

TRIES = 9


def exchange(buffer: torch.Tensor) -> float:
    """Reduce a buffer over all ranks and return the seconds that it took."""
    start = time.perf_counter()
    dist.all_reduce(buffer)
    return time.perf_counter() - start


def plant(seconds: float, size: int) -> None:
    """Make every step of this process sleep and exchange."""
    buffer, world, timed = torch.zeros(size // 4), int(os.environ.get("WORLD_SIZE", "1")), []

    def step(self: TrainStep, *arguments: object) -> torch.Tensor:
        if world > 1 and not timed:
            dist.barrier()
            timed.extend(exchange(buffer) for _ in range(TRIES))
            gbits = 2 * (world - 1) / world * size * 8 / statistics.median(timed) / 1e9
            Path("exchange.json").write_text(json.dumps(gbits))
        time.sleep(seconds)
        if world > 1:
            exchange(buffer)
        return torch.zeros(3)

    TrainStep.step = step


if __name__ == "__main__":
    plant(float(sys.argv[1]), int(sys.argv[2]))
    main(sys.argv[3:])
