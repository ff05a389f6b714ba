"""Tar shards in other hands: webdataset, DALI, DALI's own indexer and tarfile read what we write."""

import gc
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from pipelines.storage.dataset import Dataset
from pipelines.storage.reader import RAW
from tests.helpers.sample_images import pixels


def as_they_lie(reader) -> list[int]:
    """Numbers of the samples in the order of the shards."""
    return np.argsort(reader.positions).tolist()


def stored_images(folder: Path) -> list[bytes]:
    """Every sample's image file as the shards hold it, as they lie."""
    reader = Dataset.open(folder).split("train")
    places = [reader.location(number) for number in as_they_lie(reader)]
    return [place.file.read_bytes()[place.offset : place.offset + place.size] for place in places]


def test_webdataset_reads_the_shards(mixed_shards):
    wds = pytest.importorskip("webdataset")
    reader = Dataset.open(mixed_shards).split("train")
    urls = sorted(str(path) for path in (mixed_shards / "train.wds").glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its last file open
        samples = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8"))
        gc.collect()
    assert [sample["__key__"] for sample in samples] == [f"{number:08d}" for number in range(reader.num_samples)]
    order = as_they_lie(reader)
    assert [sample["cls"] for sample in samples] == reader.labels[order].tolist()
    for number, sample in zip(order, samples, strict=True):
        expected = reader.sample(number)
        if reader.modes[number] == RAW:
            np.testing.assert_array_equal(sample["png"].ravel(), expected)
        else:
            np.testing.assert_array_equal(sample["jpg"], pixels(expected.tobytes()))


def test_dali_reads_the_shards(mixed_shards):
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali.pipeline import Pipeline

    folder = mixed_shards / "train.wds"
    paths = sorted(str(path) for path in folder.glob("*.tar"))
    pipe = Pipeline(batch_size=40, num_threads=1, device_id=None)
    with pipe:
        pipe.set_outputs(
            *fn.readers.webdataset(
                paths=paths,
                index_paths=[path.replace(".tar", ".idx") for path in paths],
                ext=["jpg;png", "cls"],
                missing_component_behavior="error",
            )
        )
    pipe.build()
    images, labels = pipe.run()
    assert [bytes(images.at(number)) for number in range(40)] == stored_images(mixed_shards)
    found = [int(bytes(labels.at(number))) for number in range(40)]
    reader = Dataset.open(mixed_shards).split("train")
    assert found == reader.labels[as_they_lie(reader)].tolist()


@pytest.mark.skipif(not shutil.which("tar"), reason="DALI's program asks GNU tar")
def test_dalis_index_is_the_one_that_its_own_program_makes(mixed_shards, tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    for shard in (mixed_shards / "train.wds").glob("*.tar"):
        with wds2idx.IndexCreator(str(shard), str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "theirs.idx").read_bytes() == shard.with_suffix(".idx").read_bytes()


def test_shards_are_plain_tar_files_of_at_most_the_size_asked_for(mixed_shards):
    names = []
    for shard in sorted((mixed_shards / "train.wds").glob("*.tar")):
        with tarfile.open(shard, "r:", ignore_zeros=False) as tar:
            members = tar.getmembers()
        assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in members} == {
            (0, 0, 0, "", 0o644)
        }
        assert shard.stat().st_size <= 20_000 or len(members) == 2
        names += [member.name for member in members]
    assert [name.partition(".")[0] for name in names[::2]] == [f"{number:08d}" for number in range(40)]
    assert {Path(name).suffix for name in names} == {".cls", ".jpg", ".png"}
