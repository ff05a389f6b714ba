"""Mutated JPEGs: what conversion stores, every loader's decoder reads, as Pillow does within the loader's bound."""

import io
import warnings
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipelines.loaders.codecs.nvimgcodec import RegionCodec
from pipelines.storage.decoders import MEAN_DIFFERENCE
from pipelines.storage.image_kinds import Kind
from pipelines.storage.reader import JPEG
from pipelines.storage.transcode import BadImageError, EncodedImage, EncodeOptions, stored_size, transcode
from tests.helpers.sample_images import drawn

BATCH = 64
INSERTED = [b"\xff", b"\xff\xd9", b"\xff\xd0", b"\xff\xfe\0\4ab", b"\xff\xc4", b"\xff\xdb", b"\xff\x00", b"\0\0"]


def originals() -> list[bytes]:
    """JPEGs of every subsampling, progressive, with restart markers, EXIF, comments, several thumbnails of quality."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    choices = [
        {"subsampling": "4:4:4", "quality": 95},
        {"subsampling": "4:2:2", "quality": 85},
        {"subsampling": "4:2:0", "quality": 75},
        {"subsampling": "4:2:0", "quality": 60, "progressive": True},
        {"subsampling": "4:4:4", "quality": 90, "progressive": True},
        {"subsampling": "4:2:0", "quality": 90, "restart_marker_blocks": 4},
        {"subsampling": "4:4:4", "quality": 30, "optimize": True},
        {"quality": 90, "exif": exif, "comment": b"a comment"},
    ]
    files = []
    for number, options in enumerate(choices):
        height, width = rng.integers(40, 120, 2)
        buffer = io.BytesIO()
        Image.fromarray(drawn(int(height), int(width), number)).save(buffer, "JPEG", **options)
        files.append(buffer.getvalue())
    return files


def mutated(rng: np.random.Generator, original: bytes) -> bytes:
    """Return a JPEG with one to three changes of one kind, most of them before the compressed data."""
    data, kind = bytearray(original), int(rng.integers(9))
    head = data.find(b"\xff\xda") + 14
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(2, head if rng.random() < 0.6 else len(data)))
        at, length = min(at, len(data) - 1), int(rng.integers(1, 5))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.integers(256))
        elif kind == 2:
            data[at:at] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = bytes(length)
        elif kind == 5:
            other = int(rng.integers(2, len(data)))
            data[at : at + 10 * length] = data[other : other + 10 * length]
        elif kind == 6:
            data += rng.integers(0, 256, 10 * length, dtype=np.uint8).tobytes()
        elif kind == 7:
            data[at:at] = INSERTED[int(rng.integers(len(INSERTED)))]
        else:
            start = data.find(b"\xff" + bytes([int(rng.choice([0xDB, 0xC4, 0xC0, 0xE0]))]))
            size = 2 + int.from_bytes(data[start + 2 : start + 4], "big")
            data[at:at] = data[max(start, 0) : max(start, 0) + size]
    return bytes(data)


def pillow_pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return np.asarray(image.convert("RGB"))


def dali_pixels(files: list[bytes]) -> list[np.ndarray]:
    """Decode as the dali loader does without a GPU."""
    dali = pytest.importorskip("nvidia.dali")
    pipe = dali.Pipeline(batch_size=len(files), num_threads=2, device_id=None)
    with pipe:
        encoded = dali.fn.external_source(lambda: [np.frombuffer(file, np.uint8) for file in files], batch=True)
        pipe.set_outputs(dali.fn.decoders.image(encoded, device="cpu", adjust_orientation=False))
    (output,) = pipe.run()
    return [np.asarray(output.at(number)) for number in range(len(files))]


def ffcv_pixels(data: bytes) -> np.ndarray | None:
    """Decode as the ffcv loader does; None where it refuses, and zeros where FFCV is not installed."""
    imdecode = pytest.importorskip("ffcv.libffcv").imdecode
    height, width = pillow_pixels(data).shape[:2]
    out = np.zeros((height, width, 3), np.uint8)
    failed = imdecode(np.frombuffer(data, np.uint8), out, height, width, height, width, 0, 0, 1, 1, False, False)
    return None if failed else out


def stored(data: bytes, tally: Counter) -> EncodedImage | None:
    """Convert and count; None where it is refused."""
    try:
        image = transcode(data, "x.jpg", EncodeOptions())
    except BadImageError:
        tally["refused"] += 1
        return None
    tally["disputed" if image.kind & Kind.DISPUTED else "passed" if image.kind & Kind.PASSED else "re-encoded"] += 1
    return image


def check(images: list[EncodedImage], region: RegionCodec) -> None:
    """Compare every decoder's pixels with Pillow's."""
    by_dali = dali_pixels([image.data for image in images])
    for image, dali in zip(images, by_dali, strict=True):
        reference = pillow_pixels(image.data)
        assert reference.shape == (image.height, image.width, 3)
        assert stored_size(image.data) == (image.height, image.width)
        cpu = region.decode(np.frombuffer(image.data, np.uint8), 0, 0, image.height, image.width)
        assert np.array_equal(cpu, reference)
        assert dali.shape == reference.shape
        assert np.abs(dali.astype(int) - reference).mean() < 1
        ffcv = ffcv_pixels(image.data)
        assert ffcv is not None
        assert np.abs(ffcv.astype(int) - reference).mean() <= MEAN_DIFFERENCE


@pytest.mark.slow
def test_no_loader_refuses_or_misreads_what_conversion_stores(request: pytest.FixtureRequest) -> None:
    cases = request.config.getoption("--cases", default=0) or 10_000
    tally: Counter[str] = Counter()
    rng, files, region = np.random.default_rng(cases), originals(), RegionCodec()
    pending: list[EncodedImage] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd but readable files
        for _ in range(cases):
            image = stored(mutated(rng, files[int(rng.integers(len(files)))]), tally)
            if image is not None and image.mode == JPEG:
                pending.append(image)
            if len(pending) == BATCH:
                check(pending, region)
                pending = []
        if pending:
            check(pending, region)
    print(dict(tally))  # noqa: T201
    assert all(tally[outcome] for outcome in ("refused", "disputed", "passed"))
