"""The dataset file: what the reader gives, what it refuses, and that FFCV reads it."""

import importlib.util
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import DeitfastError, UserError
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.dataset import Dataset, content_fingerprint
from pipelines.storage.formats.beton import HEADER, PREAMBLE, SAMPLE, BetonReader
from pipelines.storage.formats.beton_writer import RECORD, BetonWriter
from pipelines.storage.image_kinds import Kind
from pipelines.storage.reader import JPEG, RAW
from pipelines.storage.sources.factory import open_source
from pipelines.storage.transcode import EncodedImage
from pipelines.storage.verify import verify
from tests.helpers.command_line import call
from tests.helpers.sample_images import MemorySource, drawn, entries, jpeg, pixels


def write(path: Path, images: list[np.ndarray], planned: int = 0) -> None:
    """Write pixels as raw samples with label 7."""
    writer = BetonWriter(path, planned or len(images), 0, np.zeros(0, RECORD))
    records = []
    for image in images:
        data = image.tobytes()
        height, width = image.shape[:2]
        offset = writer.append(EncodedImage(RAW, width, height, data, zlib.crc32(data), Kind.RAW), 7)
        records.append((True, RAW, 4, width, height, 7, zlib.crc32(data), len(data), offset))
    writer.finish(np.array(records, dtype=RECORD))
    writer.close()


def flat(height: int, width: int, value: int = 1) -> np.ndarray:
    return np.full((height, width, 3), value % 256, dtype=np.uint8)


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    path = tmp_path / "x.beton"
    write(path, [flat(1, n + 1, n) for n in range(9)])
    return path


