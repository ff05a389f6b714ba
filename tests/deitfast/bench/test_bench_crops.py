"""Other libraries make the crops that the loader makes."""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from deitfast.bench.baseline_loaders import SkipError
from deitfast.bench.crop_baselines import PEERS, SameCrops, difference, ours, pillow, same_crops
from deitfast.bench.workbench import Workbench
from pipelines.loaders.codecs import turbo
from pipelines.storage.dataset import Dataset
from tests.helpers.small_runs import CPU, tiny_recipe

CROPS = ["augment.crop=resized", "train.batch=8", "augment.mix_group=4", "loader.name=reference"]
if turbo.unavailable():
    pytest.skip(turbo.unavailable(), allow_module_level=True)


@pytest.fixture
def work(tiny_dataset: Path) -> Iterator[SameCrops]:
    with (
        closing(Dataset.open(tiny_dataset)) as data,
        closing(Workbench(data, tiny_recipe(*CROPS), CPU)) as bench,
        ExitStack() as stack,
    ):
        yield same_crops(bench, stack)


def test_the_crops_are_those_of_the_loaders_first_batch(work: SameCrops) -> None:
    assert difference(work, ours(work)) == 0
    batch = next(iter(work.loader.epoch(0)))
    ours(work)()
    np.testing.assert_array_equal(work.out, batch.images.numpy())
    assert difference(work, pillow(work)) < 0.3  # Pillow 13 may begin with the height


SLOW_TO_IMPORT = ("torchvision v2", "DALI on the CPU", "SPDL")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_TO_IMPORT)) for name in PEERS]
)
def test_a_librarys_crops_are_the_same_but_for_its_filter(work: SameCrops, name: str) -> None:
    try:
        render = PEERS[name].open(work)
    except (ModuleNotFoundError, SkipError) as absent:
        pytest.skip(str(absent))
    turned = work.out.copy()
    assert difference(work, render) < 12  # noise, which each filter blurs its own way; another window is 60 away
    pillow(work)()
    turned[:] = work.out[:, ::-1]
    assert np.abs(turned.astype(int) - work.out).mean() > 12


def test_what_is_not_cropped_from_jpegs_is_not_compared(tiny_small: Path) -> None:
    with (
        closing(Dataset.open(tiny_small)) as data,
        closing(Workbench(data, tiny_recipe(), CPU)) as bench,
        ExitStack() as stack,
        pytest.raises(SkipError),
    ):
        same_crops(bench, stack)
