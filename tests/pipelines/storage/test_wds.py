"""Tar shards: what the reader gives, what it refuses, and that both formats are one dataset."""

import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.errors import DeitfastError, UserError
from pipelines.loaders.factory import available, open_loader
from pipelines.rng.sampler import SamplerSpec, TrainSampler
from pipelines.spec import AugmentSpec, LoaderSpec
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.dataset import Dataset
from pipelines.storage.formats.format import beton, shards
from pipelines.storage.formats.wds import INDEX, MAGIC, ROW, physical_order
from pipelines.storage.formats.wds_reader import ShardReader
from pipelines.storage.reader import JPEG, RAW
from pipelines.storage.sources.factory import open_source
from pipelines.storage.verify import damaged_samples, verify
from tests.helpers.sample_images import MemorySource, contents_of, drawn, entries, jpeg, mixed_source
from tests.helpers.small_runs import run, tiny_recipe, weights
from tests.helpers.stored_images import write_split

SMALL_SHARDS = shards(20_000)


def as_shards(folder: Path, output: Path, **options) -> Path:
    """Convert a dataset to small shards."""
    convert(open_source("dataset", folder), output, ConvertOptions(workers=1, form=SMALL_SHARDS, **options))
    return output


@pytest.fixture(scope="module")
def photos(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_dataset` in shards."""
    return as_shards(tiny_dataset, tmp_path_factory.mktemp("shards") / "photos")


@pytest.fixture
def copy(mixed_shards: Path, tmp_path: Path) -> Path:
    """A copy of `mixed_shards` to damage."""
    return shutil.copytree(mixed_shards, tmp_path / "copy")


def test_both_formats_hold_the_same(odd, mixed_shards, tmp_path):
    spec = convert(mixed_source(odd), tmp_path / "beton", ConvertOptions(workers=1))
    other = Dataset.open(mixed_shards)
    assert other.spec.fingerprint == spec.fingerprint
    assert other.spec.splits["train"].converted == spec.splits["train"].converted
    one, two = Dataset.open(tmp_path / "beton").split("train"), other.split("train")
    for name in ("labels", "heights", "widths", "modes", "sizes", "crcs"):
        left, right = getattr(one, name), getattr(two, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    for number in range(one.num_samples):
        assert one.sample(number).tobytes() == two.read_verified(number).tobytes()
    assert set(one.modes) == {JPEG, RAW}
    assert len(list((mixed_shards / "train.wds").glob("*.tar"))) > 5


WORKING = [name for name, reason in available().items() if name != "ffcv" and not reason]


@pytest.mark.parametrize(
    ("name", "small"),
    [(name, small) for name in WORKING for small in (False, True) if small or name != "resident"],
)
def test_loaders_make_the_same_batches_of_both_formats(name, small, tiny_dataset, tiny_small, photos, tmp_path):
    folders = (tiny_small, as_shards(tiny_small, tmp_path / "small")) if small else (tiny_dataset, photos)
    spec, batches = AugmentSpec(size=32, mix_group=4), []
    for folder in folders:
        reader = Dataset.open(folder).split("train")
        sampler = TrainSampler(
            SamplerSpec(
                samples=reader.num_samples, batch=12, seed=spec.seed, repeats=spec.repeats, group=spec.mix_group
            )
        )
        with_two = LoaderSpec(name=name, workers=2)
        loader = open_loader(reader, spec, with_two, sampler, train=True, device=torch.device("cpu"))
        batches.append(list(loader.epoch(1)))
        loader.close()
    for one, two in zip(*batches, strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)
        np.testing.assert_array_equal(one.params.table, two.params.table)


def test_a_run_learns_the_same_from_both_formats_and_goes_on_with_either(tiny_small, tmp_path):
    recipe, other = tiny_recipe("train.epochs=1"), as_shards(tiny_small, tmp_path / "small")
    run(tiny_small, tmp_path / "beton", recipe)
    run(other, tmp_path / "wds", recipe)
    one, two = weights(tmp_path / "beton"), weights(tmp_path / "wds")
    assert all(torch.equal(one[name], two[name]) for name in one)
    run(other, tmp_path / "beton", recipe, resume=True)


def test_there_and_back_again_gives_the_same_file(tiny_small, tmp_path):
    as_shards(tiny_small, tmp_path / "wds")
    convert(open_source("dataset", tmp_path / "wds"), tmp_path / "back", ConvertOptions(workers=1, form=beton()))
    for split in ("train.beton", "val.beton"):
        assert (tmp_path / "back" / split).read_bytes() == (tiny_small / split).read_bytes()
    old, new = Dataset.open(tiny_small).spec, Dataset.open(tmp_path / "back").spec
    assert (new.name, new.classes, new.fingerprint) == (old.name, old.classes, old.fingerprint)


def test_a_dataset_as_a_source_is_shrunk_and_refused_where_it_is_damaged(tiny_dataset, tmp_path):
    spec = convert(open_source("dataset", tiny_dataset), tmp_path / "smaller", ConvertOptions(workers=1, max_side=100))
    reader = Dataset.open(tmp_path / "smaller").split("train")
    assert max(reader.heights.max(), reader.widths.max()) == 100
    assert spec.splits["train"].counts == Dataset.open(tiny_dataset).spec.splits["train"].counts
    broken = shutil.copytree(tiny_dataset, tmp_path / "broken")
    place = Dataset.open(broken).split("train").location(5)
    flip(place.file, place.offset + 100)
    with pytest.raises(DeitfastError, match="sample 5 is damaged"):
        convert(open_source("dataset", broken), tmp_path / "x", ConvertOptions(workers=1))
    with pytest.raises(UserError, match="not a converted dataset"):
        open_source("dataset", tiny_dataset.parent)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_jpeg_is_a_view_and_outlives_its_reader(mixed_shards):
    reader = Dataset.open(mixed_shards).split("train")
    first = reader.sample(0)
    assert np.shares_memory(first, reader.sample(0))
    for number in (0, int(np.flatnonzero(reader.modes == RAW)[0])):
        with pytest.raises(ValueError, match="read-only"):
            reader.sample(number)[0] = 1
    content = first.tobytes()
    reader.close()
    reader.close()
    assert first.tobytes() == content
    with pytest.raises(ValueError, match="closed"):
        reader.sample(0)


def swap(folder: Path) -> None:
    (folder / "000002.tar").rename(folder / "x")
    (folder / "000003.tar").rename(folder / "000002.tar")
    (folder / "x").rename(folder / "000003.tar")


def of_another(folder: Path) -> None:
    shutil.copy(folder.parent / "val.wds" / "000000.tar", folder / "000001.tar")


def shorten(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:-size])


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "000001.tar").unlink(), r"000001\.tar: no such file"),
    (lambda folder: (folder / "000001.tar").write_bytes(b""), r"000001\.tar: empty"),
    (lambda folder: flip(folder / "000001.tar", 3), r"000001\.tar: not the shard"),
    (lambda folder: shorten(folder / "000004.tar", 512), r"000004\.tar: not the shard"),
    (swap, r"000002\.tar: not the shard(.|\n)*1 more wrong: 000003\.tar"),
    (of_another, r"000001\.tar: not the shard"),
    (lambda folder: (folder / INDEX).unlink(), r"index\.bin: no such file"),
    (lambda folder: (folder / INDEX).write_bytes(b"x"), r"index\.bin: not a whole index"),
    (lambda folder: (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:-1]), r"index\.bin: not a whole index"),
    (
        lambda folder: (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[: -ROW.itemsize]),
        "not the shard|index is|not a whole index",
    ),
    (lambda folder: flip(folder / INDEX, len(MAGIC) + 20), "index is damaged or another dataset's"),
    (lambda folder: flip(folder / INDEX, len(MAGIC) + 2), "not a whole index"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_shards_that_are_not_those_of_the_index_are_refused_by_name(copy, damage, says):
    damage(copy / "train.wds")
    with pytest.raises(DeitfastError, match=says):
        Dataset.open(copy).split("train")
    report = verify(copy, workers=1)
    assert [damage.split for damage in report.damages[:1]] == ["train"]
    assert report.samples["val"] == 4


@pytest.mark.parametrize("mode", [JPEG, RAW])
def test_a_flipped_byte_names_its_shard_and_sample(copy, mode):
    reader = Dataset.open(copy).split("train")
    number = int(np.flatnonzero(reader.modes == mode)[3])
    place = reader.location(number)
    reader.read_verified(number)
    flip(place.file, place.offset + place.size // 2)
    reader = Dataset.open(copy).split("train")
    with pytest.raises(DeitfastError, match=rf"{place.file}: sample {number} is damaged"):
        reader.read_verified(number)
    damages = verify(copy, workers=1).damages
    assert [(damage.split, damage.sample) for damage in damages] == [("train", number)]


@pytest.mark.parametrize(
    ("where", "says"), [(-1536, "headers"), (-1024, "label"), (-512, "headers"), (-1, "headers"), (0, "padding")]
)
def test_verify_finds_what_would_mislead_other_programs(copy, where, says):
    reader = Dataset.open(copy).split("train")
    inside = [n for n in range(40) if reader.positions[n] not in reader.firsts and reader.location(n).size % 512]
    number = inside[0]
    place = reader.location(number)
    flip(place.file, place.offset + (where or place.size))
    reader = Dataset.open(copy).split("train")
    assert reader.read_verified(number).size
    damages = verify(copy, workers=1).damages
    assert [(damage.split, damage.sample) for damage in damages] == [("train", number)]
    assert says in damages[0].reason


def test_verify_finds_every_flipped_bit_of_a_png(copy):
    reader = Dataset.open(copy).split("train")
    number = next(n for n in range(40) if reader.modes[n] == RAW and reader.positions[n] not in reader.firsts)
    place = reader.location(number)
    content = place.file.read_bytes()
    for at in [*range(0, place.size, 11), *range(place.size - 16, place.size)]:  # in the pixels, their CRC, the end
        flip(place.file, place.offset + at)
        (damage,) = damaged_samples(ShardReader(copy / "train.wds"), decode=False, workers=1)
        assert damage[0] == number
        place.file.write_bytes(content)


def test_verify_looks_at_the_files_beside_the_samples(copy):
    assert verify(copy, workers=1).intact
    folder = copy / "train.wds"
    flip(folder / "000001.idx", 12)
    (folder / "000002.idx").unlink()
    flip(folder / "000003.tar", -5)
    (folder / "000099.tar").write_bytes(b"")
    reasons = [damage.reason for damage in verify(copy, workers=1).damages]
    for says in (
        "000001.idx: not DALI's",
        "000002.idx: no such",
        "000003.tar: does not end",
        "000099.tar: a shard that",
    ):
        assert any(says in reason for reason in reasons), reasons
    assert len(reasons) == 4


@pytest.mark.parametrize("form", [beton(), SMALL_SHARDS], ids=lambda form: form.suffix)
def test_a_file_that_is_cut_while_it_is_read_is_a_message_and_no_signal(odd, tmp_path, form):
    convert(mixed_source(odd), tmp_path, ConvertOptions(workers=1, form=form))
    reader = Dataset.open(tmp_path).split("train")
    number = max(range(reader.num_samples), key=lambda n: (reader.location(n).file, reader.location(n).offset))
    file = reader.location(number).file
    with file.open("r+b") as cut:
        cut.truncate(2000)
    with pytest.raises(DeitfastError, match=f"{file}: was cut while it was being read"):
        reader.read_verified(number)
    reader.close()
    other = Dataset.open(tmp_path).split("val")
    whole = other.read_verified(3).tobytes()
    (tmp_path / "elsewhere").write_bytes(b"new")
    (tmp_path / "elsewhere").replace(other.location(3).file)  # the old file lives on in the map
    assert other.read_verified(3).tobytes() == whole


def test_more_shards_than_open_files_is_said_plainly(copy, monkeypatch):
    def refuse(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("pipelines.storage.reader.mmap.mmap", refuse)
    with pytest.raises(DeitfastError, match=r"000000\.tar: cannot be read: Too many open files(.|\n)*ulimit -n"):
        ShardReader(copy / "train.wds")


@pytest.mark.parametrize(("short", "each"), [(0, 3), (1, 2)])
def test_a_shard_is_filled_to_the_byte(tmp_path, short, each):
    images = [(Image.fromarray(drawn(8, 8)), bytes([number]) * 2000) for number in range(6)]
    whole = 3 * (3 * 512 + 2048) + 1024  # headers and label, image, end of the file
    reader = write_split(tmp_path / "x.wds", images, shard_size=whole - short)
    assert [int(reader.location(number).file.stem) for number in range(6)] == (reader.positions // each).tolist()
    assert sorted(reader.positions) == list(range(6))
    assert [reader.read_verified(number)[0] for number in range(6)] == list(range(6))


def test_a_sample_larger_than_a_shard_has_one_for_itself(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (200, 200, 3), np.uint8))
    images = [(Image.fromarray(drawn(8, 8)), None), (noise, jpeg(200, 200) + bytes(40_000)), (noise, jpeg(20, 20))]
    reader = write_split(tmp_path / "x.wds", images)
    files = [reader.location(number).file.name for number in range(3)]
    assert files.count(files[1]) == 1
    assert reader.file_size == sum(path.stat().st_size for path in (tmp_path / "x.wds").glob("*.tar"))


def test_a_shard_of_a_thousand_images_holds_the_classes_in_proportion(tmp_path):
    images = [bytes([label]) * 3 for label in range(10) for _ in range(300)]  # one class behind the other
    pixels = [np.frombuffer(image, np.uint8).reshape(1, 1, 3) for image in images]
    size = 1000 * (3 * 512 + 512) + 1024  # headers, label, a tiny PNG in one block; end of the file
    source = MemorySource(
        classes=tuple("abcdefghij"), splits={"train": entries(pixels, labels=[n // 300 for n in range(3000)])}
    )
    spec = convert(source, tmp_path / "wds", ConvertOptions(workers=1, form=shards(size)))
    assert spec.fingerprint == convert(source, tmp_path / "beton", ConvertOptions(workers=1)).fingerprint
    reader = Dataset.open(tmp_path / "wds").split("train")
    assert reader.labels.tolist() == [n // 300 for n in range(3000)]
    files = np.array([int(reader.location(number).file.stem) for number in range(3000)])
    assert sorted(set(files)) == [0, 1, 2]
    for shard in range(3):
        counts = np.bincount(reader.labels[files == shard], minlength=10)
        assert counts.sum() == 1000
        assert np.abs(counts - 100).max() < 30  # four standard deviations
    assert (tmp_path / "wds" / "classes.txt").read_text().split() == list("abcdefghij")


def test_the_physical_order_is_a_permutation_that_stays():
    order = physical_order(1000)
    assert sorted(order) == list(range(1000))
    assert order[:5].tolist() == physical_order(1000)[:5].tolist() != [0, 1, 2, 3, 4]
    assert zlib.crc32(order.astype("<i8").tobytes()) == 480392214
    assert physical_order(0).tolist() == []


def test_too_small_shards_are_a_mistake():
    with pytest.raises(UserError, match="shards are too small"):
        shards(9_999)


def test_skipped_images_leave_no_hole(tmp_path):
    source = MemorySource(splits={"train": entries([drawn(9, 9), b"no image", jpeg(40, 30)], labels=[0, 0, 1])})
    convert(source, tmp_path, ConvertOptions(workers=1, skip_bad=True, form=SMALL_SHARDS))
    reader = Dataset.open(tmp_path).split("train")
    assert reader.labels.tolist() == [0, 1]
    with tarfile.open(tmp_path / "train.wds" / "000000.tar") as tar:
        names = [member.name for member in tar]
    jpeg_at = int(reader.positions[1])
    assert names[::2] == ["00000000.cls", "00000001.cls"]
    assert names[1 + 2 * jpeg_at] == f"0000000{jpeg_at}.jpg"
    assert contents_of(tmp_path / "train.wds")["000000.idx"].startswith(b"v1.2 2\n")
    assert reader.sample(0).tobytes() == drawn(9, 9).tobytes()
