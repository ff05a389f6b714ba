"""Images that tables sort into classes: Kaggle's, Hugging Face's and Caffe's, on the disk and in archives."""

import json
from pathlib import Path

import pytest

from pipelines.errors import DeitfastError, UserError
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.sources.factory import open_source
from pipelines.storage.sources.label_table import Row, read_rows
from pipelines.storage.sources.opened_source import OpenedSource
from tests.helpers.archives import tar_bytes, write_tree
from tests.helpers.sample_images import jpeg

IMAGES = {f"train/{n:03}.jpg": b"train%d" % n for n in range(4)} | {f"test/{n:03}.jpg": b"test%d" % n for n in range(3)}
TABLE = b"id,breed\n000,pug\n001,akita\n002,pug\n003,akita\n"


SIZES = {"train": 6, "validation": 4}
"""Images of two splits, whose files have the same names."""


def labeled(folder: Path, *tables: str) -> OpenedSource:
    return open_source("folder", folder, labels=[Path(table) for table in tables])


def found(source: OpenedSource) -> dict[str, dict[str, str]]:
    """Return the class of each image by split and name."""
    return {
        split: {entry.name: source.classes[entry.label] for entry in entries}
        for split, entries in source.splits.items()
    }


@pytest.mark.parametrize("name", ["train.csv", "train_labels.csv", "TrainMetadata.csv", "train-list.csv"])
def test_a_competitions_table_labels_the_images_of_its_split(tmp_path: Path, name: str) -> None:
    """Its ids have no ending, and the test images, which nobody labels, have the same ones."""
    source = labeled(write_tree(tmp_path / "s", IMAGES | {name: TABLE}), name)
    assert source.classes == ("akita", "pug")
    assert found(source) == {"train": {f"train/{n:03}.jpg": "akita" if n % 2 else "pug" for n in range(4)}}
    assert [source.read(entry) for entry in source.splits["train"]] == [b"train1", b"train3", b"train0", b"train2"]
    assert source.notes[:2] == (f"{name}: 2 classes, 4 train images", "3 images without a row left out")
    assert not any(".csv" in note for note in source.notes[1:])  # the table itself is not left out


def test_tables_of_several_splits_lie_beside_their_images(tmp_path: Path) -> None:
    rows = {split: [{"file_name": f"{n}.png", "label": n % 2} for n in range(size)] for split, size in SIZES.items()}
    files = {f"{split}/{row['file_name']}": b"x" for split, listed in rows.items() for row in listed}
    lines = {f"{split}/metadata.jsonl": "\n".join(map(json.dumps, listed)).encode() for split, listed in rows.items()}
    folder = write_tree(tmp_path / "s", files | lines)
    source = labeled(folder, *(str(folder / name) for name in lines))
    assert source.classes == ("0", "1")
    assert {split: len(images) for split, images in found(source).items()} == {"train": 6, "val": 4}
    assert found(source)["val"]["validation/3.png"] == "1"


def test_a_column_says_the_split(tmp_path: Path) -> None:
    table = b"split;path;class\nTRAIN;all/a.jpg;x\nvalid;all/b.jpg;x\ntest;all/c.jpg;x\ntrain;all/d.jpg;y\n"
    files = {f"deep/all/{name}.jpg": b"x" for name in "abcd"}
    (tmp_path / "labels.csv").write_bytes(table)  # outside the source
    source = labeled(write_tree(tmp_path / "s", files), str(tmp_path / "labels.csv"))
    assert found(source) == {
        "train": {"deep/all/a.jpg": "x", "deep/all/d.jpg": "y"},
        "val": {"deep/all/b.jpg": "x"},
        "test": {"deep/all/c.jpg": "x"},
    }


def test_the_table_decides_before_its_name_and_its_name_before_the_folder(tmp_path: Path) -> None:
    files = {f"train/{name}.jpg": b"x" for name in "abc"} | {
        "train.csv": b"file,label,split\na.jpg,x,train\nb.jpg,x,val\n",
        "test_labels.csv": b"file,label\nc.jpg,x\n",
    }
    source = labeled(write_tree(tmp_path / "s", files), "train.csv", "test_labels.csv")
    assert found(source) == {"train": {"train/a.jpg": "x"}, "val": {"train/b.jpg": "x"}, "test": {"train/c.jpg": "x"}}


def test_a_name_is_whole_parts_of_a_path_and_a_whole_path_first(tmp_path: Path) -> None:
    files = {"1.jpg": b"top", "b/1.jpg": b"b", "ab/1.jpg": b"ab", "11.jpg": b"other"}
    (tmp_path / "l.csv").write_bytes(b"file,label\n1.jpg,x\nb/1.jpg,y\n")
    source = labeled(write_tree(tmp_path / "s", files), str(tmp_path / "l.csv"))
    assert found(source) == {"train": {"1.jpg": "x", "b/1.jpg": "y"}}


