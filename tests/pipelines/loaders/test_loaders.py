"""One contract, held against every loader: which images, which pixels, in which order, and how it ends."""

import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.batch import Batch
from pipelines.errors import DeitfastError, UserError
from pipelines.loaders import factory
from pipelines.loaders.codecs import turbo
from pipelines.loaders.factory import available, choose, open_loader
from pipelines.loaders.geometry import Geometry
from pipelines.loaders.resident import gather
from pipelines.rng.sampler import EvalSampler, SamplerSpec, TrainSampler
from pipelines.spec import AugmentSpec, LoaderSpec
from pipelines.storage.reader import Reader
from tests.helpers.loader_contract import (
    BATCH,
    CPU,
    LOADERS,
    PADDED,
    REASONS,
    RESIZED,
    SIZE,
    open_eval,
    open_train,
    write_photos,
    write_small,
)  # fmt: skip
from tests.helpers.stored_images import jpeg, photo, write_split

MEAN_BOUND = {"resident": 0.0, "dali": 0.3, "cpu": 0.1, "ffcv": 4.0, "reference": 0.0}
"""Largest mean difference from `reference`, in levels of 255, for each loader on these photographs."""


@pytest.fixture(scope="session", params=[".beton", ".wds"])
def suffix(request: pytest.FixtureRequest) -> str:
    """Both formats: the contract is held over each."""
    return request.param


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory, suffix: str) -> Reader:
    return write_photos(tmp_path_factory.mktemp("photos") / f"photos{suffix}")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, suffix: str) -> Reader:
    return write_small(tmp_path_factory.mktemp("small") / f"small{suffix}")


def fits(name: str, reader: Reader) -> bool:
    return name != "resident" or len(set(reader.heights)) == 1


def both(name: str, photos: Reader, small: Reader) -> list[tuple[Reader, AugmentSpec]]:
    """The data sets and crops that a loader takes."""
    pairs = [(photos, RESIZED), (photos, PADDED), (small, PADDED), (small, RESIZED)]
    return [pair for pair in pairs if fits(name, pair[0])]


def difference(batches: list[Batch], others: list[Batch]) -> torch.Tensor:
    """Absolute differences, int32 [N, S, S, 3], over the valid rows."""
    valid = torch.cat([batch.valid for batch in batches])
    one, other = (torch.cat([batch.images for batch in some]).int() for some in (batches, others))
    return (one - other).abs()[valid]


def assert_equal(some: list[Batch], others: list[Batch]) -> None:
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.valid, other.valid)
        np.testing.assert_array_equal(one.params.table, other.params.table)


pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.mark.parametrize("name", LOADERS)
def test_batches_are_what_the_contract_says(name: str, photos: Reader, small: Reader) -> None:
    for reader, spec in both(name, photos, small):
        loader = open_train(name, reader, spec)
        batches = list(loader.epoch(1))
        assert loader.name == name
        assert len(batches) == loader.steps_per_epoch
        for batch in batches:
            assert batch.images.shape == (BATCH, SIZE, SIZE, 3)
            assert batch.images.dtype == torch.uint8
            assert batch.labels.dtype == torch.int64
            assert batch.valid.dtype == torch.bool
            assert batch.valid.all()
            np.testing.assert_array_equal(batch.labels, 100 + batch.params.sample)
        loader.close()
        loader.close()


@pytest.mark.parametrize("name", LOADERS)
def test_a_jpeg_that_libjpeg_only_warns_of_is_read(name: str, tmp_path: Path, suffix: str) -> None:
    image = photo(np.random.default_rng(0), SIZE, SIZE)
    warned = jpeg(image)[:-2] + b"stray bytes" + b"\xff\xd9"  # as cameras and old programs leave them there
    reader = write_split(tmp_path / f"warned{suffix}", [(image, jpeg(image)), (image, warned)])
    if name == "ffcv":  # whose decoder gives other pixels without a word: conversion re-encodes such files
        with pytest.raises(DeitfastError, match="not every loader reads it"):
            list(open_eval(name, reader, PADDED).epoch(0))
        return
    (batch,) = open_eval(name, reader, PADDED).epoch(0)
    assert batch.valid[:2].all()
    assert torch.equal(batch.images[0], batch.images[1])


