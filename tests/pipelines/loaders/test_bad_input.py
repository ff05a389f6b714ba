"""Images that cannot be read, memory that runs out, and workers that fall over: in every loader, and in training."""

import logging
import pkgutil
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deitfast.config.recipe import override
from deitfast.run_folder import RunFolder
from deitfast.train.step import TrainStep
from pipelines.batch import Batch
from pipelines.device import explain_oom
from pipelines.errors import DeitfastError
from pipelines.loaders import prefetch
from pipelines.storage.dataset import Dataset
from pipelines.storage.reader import Reader
from tests.helpers.loader_contract import LOADERS, PADDED, damaged, open_eval, open_train, within, write_small
from tests.helpers.small_runs import run, tiny_recipe
from tests.helpers.stored_images import jpeg, photo, write_split

pytestmark = pytest.mark.usefixtures("nothing_leaks")
BAD = 17


@pytest.fixture
def suffix(request: pytest.FixtureRequest) -> str:
    """The format of the damaged data sets, where a test does not ask for another."""
    return getattr(request, "param", ".beton")


@pytest.fixture
def hurt(tmp_path: Path, suffix: str) -> Reader:
    """29 images with one bit of one flipped."""
    return damaged(write_small(tmp_path / f"small{suffix}"), tmp_path, BAD)


@pytest.fixture
def garbage(tmp_path: Path, suffix: str) -> Reader:
    """Four JPEGs of which sample 2 is none, whatever its CRC32 says."""
    image = photo(np.random.default_rng(0), 32, 32)
    images: list[tuple[Image.Image, bytes | None]] = [(image, jpeg(image)) for _ in range(4)]
    images[2] = (image, b"no JPEG, whatever its CRC32 says")
    return write_split(tmp_path / f"none{suffix}", images)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("suffix", [".beton", ".wds"], indirect=True)
def test_a_damaged_sample_is_named(name: str, hurt: Reader) -> None:
    error = within(60, lambda: list(open_eval(name, hurt, PADDED).epoch(0)))
    assert isinstance(error, DeitfastError)
    assert f"sample {BAD}" in str(error)
    assert str(hurt.location(BAD).file) in str(error)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("suffix", [".beton", ".wds"], indirect=True)
def test_a_jpeg_that_is_none_is_named(name: str, garbage: Reader) -> None:
    error = within(60, lambda: list(open_eval(name, garbage, PADDED).epoch(0)))
    assert isinstance(error, DeitfastError)
    assert "sample 2 " in str(error)


def everything(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """Images, valid, samples and partners of batches; partners as rows of the whole."""
    starts = np.cumsum([0, *(len(batch.valid) for batch in batches[:-1])])
    partners = [start + batch.params.mix_index for start, batch in zip(starts, batches, strict=True)]
    images, valid = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "valid"))
    return images, valid, np.concatenate([batch.params.sample for batch in batches]), np.concatenate(partners)


