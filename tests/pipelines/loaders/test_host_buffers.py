"""The memory of batches is used again: only when nothing holds it, and without showing what it held."""

from pathlib import Path

import pytest
import torch

from pipelines.loaders.batch_plan import MAX_FREE_BUFFERS, BufferPool
from pipelines.loaders.factory import open_loader
from pipelines.rng.sampler import EvalSampler, SamplerSpec, TrainSampler
from pipelines.spec import AugmentSpec, LoaderSpec
from pipelines.storage.formats.beton import BetonReader

SHAPE = (2, 4, 4, 3)
SAMPLERS = {
    "train": TrainSampler(SamplerSpec(samples=32, batch=8, seed=0, repeats=1, group=1)),
    "val": EvalSampler(32, 12),
}


def test_memory_is_taken_again_only_when_nothing_of_the_batch_is_held() -> None:
    buffers = BufferPool()
    first = buffers.take(SHAPE).fill_(1)
    at, row = first.data_ptr(), first[1]
    del first
    other = buffers.take(SHAPE).fill_(2)
    assert other.data_ptr() != at
    assert (row == 1).all()
    del row
    assert buffers.take(SHAPE).data_ptr() == at
    assert tuple(buffers.take((3, 4, 4, 3)).shape) == (3, 4, 4, 3)


@pytest.mark.parametrize("split", SAMPLERS)
@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_what_memory_held_before_shows_nowhere(tiny_dataset: Path, split: str, crop: str) -> None:
    """Padded crops reach over the image, and evaluation fills up its last batch: both are black there."""
    spec = AugmentSpec(size=32, crop=crop, repeats=1, mixup=0.0, cutmix=0.0)
    sampler, reader = SAMPLERS[split], BetonReader(tiny_dataset / "train.beton")
    plan = LoaderSpec(name="reference")
    fresh, used = (
        open_loader(reader, spec, plan, sampler, train=split == "train", device=torch.device("cpu")) for _ in range(2)
    )
    rows = len(sampler.rows(0, 0).samples)
    for dirty in [used.plan.buffers.take((rows, 32, 32, 3)) for _ in range(MAX_FREE_BUFFERS)]:
        dirty.fill_(255)
    del dirty
    for one, other in zip(list(fresh.epoch(0)), used.epoch(0), strict=True):
        assert torch.equal(one.images, other.images)
