"""Parquet and Arrow files as Hugging Face's `datasets` and others write them: columns, classes, splits, damage."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.errors import DeitfastError, UserError
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.sources.factory import open_source
from tests.helpers.archives import contents
from tests.helpers.parquet import ENCODED, image_table, write_table
from tests.helpers.sample_images import MemorySource, drawn, encoded, entries, jpeg


def test_parquet_as_the_hub_has_it(tmp_path: Path) -> None:
    data = tmp_path / "d" / "data"
    names = ["zebra", "crane, bird", "ape"]
    write_table(data / "train-00000-of-00002.parquet", image_table([1, 0, 2, 1], names=names))
    write_table(data / "train-00001-of-00002.parquet", image_table([0], names=names))
    write_table(data / "validation-00000-of-00001.parquet", image_table([2], names=names))
    write_table(data / "test-00000-of-00001.parquet", image_table([-1, -1], names=names))
    source = open_source("huggingface", tmp_path / "d", scratch=tmp_path / "out")
    assert source.classes == ("zebra", "crane, bird", "ape")
    assert contents(source) == [
        ("zebra", "data/train-00000-of-00002.parquet/0000001-n1.JPEG", b"image 1"),
        ("zebra", "data/train-00001-of-00002.parquet/0000000-n0.JPEG", b"image 0"),
        ("crane, bird", "data/train-00000-of-00002.parquet/0000000-n0.JPEG", b"image 0"),
        ("crane, bird", "data/train-00000-of-00002.parquet/0000003-n3.JPEG", b"image 3"),
        ("ape", "data/train-00000-of-00002.parquet/0000002-n2.JPEG", b"image 2"),
    ]
    assert [name for name, *_ in contents(source, "val")] == ["ape"]
    assert "test" not in source.splits
    assert source.notes == ("4 files: 3 classes, 5 train + 1 val images", "2 images without a class left out")
    source.close()
    assert list((tmp_path / "out").iterdir()) == []


def test_arrow_as_save_to_disk_and_the_cache_have_it(tmp_path: Path) -> None:
    expected = image_table([0, 1, 1], names=["a", "b"])
    saved = tmp_path / "saved"
    write_table(saved / "train" / "data-00000-of-00001.arrow", expected)
    write_table(saved / "test" / "data-00000-of-00001.arrow", expected)
    cached = tmp_path / "cached" / "default" / "0.0.0"
    write_table(cached / "pets-train-00000-of-00001.arrow", expected)
    write_table(
        cached / "cache-62d0e6a83d0853dc.arrow", image_table([0] * 9, names=["a", "b"])
    )  # what a `map` left there
    feather = tmp_path / "feather.arrow"
    with pa.ipc.new_file(feather, expected.schema) as file:
        file.write_table(expected)
    sources = [open_source("huggingface", path) for path in (saved, tmp_path / "cached", feather)]
    for source in sources:
        rows = [(name, data) for name, _, data in contents(source)]
        assert rows == [("a", b"image 0"), ("b", b"image 1"), ("b", b"image 2")]
        source.close()
    assert [sorted(source.splits) for source in sources] == [["test", "train"], ["train"], ["train"]]


@pytest.mark.parametrize(
    "columns",
    [
        {"img": pa.binary(), "fine_label": pa.int32(), "coarse_label": pa.int32()},
        {"jpg": pa.large_binary(), "cls": pa.uint8()},
        {"Image Bytes": pa.binary(), "Class Name": pa.string()},
        {"image": ENCODED, "breed": pa.dictionary(pa.int8(), pa.string())},
    ],
)
def test_columns_by_their_names(tmp_path: Path, columns: dict[str, pa.DataType]) -> None:
    def value(kind: pa.DataType, row: int) -> Any:
        if pa.types.is_integer(kind):
            return row + 1
        text = str(row + 1)
        return {"bytes": text.encode()} if kind == ENCODED else text if "string" in str(kind) else text.encode()

    data = {name: pa.array([value(kind, row) for row in range(2)], kind) for name, kind in columns.items()}
    source = open_source("huggingface", write_table(tmp_path / "x.parquet", pa.table(data)))
    assert source.classes == ("1", "2")
    assert [data for *_, data in contents(source)] == [b"1", b"2"]


def test_classes_without_names_are_numbers_in_their_order(tmp_path: Path) -> None:
    assert open_source("huggingface", write_table(tmp_path / "x.parquet", image_table([10, 9, 2]))).classes == (
        "2",
        "9",
        "10",
    )
    assert open_source("huggingface", write_table(tmp_path / "y.parquet", image_table(["b", "a"]))).classes == (
        "a",
        "b",
    )
    twice = image_table([0, 1], names=["crane", "crane"])
    assert open_source("huggingface", write_table(tmp_path / "z.parquet", twice)).classes == ("0", "1")


def test_what_cannot_be_told_apart_or_read_is_refused(tmp_path: Path) -> None:
    def refused(path: Path, words: str) -> None:
        with pytest.raises(UserError, match=words):
            open_source("huggingface", path, scratch=tmp_path / "scratch")
        assert not (tmp_path / "scratch").exists() or not list((tmp_path / "scratch").iterdir())

    several = tmp_path / "several"
    for folder in ("first", "second"):
        write_table(several / folder / "train-0.parquet", image_table([0, 1], names=["a", "b"]))
    refused(several, r"several data sets, or one twice[\s\S]*first/train-0.parquet and second/train-0.parquet")
    differ = tmp_path / "differ"
    write_table(differ / "train-0.parquet", image_table([0], names=["a", "b"]))
    write_table(differ / "train-1.parquet", image_table([0], names=["b", "a"]))
    refused(differ, "are of different data sets")
    refused(write_table(tmp_path / "x.parquet", pa.table({"text": ["a"], "label": [1]})), "no column of encoded images")
    no_label = pa.table({"image": pa.array([b"a"]), "caption_embedding": pa.array([0.5])})
    refused(write_table(tmp_path / "y.parquet", no_label), r"no column of classes[\s\S]*caption_embedding \(double\)")
    paths = pa.table({"image": pa.array([{"bytes": None, "path": "/photos/cat/1.jpg"}], ENCODED), "label": [0]})
    refused(write_table(tmp_path / "z.parquet", paths), r"has paths of images[\s\S]*/photos/cat/1.jpg")
    refused(write_table(tmp_path / "test.parquet", image_table([0])), "no images to train on")
    refused(tmp_path / "missing", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no files of Hugging Face's")


def test_who_takes_them_for_a_folder_is_told(tmp_path: Path) -> None:
    write_table(tmp_path / "d" / "train-0.parquet", image_table([0]))
    for kind in ("folder", "imagenet"):
        with pytest.raises(UserError, match="if these are Hugging Face's files: convert huggingface"):
            open_source(kind, tmp_path / "d")


def test_rows_without_an_image_stop_a_conversion_or_are_left_out(tmp_path: Path) -> None:
    files = [jpeg(40, 48, seed=0), None, jpeg(40, 48, seed=1)]
    data = pa.table({"image": pa.array(files, pa.binary()), "label": [0, 0, 1]})
    path = write_table(tmp_path / "x.parquet", data)
    with pytest.raises(DeitfastError, match=r"x\.parquet/0000001"):
        convert(open_source("huggingface", path), tmp_path / "d", ConvertOptions(workers=1))
    spec = convert(open_source("huggingface", path), tmp_path / "e", ConvertOptions(workers=1, skip_bad=True))
    assert spec.splits["train"].counts == (1, 1)


def test_the_same_images_come_out_as_from_files(tmp_path: Path) -> None:
    files = [jpeg(40, 48, seed=n) for n in range(5)] + [encoded(drawn(8, 9, seed=n), "PNG") for n in range(3)]
    data = pa.table({"image": pa.array(files, pa.binary()), "label": [n % 2 for n in range(8)]})
    with_path = open_source("huggingface", write_table(tmp_path / "x.parquet", data))
    spec = convert(with_path, tmp_path / "d", ConvertOptions(workers=1))
    memory = MemorySource(classes=("0", "1"), splits={"train": entries(files, names="{}")})
    plain = convert(memory, tmp_path / "e", ConvertOptions(workers=1))
    assert spec.splits["train"].converted == plain.splits["train"].converted
    assert spec.splits["train"].counts == plain.splits["train"].counts