@pytest.mark.parametrize("name", LOADERS)
def test_a_skipped_sample_is_black_and_neither_it_nor_its_partner_counts(
    name: str, small: Reader, hurt: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loader = open_train(name, hurt, PADDED, skip_bad=True)
        batches = [batch for epoch in range(4) for batch in loader.epoch(epoch)]
    images, valid, samples, partners = everything(batches)
    gone = samples == BAD
    assert gone.sum() == sum(batch.skipped for batch in batches) == 2 * PADDED.repeats  # in two passes of two epochs
    assert not images[gone].any()
    np.testing.assert_array_equal(~valid.numpy(), gone | gone[partners])
    untouched = open_train(name, small, PADDED)
    whole = everything([batch for epoch in range(4) for batch in untouched.epoch(epoch)])
    assert torch.equal(images[~gone], whole[0][~gone])
    assert [f"sample {BAD}" in record.message for record in caplog.records if record.levelname == "WARNING"] == [True]


@pytest.mark.parametrize("name", LOADERS)
def test_evaluation_leaves_a_skipped_sample_out(name: str, hurt: Reader) -> None:
    _, valid, samples, _ = everything(list(open_eval(name, hurt, PADDED, skip_bad=True).epoch(0)))
    assert sorted(samples[valid]) == [number for number in range(hurt.num_samples) if number != BAD]


@pytest.mark.parametrize("name", LOADERS)
def test_what_only_the_decoder_refuses_is_skipped_too(name: str, garbage: Reader) -> None:
    images, valid, samples, _ = everything(list(open_eval(name, garbage, PADDED, skip_bad=True).epoch(0)))
    assert sorted(samples[valid]) == [0, 1, 3]
    assert not images[~valid].any()


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("suffix", [".beton", ".wds"], indirect=True)
def test_a_file_that_is_cut_while_it_is_in_use_is_named(name: str, tmp_path: Path, small: Reader, suffix: str) -> None:
    """A mapped file would end the process: SIGBUS, without a word. The resident loader has read everything before."""
    reader = damaged(small, tmp_path, BAD)  # a copy that may be changed
    loader = open_eval(name, reader, PADDED, check=False)
    file = reader.location(reader.num_samples - 1).file
    with file.open("r+b") as cut:
        cut.truncate(5000)
    error = within(60, lambda: list(loader.epoch(0)))
    if name == "resident":
        assert error is None
    else:
        assert isinstance(error, DeitfastError)
        assert f"{file}: was cut while it was being read" in str(error)


class PlantedError(Exception):
    """Raised inside a worker by a test."""


def plant(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    """Let a function raise at its second call."""
    calls: list[None] = []
    original: Callable = getattr(owner, name)

    def raising(*arguments: object, **more: object) -> object:
        calls.append(None)
        if len(calls) >= 2:
            raise PlantedError
        return original(*arguments, **more)

    monkeypatch.setattr(owner, name, raising)


WORKERS = {
    "cpu": ("pipelines.loaders.codecs.turbo.TurboCodec", "render"),
    "dali": ("pipelines.loaders.dali.source.EncodedImages", "fetch"),
    "ffcv": ("pipelines.loaders.ffcv", "tabulate"),
    "reference": ("pipelines.loaders.codecs.pillow.PillowCodec", "decode"),
    "resident": ("pipelines.loaders.resident", "gather"),
}
"""For each loader, something that it calls in a thread of its own for every batch."""


@pytest.mark.parametrize("name", LOADERS)
def test_an_exception_in_a_worker_ends_the_run_and_is_the_one_raised(
    name: str, photos: Reader, small: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, function = WORKERS[name]
    reader = small if name == "resident" else photos
    plant(monkeypatch, pkgutil.resolve_name(owner), function)
    assert isinstance(within(20, lambda: list(open_train(name, reader, PADDED).epoch(0))), PlantedError)


def test_training_counts_what_it_skips(tiny_small: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_small, data)
    reader = Dataset.open(data).split("train")
    with reader.path.open("r+b") as file:
        file.seek(int(reader.offsets[3]))
        file.write(b"\0\1\2\3")
    recipe = tiny_recipe("augment.repeats=1", "train.epochs=1", "train.ema=0", "train.batch=80")
    with pytest.raises(DeitfastError, match="sample 3 is damaged"):
        run(data, tmp_path / "run", recipe)
    run(data, tmp_path / "skipping", override(recipe, {"loader.skip_bad": True}))
    folder = RunFolder(tmp_path / "skipping")
    assert [row["skipped"] for row in folder.metrics()] == [1]
    assert folder.log.read_text().count("sample 3 is damaged") == 1
    assert "1 damaged skipped" in folder.log.read_text()


def out_of_memory(*arguments: object, **more: object) -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_running_out_of_memory_in_the_step_says_so(
    tiny_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainStep, "step", out_of_memory)
    with pytest.raises(
        DeitfastError, match=r"out of GPU memory for the training step(.|\n)*20.00 GiB(.|\n)*train.batch"
    ):
        run(tiny_small, tmp_path / "run", tiny_recipe())


def test_running_out_of_memory_in_a_loader_says_so(small: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "to_device", out_of_memory)
    with pytest.raises(DeitfastError, match=r"out of GPU memory for the batches(.|\n)*loader.prefetch"):
        list(open_train("reference", small, PADDED).epoch(0))


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), explain_oom("a buffer", "nothing"):
        raise RuntimeError("shape mismatch")