SIDE = st.one_of(st.integers(1, 40), st.integers(600, 830))


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=7), spare=st.integers(0, 200_000))
def test_written_samples_read_back(tmp_path_factory, sizes, spare):
    path = tmp_path_factory.mktemp("b") / "x.beton"
    images = [flat(height, width, number) for number, (height, width) in enumerate(sizes)]
    write(path, images, planned=len(images) + spare)
    reader = BetonReader(path)
    assert list(zip(reader.heights, reader.widths, strict=True)) == sizes
    assert [reader.read_verified(n).tobytes() for n in range(len(images))] == [image.tobytes() for image in images]
    assert (reader.offsets // reader.page_size == (reader.offsets + reader.sizes - 1) // reader.page_size).all()
    assert reader.labels.tolist() == [7] * len(images)
    assert (reader.file_size - 24 * len(images)) % reader.page_size == 0  # FFCV reads whole pages
    reader.close()


def test_large_samples_double_the_page(tmp_path):
    images = [flat(1, 5), flat(1000, 1200, 2), flat(1, 6), flat(2000, 1000, 3), flat(700, 700)]
    write(tmp_path / "x.beton", images)
    reader = BetonReader(tmp_path / "x.beton")
    assert reader.page_size == 1 << 23
    assert [reader.read_verified(n).tobytes() for n in range(5)] == [image.tobytes() for image in images]


def test_reading_copies_nothing_and_cannot_write(beton):
    reader = BetonReader(beton)
    first = reader.sample(3)
    assert np.shares_memory(first, reader.sample(3))
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1
    reader.close()
    assert first.tobytes() == bytes([3]) * 12  # views outlive the reader
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.sample(3)


def test_a_flipped_byte_is_found_by_its_sample_only(beton):
    offset = int(BetonReader(beton).offsets[4])
    content = bytearray(beton.read_bytes())
    content[offset] ^= 1
    beton.write_bytes(content)
    reader = BetonReader(beton)
    reader.read_verified(3)
    with pytest.raises(DeitfastError, match=r"x\.beton: sample 4 is damaged"):
        reader.read_verified(4)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_index_byte_is_refused_or_changes_the_index_crc(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("b") / "x.beton"
    write(path, [flat(1, n + 1, n) for n in range(5)])
    whole, content = BetonReader(path), bytearray(path.read_bytes())
    table = len(content) - 5 * 24
    places = [*range(HEADER.itemsize), *range(PREAMBLE, PREAMBLE + 5 * SAMPLE.itemsize), *range(table, len(content))]
    content[data.draw(st.sampled_from(places))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        crc = BetonReader(path).index_crc32
    except DeitfastError as failure:
        crc = str(failure) if "x.beton" in str(failure) else whole.index_crc32
    assert crc != whole.index_crc32


@pytest.mark.parametrize("size", [0, 1, 20, PREAMBLE - 1, PREAMBLE, -1, -24, -3000])
def test_cut_files_are_refused(beton, size):
    content = beton.read_bytes()
    beton.write_bytes(content[:size])
    with pytest.raises(DeitfastError, match=r"not a whole|empty"):
        BetonReader(beton)


def test_overlong_garbage_and_missing_files_are_refused(beton):
    with beton.open("ab") as file:
        file.write(bytes(24))
    with pytest.raises(DeitfastError, match="not a whole"):
        BetonReader(beton)
    for seed in range(20):
        beton.write_bytes(np.random.default_rng(seed).bytes(5000))
        with pytest.raises(DeitfastError, match="version"):
            BetonReader(beton)
    beton.unlink()
    with pytest.raises(DeitfastError, match="no such file"):
        BetonReader(beton)


def test_samples_outside_the_file_are_refused(beton):
    content = bytearray(beton.read_bytes())
    content[-8:] = (2**63).to_bytes(8, "little")
    beton.write_bytes(content)
    with pytest.raises(DeitfastError, match="inside the file"):
        BetonReader(beton)


def test_overlapping_samples_are_refused(beton):
    first, content = int(BetonReader(beton).offsets[0]), bytearray(beton.read_bytes())
    same = first.to_bytes(8, "little")
    content[PREAMBLE + SAMPLE.itemsize + 5 : PREAMBLE + SAMPLE.itemsize + 13] = same
    place = len(content) - 8 * 24 + 8
    content[place : place + 8] = same
    beton.write_bytes(content)
    with pytest.raises(DeitfastError, match="sample 1 overlaps"):
        BetonReader(beton)


def test_dataset_opens_and_names_its_splits(tiny_dataset):
    dataset = Dataset.open(tiny_dataset)
    train = dataset.split("train")
    assert dataset.split("train") is train
    assert train.num_samples == dataset.spec.splits["train"].samples == 32
    assert tuple(np.bincount(train.labels)) == dataset.spec.splits["train"].counts
    assert set(train.modes) == {JPEG}
    with pytest.raises(UserError, match=r"no split 'test'\n.*train, val"):
        dataset.split("test")
    dataset.close()


def damaged_json(folder: Path, change) -> None:
    path = folder / "dataset.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: d.update(format=99), UserError, "format 99"),
        (lambda d: d.pop("format"), UserError, "no format"),
        (lambda d: d.update(color="red"), DeitfastError, "color"),
        (lambda d: d["splits"]["train"].update(color="red"), DeitfastError, r"splits\.train\.color"),
        (lambda d: d["splits"]["train"].update(samples=31), DeitfastError, "31 samples"),
        (lambda d: d["classes"].reverse(), DeitfastError, "fingerprint"),
        (lambda d: d["splits"]["train"].update(file="../x"), DeitfastError, "name of a file"),
    ],
)
def test_a_wrong_dataset_json_is_refused(tiny_dataset, tmp_path, change, error, message):
    shutil.copy(tiny_dataset / "dataset.json", tmp_path)
    damaged_json(tmp_path, change)
    with pytest.raises(error, match=message) as raised:
        Dataset.open(tmp_path)
    assert type(raised.value) is error


@pytest.mark.parametrize("left", [("train.beton", "val.beton"), ("train.beton",)])
def test_a_data_set_that_lost_its_description_is_no_data_set_of_ffcvs(tiny_small, tmp_path, left):
    for name in left:
        shutil.copy(tiny_small / name, tmp_path / name)
    with pytest.raises(UserError, match=r"lacks its dataset\.json"):
        Dataset.open(tmp_path)


def test_a_fingerprint_follows_everything_that_is_known_of_a_sample():
    known = {"labels": [0, 1], "heights": [5, 6], "widths": [7, 8], "modes": [JPEG, RAW], "crcs": [9, 10]}
    columns = {name: np.array(values) for name, values in known.items()}
    found = [content_fingerprint(SimpleNamespace(num_samples=2, **columns))]  # pyright: ignore
    for name, values in columns.items():
        found.append(content_fingerprint(SimpleNamespace(num_samples=2, **{**columns, name: values[::-1]})))  # pyright: ignore
    assert len(set(found)) == 6


def test_folders_without_a_dataset_are_mistakes(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Dataset.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a converted dataset"):
        Dataset.open(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format": 1')
    with pytest.raises(DeitfastError, match="JSON"):
        Dataset.open(tmp_path)


def test_a_split_file_that_was_swapped_or_cut_is_refused(tiny_dataset, tmp_path):
    folder = shutil.copytree(tiny_dataset, tmp_path / "copy")
    train, val = folder / "train.beton", folder / "val.beton"
    content = bytearray(train.read_bytes())
    content[PREAMBLE + 16] ^= 1  # the first label
    train.write_bytes(content)
    with pytest.raises(DeitfastError, match="index is damaged"):
        Dataset.open(folder).split("train")
    val.write_bytes(val.read_bytes()[:-24])
    with pytest.raises(DeitfastError, match="bytes"):
        Dataset.open(folder).split("val")
    val.unlink()
    with pytest.raises(DeitfastError, match="no such file"):
        Dataset.open(folder).split("val")


def test_verify_finds_nothing_in_a_whole_dataset(tiny_dataset):
    seen = []
    report = verify(tiny_dataset, workers=2, progress=lambda *step: seen.append(step))
    assert report.intact
    assert report.samples == {"train": 32, "val": 8}
    assert seen[-1][:3] == ("val", 8, 8)


def test_verify_collects_all_damage(tiny_dataset, tmp_path):
    folder = shutil.copytree(tiny_dataset, tmp_path / "copy")
    reader = Dataset.open(folder).split("train")
    content = bytearray((folder / "train.beton").read_bytes())
    for number in (2, 17):
        content[int(reader.offsets[number]) + 5] ^= 255
    content[PREAMBLE + 5 * SAMPLE.itemsize + 1] ^= 1  # sample 5's width
    (folder / "train.beton").write_bytes(content)
    (folder / "val.beton").write_bytes(b"")
    report = verify(folder, workers=2)
    assert not report.intact
    samples = {(damage.sample, damage.label) for damage in report.damages if damage.split == "train"}
    assert {(2, "cat"), (17, "bee"), (5, "bee")} <= samples
    assert any("CRC32 of the index" in damage.reason for damage in report.damages)
    assert any("pixels, decoded" in damage.reason for damage in report.damages)
    assert any(damage.split == "val" and "val.beton: empty" in damage.reason for damage in report.damages)
    (folder / "train.beton").write_bytes(b"")  # a split that cannot be opened ends nothing: the next is read as well
    assert {damage.split for damage in verify(folder, decode=False).damages} == {"train", "val"}
    damaged_json(folder, lambda data: data.update(color="red"))
    assert "color" in verify(folder).damages[0].reason
    with pytest.raises(UserError):
        verify(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def ffcv(tmp_path_factory, tiny_dataset, tiny_small) -> dict[str, np.ndarray]:
    """What FFCV's Loader reads from two datasets, with each of its two ways of caching."""
    if importlib.util.find_spec("ffcv") is None:
        pytest.skip("ffcv is not installed")
    output = tmp_path_factory.mktemp("ffcv") / "read.npz"
    script = Path(__file__).parents[2] / "helpers" / "read_with_ffcv.py"
    paths = [output, tiny_small / "train.beton", tiny_dataset / "val.beton"]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *map(str, paths)], capture_output=True, text=True, timeout=300
    )
    if "ImportError" in run.stderr:
        pytest.skip("ffcv cannot be imported: " + run.stderr.splitlines()[-1])
    assert run.returncode == 0, run.stderr
    with np.load(output) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("cache", ["os", "process"])
def test_ffcv_reads_raw_images(ffcv, tiny_small, cache):
    ours = Dataset.open(tiny_small).split("train")
    expected = np.stack([ours.sample(n).reshape(32, 32, 3) for n in range(ours.num_samples)])
    assert np.array_equal(ffcv[f"{cache} raw image"], expected)
    assert np.array_equal(ffcv[f"{cache} raw label"][:, 0], ours.labels)


@pytest.mark.parametrize("cache", ["os", "process"])
def test_ffcv_reads_jpegs_of_all_sizes(ffcv, tiny_dataset, cache):
    cv2 = pytest.importorskip("cv2")  # FFCV needs it, too
    ours = Dataset.open(tiny_dataset).split("val")
    assert len(ffcv[f"{cache} jpeg image"]) == ours.num_samples
    assert np.array_equal(ffcv[f"{cache} jpeg label"][:, 0], ours.labels)
    for number, image in enumerate(ffcv[f"{cache} jpeg image"]):
        whole = pixels(ours.read_verified(number).tobytes())
        side = min(whole.shape[:2])
        top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
        crop = whole[top : top + side, left : left + side]
        expected = cv2.resize(crop, (24, 24), interpolation=cv2.INTER_AREA)
        assert np.abs(image.astype(int) - expected).mean() < 1.5  # FFCV decodes with the fast DCT


@pytest.fixture(scope="module")
def written_by_ffcv(tmp_path_factory) -> Path:
    """A folder of train.beton and val.beton that FFCV's DatasetWriter wrote: JPEGs and raw images, by two workers."""
    if importlib.util.find_spec("ffcv") is None:
        pytest.skip("ffcv is not installed")
    folder = tmp_path_factory.mktemp("written")
    script = Path(__file__).parents[2] / "helpers" / "write_with_ffcv.py"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder)], capture_output=True, text=True, timeout=300
    )
    if "ImportError" in run.stderr:
        pytest.skip("ffcv cannot be imported: " + run.stderr.splitlines()[-1])
    assert run.returncode == 0, run.stderr
    return folder


