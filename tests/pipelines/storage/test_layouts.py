"""Folders and archives as people have them: wrapped, joined, renamed by other systems, with the output inside."""

import io
import json
import os
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import DeitfastError, UserError
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.sources.factory import open_source
from pipelines.storage.sources.opened_source import OpenedSource
from tests.helpers.archives import contents, tar_bytes, write_tree
from tests.helpers.sample_images import drawn, encoded

SPLIT = {
    f"{split}/{c}/{n}.png": b"x" for split, count in (("train", 3), ("val", 2)) for c in "ab" for n in range(count)
}
ONE = ConvertOptions(workers=1)


def below(prefix: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {prefix + name: data for name, data in files.items()}


WRAPPED = below("archive/", SPLIT)


def counts(source: OpenedSource) -> dict[str, list[int]]:
    return {
        split: np.bincount([e.label for e in entries], minlength=len(source.classes)).tolist()
        for split, entries in source.splits.items()
    }


TWO_SPLITS = {"train": [3, 3], "val": [2, 2]}


@pytest.mark.parametrize(
    ("files", "note"),
    [
        (
            below("archive/", SPLIT) | {"archive/preview.png": b""},
            "train/ and val/ under archive/: 2 classes, 6 + 4 images",
        ),
        (
            below("archive/", SPLIT) | {"preview.png": b""},
            "1 image outside train/<class>/ and val/<class>/ left out",
        ),
        (WRAPPED | {"docs/figure.png": b"", "docs/2.png": b""}, "2 images outside train/"),
        (below("a/b/c/", SPLIT) | {"a/1.png": b"", "a/b/2.png": b""}, "train/ and val/ under a/b/c/"),
        (SPLIT | {"banner.jpg": b""}, "1 image outside"),
        (
            {
                name.replace("train/", "training_set/").replace("val/", "val_images/"): data
                for name, data in SPLIT.items()
            },
            "training_set/ and val_images/: 2 classes, 6 + 4 images",
        ),
        ({name.replace("train/", "train/train/"): data for name, data in SPLIT.items()}, None),
    ],
)
@pytest.mark.parametrize("shape", ["folder", "zip", "tar"])
def test_a_wrapped_tree_is_two_splits_whatever_lies_next_to_it(
    tmp_path: Path, shape: str, files: dict, note: str
) -> None:
    path = tmp_path / f"set.{shape}"
    if shape == "folder":
        write_tree(path, files)
    elif shape == "tar":
        path.write_bytes(tar_bytes(files))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            [archive.writestr(name, data) for name, data in files.items()]
    source = open_source("folder", path)
    assert source.classes == ("a", "b")
    assert counts(source) == TWO_SPLITS
    assert note is None or any(found.startswith(note) for found in source.notes)


def test_splits_with_a_test_folder_of_kaggle(tmp_path: Path) -> None:
    files = {"seg_train/seg_train/sea/1.jpg": b"", "seg_test/seg_test/sea/2.jpg": b"", "seg_pred/seg_pred/3.jpg": b""}
    source = open_source("folder", write_tree(tmp_path, files))
    assert counts(source) == {"train": [1], "test": [1]}
    assert source.classes == ("sea",)


def test_a_class_that_holds_a_folder_called_train_stays_a_class(tmp_path: Path) -> None:
    files = {f"cats/{n}.jpg": b"" for n in range(5)} | {"toys/train/red/1.jpg": b""}
    assert open_source("folder", write_tree(tmp_path, files)).classes == ("cats", "toys")


def test_a_picture_next_to_class_folders_does_not_make_them_one_class(tmp_path: Path) -> None:
    files = {f"archive/{c}/{n}.png": b"" for c in "ab" for n in range(3)} | {"archive/preview.png": b""}
    source = open_source("folder", write_tree(tmp_path / "wrapped", files))
    assert (source.classes, counts(source)) == (("a", "b"), {"train": [3, 3]})
    assert "class folders under archive/: 2 classes, 6 images" in source.notes
    one = {f"cats/{n}.png": b"" for n in range(3)} | {"cats/more/4.png": b"", "cats/even_more/5.png": b""}
    assert open_source("folder", write_tree(tmp_path / "one", one)).classes == ("cats",)


@pytest.mark.parametrize("other", ["Cat", "c-at", "ﬁsh"])
def test_a_class_that_is_spelled_otherwise_in_train_is_named_with_it(tmp_path: Path, other: str) -> None:
    name = {"Cat": "cat", "c-at": "C_at", "ﬁsh": "fish"}[other]
    files = {f"train/{other}/1.png": b"", "train/dog/1.png": b"", f"val/{name}/1.png": b""}
    with pytest.raises(UserError, match=rf"{name} \(train/ has {other}\)"):
        open_source("folder", write_tree(tmp_path, files))


# joined and lying archives


def test_joined_tars_are_read_to_their_end(tmp_path: Path) -> None:
    parts = [tar_bytes({f"{c}/{n}.png": c.encode() for n in range(4)}) for c in "abc"]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    assert counts(open_source("folder", tmp_path / "all.tar")) == {"train": [4, 4, 4]}
    assert contents(open_source("folder", tmp_path / "all.tar"))[8] == ("c", "c/0.png", b"c")
    packed = b"".join(tar_bytes({f"{c}/{n}.png": c.encode() for n in range(4)}, "w:gz") for c in "ab")
    (tmp_path / "all.tar.gz").write_bytes(packed)
    assert counts(open_source("folder", tmp_path / "all.tar.gz", scratch=tmp_path / "s")) == {"train": [4, 4]}


@pytest.mark.parametrize("tail", [b"rubbish" * 100, b"\0" * 20_000 + b"PK\x03\x04" + b"x" * 700])
def test_what_is_no_tar_behind_a_tar_is_refused(tmp_path: Path, tail: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes({"a/1.png": b"1"}) + tail)
    with pytest.raises(DeitfastError, match="no tar header at byte"):
        open_source("folder", tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(tar_bytes({"a/1.png": b"1"}) + b"\0" * 5_000_000)
    assert counts(open_source("folder", tmp_path / "x.tar")) == {"train": [1]}


def test_joined_zips_are_refused(tmp_path: Path) -> None:
    data = []
    for c in "ab":
        with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
            archive.writestr(f"{c}/1.png", b"1")
        data.append(buffer.getvalue())
    (tmp_path / "x.zip").write_bytes(b"".join(data))
    with pytest.raises(UserError, match="several zips joined"):
        open_source("folder", tmp_path / "x.zip")


HUGE = [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7, b"7" * 11 + b"\0"]


@pytest.mark.parametrize("kind", [b"0", b"7", b"5", b"L", b"K", b"x", b"g", b"S", b"3"])
@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize("at", [0, 2])
def test_a_header_that_lies_about_its_size_ends_in_a_message(tmp_path: Path, kind: bytes, size: bytes, at: int) -> None:
    data = bytearray(tar_bytes({f"a/{n}.jpg": b"x" * 700 for n in range(4)}))
    head = at * 1536
    data[head + 124 : head + 136] = size
    data[head + 156 : head + 157] = kind
    data[head + 148 : head + 156] = b" " * 8
    data[head + 148 : head + 156] = b"%06o\0 " % sum(data[head : head + 512])
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(DeitfastError, match=r"x\.tar is (damaged|no archive)"):
        open_source("folder", tmp_path / "x.tar")


def test_a_zip_member_larger_than_it_says_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", b"\0" * 1_000_000)
    data = path.read_bytes().replace((1_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    path.write_bytes(data)
    source = open_source("folder", path)
    with pytest.raises(OSError, match="wrong checksum"):
        source.read(source.splits["train"][0])


# names of other systems


@pytest.mark.parametrize("system", [0, 3])
@pytest.mark.parametrize("folders", [False, True])
def test_backslashes_in_a_zip_are_separators(tmp_path: Path, system: int, folders: bool) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in (["pics\\", "pics\\train\\"] if folders else []) + [
            f"pics\\{n.replace('/', chr(92))}" for n in SPLIT
        ]:
            info = zipfile.ZipInfo("x")
            info.filename, info.create_system = name, system
            archive.writestr(info, b"" if name.endswith("\\") else b"x")
    source = open_source("folder", tmp_path / "x.zip")
    assert source.classes == ("a", "b")
    assert counts(source) == TWO_SPLITS


def test_backslashes_are_separators_next_to_names_with_slashes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ["pics/README", *(f"pics\\{n.replace('/', chr(92))}" for n in SPLIT)]:
            info = zipfile.ZipInfo("x")
            info.filename, info.create_system = name, 3
            archive.writestr(info, b"x")
    source = open_source("folder", tmp_path / "x.zip")
    assert counts(source) == TWO_SPLITS
    assert "names with backslashes are read as paths" in source.notes


def test_backslashes_stay_where_slashes_separate(tmp_path: Path) -> None:
    path = write_tree(tmp_path / "t", {"a/we\\ird.png": b"1", "b/2.png": b"2"})
    assert counts(open_source("folder", path)) == {"train": [1, 1]}


@pytest.mark.parametrize("shape", ["folder", "tar"])
def test_names_that_differ_in_unicode_form_only_are_one(tmp_path: Path, shape: str) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    files = {f"train/{composed}/1.png": b"1", f"train/{decomposed}/2.png": b"2", f"val/{decomposed}/é.png": b"3"}
    files |= {f"train/{decomposed}/1.png": b"4", "train/dog/1.png": b"5"}
    path = tmp_path / f"x.{shape}"
    if shape == "folder":
        write_tree(path, files)
    else:
        path.write_bytes(tar_bytes(files))
    source = open_source("folder", path)
    assert source.classes == (composed, "dog")
    assert sorted(data for name, _, data in contents(source) if name == composed) == [b"1", b"2", b"4"]
    assert [data for *_, data in contents(source, "val")] == [b"3"]


# the output inside the source


def photos(folder: Path) -> Path:
    return write_tree(folder, {f"{c}/{n}.png": encoded(drawn(20, 20, n), "PNG") for c in "ab" for n in range(4)})


@pytest.mark.parametrize("output", ["data/folder", "a/out", "out", "."])
@pytest.mark.parametrize("finished", [True, False])
def test_the_output_inside_the_source_is_not_part_of_it(tmp_path: Path, output: str, finished: bool, caplog) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "photos" / output
    first = convert(open_source("folder", source, scratch=out), out, ONE)
    if not finished:  # as a kill leaves it
        (out / "dataset.json").unlink()
        (out / "train.beton").rename(out / "train.beton.partial")
        (out / "train.journal").write_bytes(b"")
    again = convert(open_source("folder", source, scratch=Path(os.path.relpath(out))), out, ONE)
    assert again == first
    assert ("there already" in caplog.text) == finished or caplog.text == ""
    assert json.loads((out / "dataset.json").read_text())["classes"] == ["a", "b"]
    assert open_source("folder", source, scratch=tmp_path / "elsewhere").classes == ("a", "b")


def test_shards_inside_the_source_are_not_part_of_it(tmp_path: Path) -> None:
    from pipelines.storage.formats.format import shards

    source, out = photos(tmp_path / "photos"), tmp_path / "photos"
    options = ConvertOptions(workers=1, form=shards(20_000))
    first = convert(open_source("folder", source, scratch=out), out, options)
    assert convert(open_source("folder", source, scratch=out), out, options) == first


@pytest.mark.parametrize(
    "files",
    [
        {"photos/dataset.json": b"{}"},
        {"photos/b/4.png.partial": b"", "photos/b/x.wds": b"", "photos/b/labels.beton": b""},
        {"photos/b/train.beton": b"", "photos/dataset.json": b"{}"},
    ],
)
def test_files_of_others_named_like_ours_leave_nothing_out(tmp_path: Path, files: dict[str, bytes]) -> None:
    photos(tmp_path / "set" / "photos")
    source = open_source("folder", write_tree(tmp_path / "set", files))
    assert counts(source) == {"train": [4, 4]}
    assert not any("converted" in note for note in source.notes)


def test_a_class_may_be_called_like_a_format(tmp_path: Path) -> None:
    files = {"a.partial/1.png": b"", "b.wds/1.png": b"", "c/1.png": b""}
    assert open_source("folder", write_tree(tmp_path, files)).classes == ("a.partial", "b.wds", "c")


def test_a_converted_data_set_in_the_source_is_left_out_and_named(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    convert(open_source("folder", source), source / "old", ONE)
    assert "old/ is left out: it holds a converted data set" in open_source("folder", source).notes
    assert not any("old/" in note for note in open_source("folder", source, scratch=source / "old").notes)


# dangling links


def test_dangling_links_stop_a_conversion_with_their_target_or_are_skipped(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    (source / "b" / "y.jpg").symlink_to("nowhere")
    (source / "b" / "round.jpg").symlink_to("round.jpg")
    with pytest.raises(UserError, match=r"round\.jpg: a link to round\.jpg, which does not exist"):
        convert(open_source("folder", source), tmp_path / "out", ONE)
    spec = convert(open_source("folder", source), tmp_path / "out", ConvertOptions(workers=1, skip_bad=True))
    assert spec.splits["train"].converted["skipped"] == 2
    assert "b/y.jpg\ta link to nowhere, which does not exist" in (tmp_path / "out" / "skipped.txt").read_text()


def test_links_in_a_tar_lead_on_and_those_to_nowhere_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, target in (("a/1.png", ""), ("a/2.png", "3.png"), ("a/3.png", "1.png"), ("b/4.png", "gone.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = (tarfile.SYMTYPE, target, 0) if target else (b"0", "", 3)
            archive.addfile(member, io.BytesIO(b"abc"))
    source = open_source("folder", tmp_path / "x.tar")
    assert [source.read(entry) for entry in source.splits["train"][:3]] == [b"abc"] * 3
    with pytest.raises(Exception, match=r"a link to b/gone\.png, which does not exist"):
        source.read(source.splits["train"][3])


def test_links_to_folders_that_are_gone_are_named(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "photos", {f"train/{c}/1.png": b"" for c in "ab"})
    (source / "val").symlink_to("/mnt/gone")
    assert "links that lead nowhere are left out: val (to /mnt/gone)" in open_source("folder", source).notes


def test_links_in_a_zip_lead_on_and_those_to_nowhere_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("s/a/1.png", b"abc")
        for name, target in (("s/b/2.png", "../a/1.png"), ("s/b/3.png", "2.png"), ("s/b/4.png", "gone.png")):
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, 0o120777 << 16  # as zip -y writes
            archive.writestr(info, target)
    source = open_source("folder", tmp_path / "x.zip")
    assert [source.read(entry) for entry in source.splits["train"][:3]] == [b"abc"] * 3
    with pytest.raises(Exception, match=r"a link to s/b/gone\.png, which does not exist"):
        source.read(source.splits["train"][3])


# splits of every kind


def test_every_kind_takes_a_fraction_and_its_own_val_becomes_test(tmp_path: Path) -> None:
    demo = open_source("demo", None, val_fraction=0.1)
    assert {split: len(entries) for split, entries in demo.splits.items()} == {"train": 3600, "val": 400, "test": 1000}
    assert counts(demo)["val"] == [40] * 10
    assert demo.splits["test"] == open_source("demo", None).splits["val"]
    assert any("val is 0.1 of each training class: 400 images, drawn with seed 0" in note for note in demo.notes)
    other = open_source("demo", None, val_fraction=0.1, val_seed=1)
    assert counts(other) == counts(demo)
    assert other.splits["val"] != demo.splits["val"]
    assert open_source("demo", None, val_fraction=0.1, val_seed=1) == other
    folder = open_source("folder", write_tree(tmp_path / "t", SPLIT), val_fraction=0.34)
    assert counts(folder) == {"train": [2, 2], "val": [1, 1], "test": [2, 2]}


def test_a_fraction_is_recorded_and_a_converted_set_takes_one_too(tmp_path: Path) -> None:
    files = {f"train/{c}/{n}.png": encoded(drawn(20, 20, n), "PNG") for c in "ab" for n in range(8)}
    files |= {name.replace("train/", "test/"): data for name, data in list(files.items())[:2]}
    source = write_tree(tmp_path / "t", files)
    options = ConvertOptions(workers=1, val_fraction=0.25, val_seed=3)
    spec = convert(open_source("folder", source, val_fraction=0.25, val_seed=3), tmp_path / "d", options)
    assert {name: split.counts for name, split in spec.splits.items()} == {
        "train": (6, 6),
        "val": (2, 2),
        "test": (2, 0),
    }
    recorded = json.loads((tmp_path / "d" / "dataset.json").read_text())
    assert (recorded["val_fraction"], recorded["val_seed"]) == (0.25, 3)
    convert(open_source("folder", source), tmp_path / "plain", ONE)
    again = open_source("dataset", tmp_path / "plain", val_fraction=0.25)
    assert counts(again) == {"train": [6, 6], "val": [2, 2], "test": [2, 0]}


def test_a_split_is_sorted_into_classes_by_the_list_in_its_folder(tmp_path: Path) -> None:
    """As Tiny ImageNet lies: train/<class>/images/*, val/images/*, val/val_annotations.txt, test/images/*."""
    train = {f"tiny/train/{c}/images/{c}_{n}.JPEG": b"x" for c in "ab" for n in range(3)}
    val = {f"tiny/val/images/val_{n}.JPEG": b"x" for n in range(3)}
    boxes = {"tiny/train/a/a_boxes.txt": b"a_0.JPEG\t0\t0\t9\t9\n", "tiny/test/images/test_0.JPEG": b"x"}
    lines = "".join(f"val_{n}.JPEG\t{c}\t0\t32\t44\t62\r\n" for n, c in enumerate("bab")).encode()
    write_tree(tmp_path / "s", {**train, **val, **boxes, "tiny/val/val_annotations.txt": lines})
    source = open_source("folder", tmp_path / "s")
    assert counts(source) == {"train": [3, 3], "val": [1, 2]}
    names = ["val/images/val_1.JPEG", "val/images/val_0.JPEG", "val/images/val_2.JPEG"]
    assert [entry.name for entry in source.splits["val"]] == names
    assert any("test/ has none of the training classes: 1 image left out" in note for note in source.notes)
    write_tree(tmp_path / "s", {"tiny/val/images/val_3.JPEG": b"x"})
    with pytest.raises(UserError, match=r"val_annotations.txt does not say the class of val/images/val_3.JPEG"):
        open_source("folder", tmp_path / "s")
    write_tree(tmp_path / "s", {"tiny/val/val_annotations.txt": lines + b"val_3.JPEG\tc\t0\n"})
    with pytest.raises(UserError, match="val/ has 1 class that train/ has not"):
        open_source("folder", tmp_path / "s")