def test_a_table_in_an_archive(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(
        tar_bytes({"top/" + name: data for name, data in IMAGES.items()} | {"top/train.csv": TABLE})
    )
    source = labeled(tmp_path / "s.tar", "train.csv")
    assert found(source)["train"] == {f"top/train/{n:03}.jpg": "akita" if n % 2 else "pug" for n in range(4)}


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    images = {f"{n}.jpg": b"x" for n in range(12)}
    table = "".join(f"{n}.jpg {n}\n" for n in range(12)).encode()  # Caffe's: no head, a blank between
    source = labeled(write_tree(tmp_path / "s", images | {"train.txt": table}), "train.txt")
    assert source.classes == tuple(map(str, range(12)))


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.csv", 'file,label\n"a, b.jpg","x ""y"""\n', [Row("a, b.jpg", 'x "y"', None)]),
        ("a.csv", "\ufefffile,label\r\na.jpg,x\r\n\r\n", [Row("a.jpg", "x", None)]),
        ("a.csv", "\ufeffa.jpg,x\n", [Row("a.jpg", "x", None)]),
        ("a.csv", "Image_ID,Class Name,height\na.jpg,x,3\n", [Row("a.jpg", "x", None)]),
        ("a.csv", "id_code,diagnosis\na,2\n", [Row("a", "2", None)]),
        ("a.csv", "a.jpg,x\nb.jpg,y\n", [Row("a.jpg", "x", None), Row("b.jpg", "y", None)]),
        ("a.tsv", "val_0.JPEG\tn01\t0\t3\n", [Row("val_0.JPEG", "n01", None)]),
        ("a.csv", "file,label\n.\\sub\\a.jpg,x\n", [Row("sub/a.jpg", "x", None)]),
        ("a.txt", "my photo.jpg 3\n", [Row("my photo.jpg", "3", None)]),
        ("a.jsonl", '{"file_name": "a.jpg", "label": 0}\n', [Row("a.jpg", "0", None)]),
    ],
)
def test_tables_as_programs_write_them(name: str, text: str, rows: list[Row]) -> None:
    assert read_rows(text.encode(), name) == rows


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (b"", "the table is empty"),
        (b"file,label\n000.jpg,\n", "row 2 has no class"),
        (b"file,label\n,x\n", "row 2 has no file name"),
        (b"file,label,split\n000.jpg,x,later\n", "row 2 has no split"),
        (b"file,height,width\n000.jpg,3,4\n", "no column of classes"),
        (b"height,label,width\n1,x,3\n", "no column of file names"),
        (b"file,label\nnone.jpg,x\n", "names 1 image that"),
        (b"file,label\ntrain/000.jpg,x\ntrain/000,y\n", "is named twice, and not alike"),
        (b"file,label\n000.jpg,x\n", "000.jpg may be several images"),
        (b"file,label\ntest/000.jpg,x\n", "no images to train on"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path: Path, table: bytes, problem: str) -> None:
    folder = write_tree(tmp_path / "s", IMAGES | {"labels.csv": table})
    with pytest.raises(UserError, match=problem):
        labeled(folder, "labels.csv")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b"\xff\xfe"),
        ("a.csv", b'file,label\n"a'),
        ("a.jsonl", b"{"),
        ("a.jsonl", b"[1]"),
        ("a.jsonl", b"[" * 99999),
    ],
)
def test_what_is_no_table_is_refused(name: str, data: bytes) -> None:
    with pytest.raises(DeitfastError, match="not a label table"):
        read_rows(data, name)


def test_a_table_that_is_not_there_and_kinds_that_have_labels(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "s", IMAGES | {"train.csv": TABLE})
    with pytest.raises(UserError, match=r"there is no such file[\s\S]*train\.csv"):
        labeled(folder, "labels.csv")
    with pytest.raises(UserError, match="there are several"):
        labeled(write_tree(tmp_path / "t", {"a/m.csv": TABLE, "b/m.csv": TABLE}), "m.csv")
    with pytest.raises(UserError, match="has its own labels"):
        open_source("imagenet", folder, labels=[Path("train.csv")])


def test_who_forgets_the_table_is_reminded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"if train\.csv says the classes: --labels train\.csv"):
        labeled(write_tree(tmp_path / "s", IMAGES | {"train.csv": TABLE}))
    one = labeled(write_tree(tmp_path / "t", {"images/1.png": b"", "images/2.png": b"", "l.tsv": b""}))
    assert "if l.tsv says the classes: --labels l.tsv" in one.notes


def test_labeled_images_are_converted(tmp_path: Path) -> None:
    images = {f"all/{n}.jpg": jpeg(20, 24, seed=n) for n in range(6)}
    table = b"file,label\n" + b"".join(b"%d.jpg,%s\n" % (n, b"ab"[n % 2 : n % 2 + 1]) for n in range(6))
    source = labeled(write_tree(tmp_path / "s", images | {"l.csv": table}), "l.csv")
    spec = convert(source, tmp_path / "d", ConvertOptions(workers=1))
    assert (spec.classes, spec.splits["train"].counts) == (("a", "b"), (3, 3))