def test_what_ffcv_wrote_is_read_verified_and_converted(written_by_ffcv, tmp_path):
    dataset = Dataset.open(written_by_ffcv)
    assert {name: split.samples for name, split in dataset.spec.splits.items()} == {"train": 40, "val": 8}
    reader = dataset.split("train")
    assert reader.labels.tolist() == [number % 5 for number in range(40)]
    assert set(reader.modes.tolist()) == {JPEG, RAW}
    for number in range(40):
        data, shape = reader.read_verified(number), (int(reader.heights[number]), int(reader.widths[number]), 3)
        found = pixels(data.tobytes()) if reader.modes[number] == JPEG else data.reshape(shape)
        assert np.abs(found.astype(int) - drawn(30 + number, 40, number)).mean() < 8
    assert dataset.spec.classes == ("0", "1", "2", "3", "4")
    report = verify(written_by_ffcv)
    assert (report.intact, report.unsealed) == (True, 48)
    assert list(Dataset.open(written_by_ffcv / "val.beton").spec.splits) == ["train"]
    spec = convert(open_source("dataset", written_by_ffcv), tmp_path / "d", ConvertOptions(workers=1))
    assert spec.splits["train"].counts == (8,) * 5
    assert spec.name == "ffcv"
    report = verify(tmp_path / "d")
    assert (report.intact, report.unsealed) == (True, 0)


def test_skipped_samples_leave_no_hole_in_the_index(tmp_path):
    contents = [drawn(9, 9, 1), b"no image", jpeg(40, 30), drawn(8, 8, 2)]
    source = MemorySource(splits={"train": entries(contents, labels=[0, 0, 1, 1])})
    convert(source, tmp_path / "d", ConvertOptions(workers=1, skip_bad=True))
    reader = Dataset.open(tmp_path / "d").split("train")
    assert reader.modes.tolist() == [RAW, JPEG, RAW]
    assert reader.labels.tolist() == [0, 1, 1]
    assert reader.read_verified(2).tobytes() == contents[3].tobytes()


def test_verify_does_not_claim_checksums_that_ffcv_did_not_write(written_by_ffcv, tiny_small, capsys):
    code, _, err = call(capsys, "verify", written_by_ffcv)
    assert (code, "images read and decoded: all intact" in err, "48 images have no CRC32" in err) == (0, True, True)
    code, _, err = call(capsys, "verify", tiny_small)
    assert (code, "compared with their CRC32 and decoded: all intact" in err, "no CRC32" in err) == (0, True, False)
