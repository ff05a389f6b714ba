"""The compiled codec: Pillow's pixels to the bit, and what happens where it cannot be compiled."""

import logging
import os
import platform
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import DeitfastError
from pipelines.loaders import factory
from pipelines.loaders.codecs import turbo
from pipelines.loaders.codecs.pillow import PillowCodec
from pipelines.storage.reader import Reader
from tests.helpers.loader_contract import PADDED, RESIZED, open_eval, open_train
from tests.helpers.stored_images import jpeg, photo

if turbo.unavailable():
    pytest.skip(turbo.unavailable(), allow_module_level=True)


@pytest.fixture(params=["", "x86-64-v3", "x86-64"])
def codec(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> turbo.TurboCodec:
    """The codec as it is compiled here, for any processor with AVX2, and from its plain loops."""
    if request.param:
        if (request.param == "x86-64-v3" and b" avx2 " not in turbo._processor()) or platform.machine() != "x86_64":
            pytest.skip(f"this processor does not run {request.param}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(turbo, "FLAGS", (*turbo.FLAGS, f"-march={request.param}"))
        monkeypatch.setattr(turbo, "library", turbo.library.__wrapped__)
    return turbo.TurboCodec()


def test_windows_and_sizes_are_pillows(codec: turbo.TurboCodec) -> None:
    rng, pillow = np.random.default_rng(0), PillowCodec()
    for number in range(90):
        height, width = (int(side) for side in rng.integers(1, 120, 2))
        image = photo(rng, height, width)
        image = image.convert("L") if number % 8 == 0 else image
        data = np.frombuffer(jpeg(image, subsampling=number % 3, progressive=number % 5 == 0), np.uint8)
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        window = (int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w)
        pixels = codec.decode(data, *window)
        np.testing.assert_array_equal(pixels, pillow.decode(data, *window))
        ours, theirs = np.empty((2, *(int(side) for side in rng.integers(1, 150, 2)), 3), np.uint8)
        codec.resize(pixels, ours)
        pillow.resize(pixels, theirs)
        np.testing.assert_array_equal(ours, theirs)


def test_any_scale_is_pillows(codec: turbo.TurboCodec) -> None:
    rng, pillow = np.random.default_rng(2), PillowCodec()
    for rows, columns, height, width in ((1, 1, 37, 41), (2, 3, 224, 5), (700, 900, 31, 224), (90, 2100, 224, 30)):
        pixels = rng.integers(0, 2, (rows, columns, 3)).astype(np.uint8) * 255  # overshoots at every edge
        ours, theirs = np.empty((2, height, width, 3), np.uint8)
        codec.resize(pixels, ours)
        pillow.resize(pixels, theirs)
        np.testing.assert_array_equal(ours, theirs)


def test_a_file_is_decoded_with_its_own_tables_alone() -> None:
    codec, image = turbo.TurboCodec(), photo(np.random.default_rng(3), 40, 50)
    whole, window = jpeg(image), (0, 0, 40, 50)
    expected = PillowCodec().decode(np.frombuffer(whole, np.uint8), *window)
    start = whole.index(b"\xff\xdb")
    without = whole[:start] + whole[start + 2 + int.from_bytes(whole[start + 2 : start + 4], "big") :]
    for _ in range(200):  # more images than the memory of one image's tables would hold
        np.testing.assert_array_equal(codec.decode(np.frombuffer(whole, np.uint8), *window), expected)
    with pytest.raises((OSError, ValueError)):
        codec.decode(np.frombuffer(without, np.uint8), *window)


def test_what_libjpeg_does_not_turn_into_rgb_is_pillows_to_decode() -> None:
    image = photo(np.random.default_rng(1), 40, 50).convert("CMYK")
    data, window = np.frombuffer(jpeg(image), np.uint8), (3, 4, 20, 30)
    np.testing.assert_array_equal(turbo.TurboCodec().decode(data, *window), PillowCodec().decode(data, *window))


@pytest.mark.parametrize("spec", [RESIZED, PADDED])
def test_batches_are_those_of_the_reference(photos: Reader, spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turbo.TurboCodec, "decode", None)  # every image is rendered in the one call of its chunk
    if photos.path.suffix == ".wds":
        pytest.skip("its PNGs are decoded by Pillow")
    for opened in (open_train, open_eval):
        pairs = zip(*(opened(name, photos, spec).epoch(0) for name in ("cpu", "reference")), strict=True)
        assert all((one.images == other.images).all() for one, other in pairs)


def test_without_a_compiler_nvimagecodec_decodes(
    photos: Reader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("nvidia.nvimgcodec")
    monkeypatch.setattr(turbo, "unavailable", lambda: "there is no C compiler")
    assert not factory.exact("cpu")
    with caplog.at_level(logging.INFO):
        assert sum(batch.valid.sum() for batch in open_eval("cpu", photos, RESIZED).epoch(0)) == photos.num_samples
    assert "nvImageCodec, as the faster codec cannot be used: there is no C compiler" in caplog.text


def test_why_it_cannot_be_compiled_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(turbo, "FLAGS", ("-no-such-flag",))
    with pytest.raises(OSError, match="no-such-flag"):
        turbo.library.__wrapped__()
    assert os.listdir(tmp_path / "deitfast") == []
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(OSError, match="no C compiler"):
        turbo.library.__wrapped__()


def test_a_damaged_image_is_named_as_by_the_reference(photos: Reader, tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    cut = np.frombuffer(jpeg(image)[:-30], np.uint8)
    with pytest.raises((OSError, ValueError, DeitfastError)):
        turbo.TurboCodec().decode(cut, 0, 0, 8, 8)
