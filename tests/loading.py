"""How tests of loaders open them, damage what they read, and wait for them."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines.batch import Loader
from pipelines.loaders import opening
from pipelines.loaders.opening import available, open_loader
from pipelines.sampler import EvalSampler, TrainSampler
from pipelines.spec import AugmentSpec, LoaderSpec
from pipelines.storage.beton import BetonReader

CPU = torch.device("cpu")
REASONS = available()
LOADERS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(REASONS[name]), reason=REASONS[name] or "works here"))
    for name in opening.NAMES
]
SIZE, BATCH = 32, 12
RESIZED = AugmentSpec(size=SIZE, crop="resized", repeats=3, mix_group=4, seed=7)
PADDED = AugmentSpec(size=SIZE, crop="padded", repeats=2, mix_group=4, seed=7)


def open_train(
    name: str, reader: BetonReader, spec: AugmentSpec, rank: int = 0, world: int = 1, **more: object
) -> Loader:
    sampler = TrainSampler(reader.num_samples, BATCH * world, spec.seed, spec.repeats, spec.mix_group, rank, world)
    loader = LoaderSpec(**{"name": name, "workers": 2, **more})
    return open_loader(reader, spec, loader, sampler, train=True, device=CPU)


def open_eval(
    name: str, reader: BetonReader, spec: AugmentSpec, rank: int = 0, world: int = 1, **more: object
) -> Loader:
    sampler = EvalSampler(reader.num_samples, BATCH, rank, world)
    loader = LoaderSpec(**{"name": name, "workers": 2, **more})
    return open_loader(reader, spec, loader, sampler, train=False, device=CPU)


def damaged(reader: BetonReader, folder: Path, sample: int) -> BetonReader:
    """Copy a file with one bit of one sample flipped."""
    content = bytearray(reader.path.read_bytes())
    content[int(reader.offsets[sample] + reader.sizes[sample] // 2)] ^= 1
    path = folder / "damaged.beton"
    path.write_bytes(content)
    return BetonReader(path)


def within(seconds: float, work: Callable[[], object]) -> BaseException | None:
    """Run `work` in a thread and return what it raised; fail instead of hanging."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"no answer within {seconds} s"
    return raised[0] if raised else None