@pytest.mark.parametrize("name", LOADERS)
def test_each_view_comes_once_and_images_as_often_as_asked(name: str, small: Reader) -> None:
    loader = open_train(name, small, PADDED)
    tables = [batch.params.table[:, :2] for epoch in range(2) for batch in loader.epoch(epoch)]
    views = np.concatenate(tables)
    assert len(np.unique(views, axis=0)) == len(views)
    _, counts = np.unique(views[: len(views) // 2, 0], return_counts=True)
    assert counts.max() == PADDED.repeats


@pytest.mark.parametrize("name", LOADERS)
def test_pixels_are_the_references(name: str, photos: Reader, small: Reader) -> None:
    for reader, spec in both(name, photos, small):
        for make in (open_train, open_eval):
            batches = list(make(name, reader, spec).epoch(0))
            others = list(make("reference", reader, spec).epoch(0))
            for one, other in zip(batches, others, strict=True):
                np.testing.assert_array_equal(one.params.table, other.params.table)
            assert difference(batches, others).float().mean() <= MEAN_BOUND[name]


@pytest.mark.parametrize("name", [p for p in LOADERS if p.values[0] != "reference"])
def test_padded_crops_of_raw_images_are_copies(name: str, small: Reader) -> None:
    raw = np.flatnonzero(small.modes == 1)
    batch = next(iter(open_train(name, small, PADDED).epoch(0)))
    seen = 0
    for row, sample in enumerate(batch.params.sample):
        if sample in raw:
            image = np.pad(small.sample(sample).reshape(32, 32, 3), ((4, 4), (4, 4), (0, 0)))
            top, left = batch.params.offset[row] + 4
            np.testing.assert_array_equal(batch.images[row], image[top : top + SIZE, left : left + SIZE])
            seen += 1
    assert seen


def test_reference_is_pillow(photos: Reader) -> None:
    """The oracle itself, against the recipe spelled out: crop, bicubic resize (width first), nothing else."""
    for batch in open_train("reference", photos, RESIZED).epoch(0):
        for row, sample in enumerate(batch.params.sample):
            top, left, height, width = batch.params.crop_box[row].tolist()
            if photos.modes[sample] == 1:
                size = (int(photos.heights[sample]), int(photos.widths[sample]), 3)
                image = Image.fromarray(photos.sample(sample).reshape(size))
            else:
                image = Image.open(io.BytesIO(photos.sample(sample).tobytes()))
            assert image.size == (photos.widths[sample], photos.heights[sample])
            crop = image.crop((left, top, left + width, top + height))
            wide = crop.resize((SIZE, height), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(batch.images[row], wide.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("name", LOADERS)
def test_evaluation_shows_everything_once_and_masks_the_rest(name: str, small: Reader) -> None:
    for world in (1, 2):
        seen = []
        for rank in range(world):
            for batch in open_eval(name, small, RESIZED, rank, world).epoch(0):
                assert len(batch.images) == BATCH
                assert not batch.images[~batch.valid].any()
                assert batch.labels.min() >= 100
                seen += batch.params.sample[batch.valid.numpy()].tolist()
        assert sorted(seen) == list(range(small.num_samples))


@pytest.mark.parametrize("name", LOADERS)
def test_ranks_share_an_epoch(name: str, small: Reader) -> None:
    shards = []
    for rank in range(2):
        batches = open_train(name, small, PADDED, rank, 2).epoch(0)
        shards.append({tuple(view) for batch in batches for view in batch.params.table[:, :2].tolist()})
    whole = TrainSampler(
        SamplerSpec(
            samples=small.num_samples, batch=2 * BATCH, seed=PADDED.seed, repeats=PADDED.repeats, group=PADDED.mix_group
        )
    )
    rows = [whole.rows(0, step) for step in range(whole.steps_per_epoch)]
    expected = {pair for row in rows for pair in zip(row.samples.tolist(), row.views.tolist(), strict=True)}
    assert not shards[0] & shards[1]
    assert shards[0] | shards[1] == expected


@pytest.mark.parametrize("name", LOADERS)
def test_a_batch_depends_on_epoch_and_step_alone(name: str, photos: Reader, small: Reader) -> None:
    reader, spec = both(name, photos, small)[0]
    loader = open_train(name, reader, spec)
    whole = list(loader.epoch(1))
    assert_equal(list(loader.epoch(1)), whole)
    assert_equal(list(loader.epoch(1, start_step=1)), whole[1:])
    assert_equal(list(open_train(name, reader, spec, workers=1, prefetch=5, check=False).epoch(1)), whole)
    assert list(loader.epoch(1, start_step=loader.steps_per_epoch)) == []
    other = list(loader.epoch(2))
    assert not np.array_equal(other[0].params.table, whole[0].params.table)


@pytest.mark.parametrize("name", LOADERS)
def test_a_batch_stays_while_it_is_held(name: str, small: Reader) -> None:
    sampler = EvalSampler(small.num_samples, 2)
    spec = LoaderSpec(name=name, workers=2, prefetch=1)
    loader = open_loader(small, PADDED, spec, sampler, train=False, device=CPU)
    assert loader.steps_per_epoch == 15  # more than any loader has buffers
    held, copies = [], []
    for batch in loader.epoch(0):
        held.append(batch.images)
        copies.append(batch.images.clone())
    assert all(torch.equal(one, other) for one, other in zip(held, copies, strict=True))


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("how", ["break", "close", "raise"])
def test_breaking_off_leaves_no_thread(name: str, how: str, small: Reader) -> None:
    loader = open_train(name, small, PADDED, prefetch=1)
    before = threading.active_count()
    batches = loader.epoch(0)
    first = next(batches)
    time.sleep(0.05)  # let it fill its queues
    assert threading.active_count() > before
    if how == "raise":
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)
    elif how == "close":
        batches.close()
    else:
        del batches
    assert threading.active_count() == before
    assert torch.equal(next(iter(loader.epoch(0))).images, first.images)


@pytest.mark.skipif(bool(REASONS["ffcv"]), reason=REASONS["ffcv"] or "works here")
@pytest.mark.parametrize("name", ["ffcv"])
def test_ffcv_leaves_torchs_threads_alone(name: str, small: Reader) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        list(open_train(name, small, PADDED, workers=1).epoch(0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(bool(REASONS["ffcv"]), reason=REASONS["ffcv"] or "works here")
def test_ffcv_refuses_shards(tmp_path: Path) -> None:
    image = photo(np.random.default_rng(0), 32, 32)
    reader = write_split(tmp_path / "train.wds", [(image, None)] * 4)
    with pytest.raises(UserError, match=r"one \.beton file(.|\n)*--loader cpu(.|\n)*deitfast convert dataset"):
        open_eval("ffcv", reader, PADDED)


def test_a_resident_batch_asks_the_device_nothing(small: Reader) -> None:
    """On the meta device there are no values: whatever would wait for one fails."""
    images = torch.empty(29, 32, 32, 3, dtype=torch.uint8, device="meta")
    for spec in (PADDED, RESIZED):
        rows, params = open_train("resident", small, spec).plan.draw(0, 0)
        assert gather(images, rows, Geometry.of(params), SIZE).shape == (BATCH, SIZE, SIZE, 3)


def test_resident_refuses_images_of_several_sizes(photos: Reader) -> None:
    with pytest.raises(UserError, match=r"images of one size(.|\n)*--loader cpu"):
        open_train("resident", photos, RESIZED)


def test_a_closed_resident_loader_holds_nothing(small: Reader) -> None:
    loader = open_train("resident", small, PADDED)
    loader.close()
    loader.close()
    assert loader.images.untyped_storage().nbytes() == 0  # pyright: ignore


def test_auto_is_resident_for_small_images_that_fit(
    photos: Reader, small: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(small, CPU) == "resident"
    assert open_train("auto", small, PADDED).name == "resident"
    assert choose(photos, CPU) == ("reference" if REASONS["cpu"] else "cpu")
    monkeypatch.setattr(factory, "free_memory", lambda device: 4 * small.num_samples * 32 * 32 * 3 - 1)
    assert choose(small, CPU) != "resident"
    monkeypatch.setitem(factory.NEEDS, "cpu", ("no_such_package", ""))
    monkeypatch.setattr(turbo, "unavailable", lambda: "there is no C compiler")
    assert choose(small, CPU) == "reference"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_says_in_one_line_what_a_slower_loader_takes_the_place_of(
    photos: Reader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str
) -> None:
    factory._warn_once.cache_clear()
    for _ in range(2):  # a run opens two splits
        open_train("auto", photos, PADDED)
    assert caplog.text.count("loader auto") == bool(REASONS["cpu"])
    for name in ("cpu", "dali"):
        monkeypatch.setitem(factory.NEEDS, name, (f"no_{name}", ""))
    monkeypatch.setattr(turbo, "unavailable", lambda: "there is no C compiler")
    said = factory.slower_for_want_of("reference", torch.device(device))
    assert "there is no C compiler, and no_cpu is not installed; apt install gcc, or pip install" in said
    assert ("dali (no_dali is not installed; pip install" in said) == (device == "cuda")
    assert not factory.slower_for_want_of("dali", torch.device(device))
    for _ in range(2):
        assert open_train("auto", photos, PADDED).name == "reference"
    assert caplog.text.count("loader auto: reference reads the images, more slowly than cpu") == 1


def test_a_loader_that_does_not_work_says_why(small: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(factory.NEEDS, "ffcv", ("no_such_package", ""))
    assert available()["ffcv"] == "no_such_package is not installed"
    assert available()["reference"] == ""
    with pytest.raises(UserError, match="no_such_package is not installed"):
        open_train("ffcv", small, PADDED)
