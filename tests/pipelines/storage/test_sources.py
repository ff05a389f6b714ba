"""Folders and archives of every shape: the same images, labels and order from all; clear words for the rest."""

import io
import math
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import DeitfastError, UserError
from pipelines.storage.sources.factory import open_source
from pipelines.storage.sources.opened_source import OpenedSource
from pipelines.storage.transcode import BadImageError
from tests.helpers.archives import contents, tar_bytes, write_tree

TREE = {
    "train/cat/1.jpg": b"cat one",
    "train/cat/deep/2.JPEG": b"cat two",
    "train/dog/a b.png": b"dog one",
    "train/dog/.hidden.png": b"dog two",
    "train/ünï/3.webp": b"umlaut",
    "val/dog/9.jpg": b"dog nine",
}
JUNK = {
    "train/cat/notes.txt": b"",
    "train/cat/Thumbs.db": b"",
    "train/dog/._1.jpg": b"macOS",
    "train/dog/4.HEIC": b"a telephone's",
    "train/.git/cat.png": b"",
    "__MACOSX/train/cat/1.jpg": b"",
    "README.md": b"",
}


def pack(shape: str, files: dict[str, bytes], folder: Path) -> Path:
    """Write `files` as a folder or archive of the given shape."""
    folder.mkdir(exist_ok=True)
    if shape == "folder":
        return write_tree(folder / "tree", files)
    if shape == "below a top folder":
        return write_tree(folder / "top", {f"my set/{name}": data for name, data in files.items()})
    path = folder / f"archive.{shape}"
    if shape == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for number, (name, data) in enumerate(files.items()):
                archive.writestr(name, data, zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED)
    else:
        files = {f"./{name}": data for name, data in reversed(files.items())}
        path.write_bytes(tar_bytes(files, {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz", "tar.bz2": "w:bz2"}[shape]))
    return path


SHAPES = ("folder", "below a top folder", "tar", "tar.gz", "tar.xz", "tar.bz2", "zip")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tree_is_the_same_in_every_shape(tmp_path: Path, shape: str) -> None:
    path = pack(shape, TREE | JUNK, tmp_path)
    source = open_source("folder", path, scratch=tmp_path / "scratch")
    assert source.classes == ("cat", "dog", "ünï")
    expected = sorted((name.split("/")[1], name, data) for name, data in TREE.items())
    assert contents(source) == [item for item in expected if item[1].startswith("train")]
    assert contents(source, "val") == [("dog", "val/dog/9.jpg", b"dog nine")]
    left_out = ".md, .db, .txt, ._*, .heic"  # of hidden folders nothing is said
    assert source.notes[-1] == f"5 files left out, not images by name: {left_out}"
    guess = ("train/ and val/ under my set/: 3 classes, 5 + 1 images",) if shape == "below a top folder" else ()
    assert source.notes[:-1] == guess
    copy = pickle.loads(pickle.dumps(source))
    assert contents(copy) == contents(source)


def test_compressed_archives_are_unpacked_into_scratch_and_cleared_away(tmp_path: Path) -> None:
    scratch = tmp_path / "made on demand"
    source = open_source("folder", pack("tar.gz", TREE, tmp_path), scratch=scratch)
    assert [path.name for path in scratch.rglob("*.tar")] == ["archive.tar"]
    source.close()
    source.close()
    assert list(scratch.iterdir()) == []
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes((tmp_path / "archive.tar.gz").read_bytes()[:-20])
    with pytest.raises(DeitfastError, match="damaged"):
        open_source("folder", broken, scratch=scratch)
    assert list(scratch.iterdir()) == []


def test_room_to_unpack_that_can_be_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DeitfastError, match=r"cannot write .*file\n.*File exists"):
        open_source("folder", pack("tar.gz", TREE, tmp_path), scratch=tmp_path / "file")


def test_leftovers_of_a_killed_process_are_cleared_and_those_of_a_living_one_kept(tmp_path: Path) -> None:
    path = pack("tar.gz", TREE, tmp_path)
    scratch = tmp_path / "scratch"
    script = f"""
import os, pathlib, signal
from pipelines.storage.sources.factory import open_source
open_source("folder", pathlib.Path({str(path)!r}), scratch=pathlib.Path({str(scratch)!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[1])
    (left,) = scratch.iterdir()
    living = open_source("folder", path, scratch=scratch)
    assert not left.exists()
    another = open_source("folder", path, scratch=scratch)
    assert len(list(scratch.iterdir())) == 2
    assert contents(living) == contents(another)
    another.close()
    pickle.loads(pickle.dumps(living)).read(living.splits["train"][0])
    living.close()
    assert not any(scratch.iterdir())


def test_progress_is_told(tmp_path: Path) -> None:
    told = []
    open_source("folder", pack("tar.gz", TREE, tmp_path), scratch=tmp_path, progress=lambda *step: told.append(step))
    assert {what.split()[0] for what, *_ in told} == {"unpacking", "indexing"}
    assert all(0 <= done <= total for _, done, total in told)


def test_folders_without_train_are_classes_even_one_called_train(tmp_path: Path) -> None:
    source = open_source("folder", write_tree(tmp_path, {"bus/1.jpg": b"b", "train/2.jpg": b"t", "preview.png": b""}))
    assert contents(source) == [("bus", "bus/1.jpg", b"b"), ("train", "train/2.jpg", b"t")]
    assert list(source.splits) == ["train"]
    assert any("1 image outside" in note for note in source.notes)
    assert any("no validation split" in note for note in source.notes)


@pytest.mark.parametrize("name", ["valid", "Validation"])
def test_names_of_validation_folders(tmp_path: Path, name: str) -> None:
    write_tree(tmp_path, {"Train/a/1.jpg": b"1", f"{name}/a/2.jpg": b"2"})
    assert contents(open_source("folder", tmp_path), "val") == [("a", f"{name}/a/2.jpg", b"2")]


def test_test_is_a_split_of_its_own_and_unlabeled_test_is_left_out(tmp_path: Path) -> None:
    write_tree(tmp_path, {"train/a/1.jpg": b"1", "test/a/2.jpg": b"2", "val/a/3.jpg": b"3"})
    source = open_source("folder", tmp_path)
    assert contents(source, "val") == [("a", "val/a/3.jpg", b"3")]
    assert contents(source, "test") == [("a", "test/a/2.jpg", b"2")]
    assert source.notes == ("there is one class only: a",)
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    assert list(open_source("folder", tmp_path).splits) == ["train", "test"]
    other = write_tree(tmp_path / "other", {"train/a/1.jpg": b"1", "test/unknown/2.jpg": b"2"})
    source = open_source("folder", other)
    assert list(source.splits) == ["train"]
    assert "test/ has none of the training classes: 1 image left out" in source.notes
    flat = write_tree(tmp_path / "flat", {"train/a/1.jpg": b"1", "test/2.jpg": b"2"})
    assert list(open_source("folder", flat).splits) == ["train"]


def test_links_and_odd_names(tmp_path: Path) -> None:
    outside = write_tree(tmp_path / "outside", {"x.jpg": b"linked", "dog/1.jpg": b"in a linked folder"})
    root = write_tree(tmp_path / "root", {"train/cat/" + "n" * 200 + ".jpg": b"long"})
    (root / "train/cat/link.jpg").symlink_to(outside / "x.jpg")
    (root / "train/dog").symlink_to(outside / "dog")
    (root / "train/cat/round").symlink_to(root / "train")  # for ever, if followed blindly
    (root / "train/cat/itself").symlink_to("itself")
    Path(os.fsdecode(os.fsencode(root / "train/cat") + b"/\xff\n.jpg")).write_bytes(b"not UTF-8")
    source = open_source("folder", root)
    found = {name: data for _, name, data in contents(source)}
    assert found["train/cat/link.jpg"] == b"linked"
    assert found["train/dog/1.jpg"] == b"in a linked folder"
    assert found["train/cat/\\udcff\\n.jpg"] == b"not UTF-8"
    assert len(found) == 4
    for target in (outside / "nothing", "gone.jpg"):
        (root / "train/cat/gone.jpg").unlink(missing_ok=True)
        (root / "train/cat/gone.jpg").symlink_to(target)
        source = open_source("folder", root)
        (gone,) = [entry for entry in source.splits["train"] if "gone" in entry.name]
        with pytest.raises(BadImageError, match=f"a link to {target}, which does not exist"):
            source.read(gone)


def test_links_inside_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "linked.tar", "w") as archive:
        for name, kind, target in (
            ("train/a/1.jpg", tarfile.REGTYPE, ""),
            ("train/b/hard.jpg", tarfile.LNKTYPE, "train/a/1.jpg"),
            ("train/b/soft.jpg", tarfile.SYMTYPE, "../a/1.jpg"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, 3 * (kind == tarfile.REGTYPE)
            archive.addfile(member, io.BytesIO(b"abc"))
    assert [data for _, _, data in contents(open_source("folder", tmp_path / "linked.tar"))] == [b"abc"] * 3


def fractions(tmp_path: Path, sizes: list[int], fraction: float) -> tuple[OpenedSource, list[int], list[int]]:
    files = {f"c{label}/{number}.jpg": b"x" for label, size in enumerate(sizes) for number in range(size)}
    path = tmp_path / "set.tar"
    path.write_bytes(tar_bytes(files))
    source = open_source("folder", path, val_fraction=fraction)
    counts = [
        np.bincount([entry.label for entry in source.splits[split]], minlength=len(sizes)).tolist()
        for split in ("train", "val")
    ]
    return source, *counts


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=4), fraction=st.floats(0.01, 0.99))
def test_val_fraction_takes_its_share_of_every_class(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], fraction: float
) -> None:
    source, train, val = fractions(tmp_path_factory.mktemp("fraction"), sizes, fraction)
    assert [a + b for a, b in zip(train, val, strict=True)] == sizes
    assert all(train)
    for size, taken in zip(sizes, val, strict=True):
        assert taken == min(size - 1, max(1, math.floor(size * fraction + 0.5)))
    names = [entry.name for split in source.splits.values() for entry in split]
    assert len(set(names)) == sum(sizes)
    assert [e.name for e in source.splits["train"]] == sorted(e.name for e in source.splits["train"])


def test_val_fraction_depends_on_names_alone(tmp_path: Path) -> None:
    small, *_ = fractions(tmp_path, [40], 0.25)
    chosen = {entry.name for entry in small.splits["val"]}
    assert len(chosen) == 10
    large, *_ = fractions(tmp_path, [40, 40, 7], 0.25)
    assert {entry.name for entry in large.splits["val"] if entry.label == 0} == chosen
    under_train = write_tree(tmp_path / "tree", {f"train/c0/{number}.jpg": b"x" for number in range(40)})
    moved = open_source("folder", under_train, val_fraction=0.25)
    assert {entry.name.removeprefix("train/") for entry in moved.splits["val"]} == chosen
    assert chosen != {f"c0/{number}.jpg" for number in range(10)}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no images in class folders.*found: nothing"),
        ({"train/cat/notes.txt": b"", "train/dog/notes.txt": b""}, "holds no images.*2 files not images by name"),
        ({"1.jpg": b"", "2.jpg": b""}, "no images in class folders.*2 images outside class folders"),
        ({"train/cat/1.jpg": b"", "train/dog/1.txt": b""}, "1 of 2 classes have no images.*dog"),
        ({"train/cat/1.jpg": b"", "val/cow/1.jpg": b""}, "1 class that train/ has not.*cow"),
        ({"val/cat/1.jpg": b""}, "no training images.*no train/"),
        ({"train/cat.1.jpg": b"", "test1/2.jpg": b""}, "named like splits.*found: test1, train"),
        ({"images/train/1.jpg": b"", "images/val/2.jpg": b""}, "named like splits.*found: train, val"),
        ({"one/train/a/1.jpg": b"", "two/train/a/2.jpg": b""}, "several folders hold a training set.*one/, two/"),
    ],
)
def test_trees_that_will_not_do(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    with pytest.raises(UserError, match=f"(?s){words}"):
        open_source("folder", write_tree(tmp_path, files))


@pytest.mark.parametrize("kind", ["imagenet", "cifar10", "cifar100", "folder"])
def test_places_that_will_not_do(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_source(kind, tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no"):
        open_source(kind, tmp_path)
    (tmp_path / "text.tar").write_text("I am not a tar. " * 100)
    with pytest.raises(UserError, match=r"(?s)no archive.*found: a file that begins with b'I am not"):
        open_source(kind, tmp_path / "text.tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(UserError, match="no archive"):
        open_source(kind, tmp_path / "empty.tar")


def test_requests_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no kind of source called svhn"):
        open_source("svhn", tmp_path)
    with pytest.raises(UserError, match="needs a folder"):
        open_source("cifar10", None)
    with pytest.raises(UserError, match="0 to 1"):
        open_source("folder", tmp_path, val_fraction=1.0)
    with pytest.raises(UserError, match="has a validation and a test split already"):
        open_source("folder", write_tree(tmp_path, TREE | {"test/dog/8.jpg": b""}), val_fraction=0.1)
    with pytest.raises(UserError, match="seed of the validation split"):
        open_source("demo", None, val_fraction=0.1, val_seed=-1)


@pytest.mark.parametrize("cut", [100, 600, 1024, 1500])
def test_cut_tars_are_refused(tmp_path: Path, cut: int) -> None:
    data = tar_bytes({f"c/{number}.jpg": b"x" * 1000 for number in range(5)})
    end = 5 * 1536  # then two blocks of zeros and padding
    (tmp_path / "cut.tar").write_bytes(data[: end - cut])
    with pytest.raises(DeitfastError, match=r"cut\.tar is damaged"):
        open_source("folder", tmp_path / "cut.tar")


def test_overwritten_archives_are_refused(tmp_path: Path) -> None:
    data = bytearray(tar_bytes({f"c/{number}.jpg": b"x" * 1000 for number in range(5)}))
    data[3 * 1536 : 3 * 1536 + 512] = b"?" * 512
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(DeitfastError, match="no tar header at byte 4608"):
        open_source("folder", tmp_path / "bad.tar")
    path = pack("zip", {"c/1.jpg": b"x" * 100, "c/2.jpg": b"y" * 100}, tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(b"x" * 100) + 50] ^= 1
    path.write_bytes(data)
    source = open_source("folder", path)
    with pytest.raises(OSError, match="wrong checksum"):
        source.read(source.splits["train"][0])
    assert source.read(source.splits["train"][1]) == b"y" * 100
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DeitfastError, match="damaged"):
        open_source("folder", path)


def test_files_that_shrink_after_indexing(tmp_path: Path) -> None:
    source = open_source("folder", write_tree(tmp_path, {"c/1.jpg": b"12345"}))
    (tmp_path / "c/1.jpg").write_bytes(b"123")
    with pytest.raises(OSError, match="ends 2 bytes too early"):
        source.read(source.splits["train"][0])
