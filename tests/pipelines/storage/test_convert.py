"""Conversion: what is written, whatever the number of workers, and what is refused."""

import logging
import os
from pathlib import Path

import pytest

from pipelines.errors import DeitfastError, UserError
from pipelines.storage.convert import split
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.dataset import Dataset, content_fingerprint, read_spec
from pipelines.storage.formats.format import beton, shards
from tests.helpers.sample_images import MemorySource, contents_of, entries, jpeg, mixed_source


def test_convert_counts_and_keeps_the_sources_order(odd, tmp_path):
    seen = []
    source = mixed_source(odd)
    spec = convert(source, tmp_path / "d", ConvertOptions(workers=1), progress=lambda *step: seen.append(step))
    train = spec.splits["train"]
    assert (train.samples, train.counts) == (40, (20, 20))
    assert train.converted == {
        "passed through": 12, "re-encoded": 18, "stored raw": 10, "gray": 9, "CMYK": 3, "16-bit": 3,
        "palette": 3, "transparent": 3, "EXIF-rotated": 3, "named JPEG but not one": 21,
    }  # fmt: skip
    dataset = Dataset.open(tmp_path / "d")
    reader = dataset.split("train")
    assert dataset.spec == spec == read_spec(tmp_path / "d")
    assert reader.labels.tolist() == [entry.label for entry in source.splits["train"]]
    assert [reader.read_verified(n).tobytes() for n in range(4)] == list(odd.values())[:4]
    assert train.fingerprint == content_fingerprint(reader)
    assert seen[0] == ("train", 0, 40, 0)
    assert ("train", 40, 40) in [step[:3] for step in seen]
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["dataset.json", "train.beton", "val.beton"]


def test_the_bytes_do_not_depend_on_the_workers(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(split, "BATCH_IMAGES", 3)
    for workers in (1, 2):
        convert(mixed_source(odd), tmp_path / str(workers), ConvertOptions(workers=workers, max_side=100))
    assert contents_of(tmp_path / "1") == contents_of(tmp_path / "2")


@pytest.mark.parametrize("form", [beton(), shards()], ids=["beton", "shards"])
def test_data_is_on_the_disk_before_the_journal_speaks_of_it(odd, tmp_path, monkeypatch, form):
    """And the journal with it: after a power cut it tells of no image that is not there."""
    order, fsync = [], os.fsync

    def synced(fd):
        order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(split, "BATCH_IMAGES", 3)
    monkeypatch.setattr(split, "FLUSH_BYTES", 0)
    convert(mixed_source(odd), tmp_path / "d", ConvertOptions(workers=1, form=form))
    journals = [place for place, name in enumerate(order) if name == "train.journal"]
    assert len(journals) >= 13
    assert {order[place - 1] for place in journals} == {
        "train.beton.partial" if form.suffix == ".beton" else "000000.tar"
    }


def test_bad_files_stop_a_conversion_or_are_skipped(odd, tmp_path, caplog):
    files = list(odd.values())[:4]
    contents = [files[0], files[1][:-50], files[2], b"", files[3], b"text"]
    source = MemorySource(splits={"train": entries(contents, labels=[0, 0, 0, 0, 1, 1])})
    with pytest.raises(UserError, match=r"1\.JPEG: the JPEG stops before its end(.|\n)*--skip-bad"):
        convert(source, tmp_path / "d", ConvertOptions(workers=1))
    assert not (tmp_path / "d" / "dataset.json").exists()
    with caplog.at_level(logging.INFO, logger="pipelines"):
        spec = convert(source, tmp_path / "d", ConvertOptions(workers=1, skip_bad=True))
    assert f"3 images left out; {tmp_path / 'd' / 'skipped.txt'} says which and why" in caplog.messages
    assert spec.splits["train"].samples == 3
    assert spec.splits["train"].converted["skipped"] == 3
    lines = (tmp_path / "d" / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["1.JPEG", "3.JPEG", "5.JPEG"]
    convert(source, tmp_path / "fresh", ConvertOptions(workers=1, skip_bad=True))
    assert contents_of(tmp_path / "d") == contents_of(tmp_path / "fresh")


def test_going_on_without_skip_bad_does_not_keep_what_was_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(split, "BATCH_IMAGES", 1)
    monkeypatch.setattr(split, "FLUSH_BYTES", 0)
    contents = [jpeg(30, 30), b"", jpeg(30, 31), OSError(5, "broken disk")]
    source = MemorySource(splits={"train": entries(contents)})
    with pytest.raises(DeitfastError, match=r"3\.JPEG: cannot be read: broken disk"):
        convert(source, tmp_path / "d", ConvertOptions(workers=1, skip_bad=True))
    seen = []
    for skip_bad in (False, True):  # the digest of the listing goes by name, label and size: this is the same source
        with pytest.raises(DeitfastError) as raised:
            convert(
                source,
                tmp_path / "d",
                ConvertOptions(workers=1, skip_bad=skip_bad),
                progress=lambda *step: seen.append(step),
            )
        assert ("1.JPEG: the file is empty" in str(raised.value)) == (not skip_bad)
    assert seen[0] == ("train", 3, 4, 0)


def test_classes_without_images_are_mistakes(tmp_path):
    image = jpeg(20, 20)
    with pytest.raises(UserError, match=r"1 of 2 classes(.|\n)*none of b"):
        convert(MemorySource(splits={"train": entries([image], labels=[0])}), tmp_path / "d", ConvertOptions(workers=1))
    assert not (tmp_path / "d").exists()
    source = MemorySource(splits={"train": entries([image, b""], labels=[0, 1])})
    with pytest.raises(UserError, match="none of b"):
        convert(source, tmp_path / "d", ConvertOptions(workers=1, skip_bad=True))
    with pytest.raises(UserError, match="no images found"):
        convert(MemorySource(splits={"train": []}), tmp_path / "e", ConvertOptions(workers=1))


def test_a_finished_dataset_is_left_alone(odd, tmp_path):
    source = mixed_source(odd, copies=1)
    first = convert(source, tmp_path, ConvertOptions(workers=1))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert convert(source, tmp_path, ConvertOptions(workers=1)) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    for other, options in ((source, {"max_side": 50}), (mixed_source(odd, copies=2), {})):
        with pytest.raises(UserError, match="holds another dataset already"):
            convert(other, tmp_path, ConvertOptions(workers=1, **options))


def test_what_is_in_the_way_is_not_overwritten(odd, tmp_path):
    (tmp_path / "train.beton").write_bytes(b"precious")
    with pytest.raises(UserError, match="in the way"):
        convert(mixed_source(odd), tmp_path, ConvertOptions(workers=1))
    assert (tmp_path / "train.beton").read_bytes() == b"precious"
    with pytest.raises(UserError, match="cannot be the output folder"):
        convert(mixed_source(odd), tmp_path / "train.beton", ConvertOptions(workers=1))


def test_two_conversions_into_one_folder_are_refused(odd, tmp_path):
    def again(*_):
        with pytest.raises(UserError, match="another conversion"):
            convert(mixed_source(odd), tmp_path, ConvertOptions(workers=1))

    convert(mixed_source(odd, copies=1), tmp_path, ConvertOptions(workers=1), progress=again)
