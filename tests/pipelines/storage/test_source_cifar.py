"""CIFAR-10 and CIFAR-100 out of every official archive, and refusals of what only looks like one."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import DeitfastError, UserError
from pipelines.storage.sources.factory import open_source
from pipelines.storage.sources.opened_source import OpenedSource
from tests.helpers.archives import contents, tar_bytes, write_tree

TEN = [f"data_batch_{number}" for number in range(1, 6)]
COARSE = tuple(f"kind {number}".replace(" ", "_") for number in range(20))
NAMES = {"cifar10": ["airplane", "automobile", "bird"], "cifar100": ["apple", "aquarium_fish", "baby", "bear"]}


def drawn(kind: str) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Images uint8 [N, 3072] (planes) and labels of each batch."""
    rng = np.random.default_rng(len(kind))
    batches = [*TEN, "test_batch"] if kind == "cifar10" else ["train", "test"]
    count = len(NAMES[kind])
    return {name: (rng.integers(0, 256, (4, 3072), np.uint8), rng.integers(0, count, 4).tolist()) for name in batches}


def old_pickle(value: object) -> bytes:
    """What Python 2 and numpy 1 wrote in 2009, opcode by opcode: byte strings, and align=0 in the dtype."""

    def opcodes(value: object) -> bytes:
        match value:
            case str() | bytes():
                data = value.encode() if isinstance(value, str) else value
                return b"T" + struct.pack("<i", len(data)) + data
            case int():
                return b"J" + struct.pack("<i", value)
            case list():
                return b"](" + b"".join(map(opcodes, value)) + b"e"
            case dict():
                return b"}(" + b"".join(opcodes(key) + opcodes(item) for key, item in value.items()) + b"u"
            case np.ndarray():
                empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
                dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN" + opcodes(-1) * 2 + b"K\x00tb"
                shape = b"(" + b"".join(map(opcodes, value.shape)) + b"t"
                return empty + b"(K\x01" + shape + dtype + b"\x89" + opcodes(value.tobytes()) + b"tb"
        raise TypeError(value)

    return b"\x80\x02" + opcodes(value) + b"."


def python_archive(kind: str, dump=old_pickle) -> dict[str, bytes]:
    fine = kind == "cifar100"
    files = {
        name: dump({"data": images, "fine_labels" if fine else "labels": labels, "coarse_labels": [9] * len(labels)})
        for name, (images, labels) in drawn(kind).items()
    }
    meta = {"fine_label_names" if fine else "label_names": NAMES[kind], "num_vis": 3072}
    meta |= {"coarse_label_names": list(COARSE)} if fine else {}
    return files | {"meta" if fine else "batches.meta": dump(meta)}


def binary_archive(kind: str) -> dict[str, bytes]:
    fine = kind == "cifar100"
    files = {
        f"{name}.bin": b"".join(
            b"\x09" * fine + bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)
        )
        for name, (images, labels) in drawn(kind).items()
    }
    names = "\n".join(NAMES[kind]).encode() + b"\n\n"
    coarse = {"coarse_label_names.txt": "\n".join(COARSE).encode()} if fine else {}
    return files | coarse | {"fine_label_names.txt" if fine else "batches.meta.txt": names}


FOLDERS = {
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar100", "python"): "cifar-100-python",
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar100", "binary"): "cifar-100-binary",
}


def place(kind: str, form: str, shape: str, root: Path) -> Path:
    """Write an archive of the given form and return what the user would name."""
    files = python_archive(kind) if form == "python" else binary_archive(kind)
    folder, stem = FOLDERS[kind, form], f"{kind.replace('cifar', 'cifar-')}-{form}"
    packed = {f"{folder}/{name}": data for name, data in (files | {"readme.html": b""}).items()}
    if shape == "folder":
        return write_tree(root, packed) / folder
    if shape == "files alone":
        return write_tree(root / "anywhere", files)
    if shape == "parent of folder":
        return write_tree(root, packed)
    end, mode = (".tar", "w") if shape == "tar" else (".tar.gz", "w:gz")
    (root / (stem + end)).write_bytes(tar_bytes(packed, mode))
    return root if shape == "parent of tar.gz" else root / (stem + end)


def check(source: OpenedSource, kind: str) -> None:
    assert source.kind == kind
    assert source.classes == tuple(NAMES[kind])
    batches = list(drawn(kind).items())
    for split, part in (("train", batches[:-1]), ("val", batches[-1:])):
        images = np.concatenate([images for _, (images, _) in part]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        entries = source.splits[split]
        read = [np.asarray(source.read(entry)) for entry in entries]
        assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image in read)
        assert np.array_equal(np.stack(read), images)
        assert [entry.label for entry in entries] == [label for _, (_, labels) in part for label in labels]
        assert [entry.name.split("#")[1] for entry in entries] == [*"0123"] * len(part)


@pytest.mark.parametrize("shape", ["folder", "files alone", "parent of folder", "tar", "tar.gz", "parent of tar.gz"])
@pytest.mark.parametrize(("kind", "form"), FOLDERS)
def test_every_official_archive(tmp_path: Path, kind: str, form: str, shape: str) -> None:
    path = place(kind, form, shape, tmp_path)
    source = open_source(kind, path, scratch=tmp_path / "scratch")
    check(source, kind)
    check(pickle.loads(pickle.dumps(source)), kind)
    source.close()
    assert not any((tmp_path / "scratch").glob("*"))


@pytest.mark.parametrize("form", ["python", "binary"])
def test_coarse_labels(tmp_path: Path, form: str) -> None:
    path = place("cifar100", form, "tar.gz", tmp_path)
    source = open_source("cifar100", path, scratch=tmp_path / "scratch", coarse=True)
    assert source.classes == COARSE
    assert [entry.label for entry in source.splits["train"]] == [9] * 4
    assert source.origin.endswith(", coarse labels")
    fine = open_source("cifar100", path, scratch=tmp_path / "scratch")
    assert len(fine.classes) == len(NAMES["cifar100"])
    for one, other in zip(source.splits["train"], fine.splits["train"], strict=True):
        assert np.array_equal(source.read(one), fine.read(other))
    source.close()
    fine.close()


def test_coarse_labels_are_an_archives(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cifar10 has no coarse labels"):
        open_source("cifar10", tmp_path, coarse=True)
    tree = write_tree(tmp_path, {"train/cat/1.png": b"1", "test/cat/3.png": b"3"})
    with pytest.raises(UserError, match="has no coarse labels: an image tree"):
        open_source("cifar100", tree, coarse=True)


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_pickles_of_today(tmp_path: Path, protocol: int) -> None:
    files = python_archive("cifar10", lambda value: pickle.dumps(value, protocol))
    check(open_source("cifar10", write_tree(tmp_path / "py", files), scratch=tmp_path), "cifar10")


def test_trees(tmp_path: Path) -> None:
    write_tree(tmp_path, {"train/cat/1.png": b"1", "train/ape/2.png": b"2", "test/cat/3.png": b"3"})
    source = open_source("cifar10", tmp_path)
    assert source.kind == "cifar10"
    assert source.classes == ("ape", "cat")
    assert contents(source, "val") == [("cat", "test/cat/3.png", b"3")]


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch owned",)


@pytest.mark.parametrize("dangerous", [Evil(), np.load, os.path.join, np.dtype("O").type])
def test_pickles_that_name_functions_are_refused(tmp_path: Path, dangerous: object, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = python_archive("cifar10") | {"data_batch_2": pickle.dumps({"data": dangerous, "labels": [1]})}
    with pytest.raises(DeitfastError, match=r"(?s)data_batch_2 is damaged.*which no CIFAR archive does"):
        open_source("cifar10", write_tree(tmp_path / "py", files))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("data_batch_3", b"\x80\x02}", "data_batch_3 is damaged"),
        ("data_batch_3", old_pickle([1]), "expected: a pickled dict"),
        ("data_batch_3", old_pickle({"labels": [1]}), "found: no array"),
        ("data_batch_3", old_pickle({"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]}), r"\(2, 3071\)"),
        ("data_batch_3", old_pickle({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}), "expected: 2 labels"),
        ("data_batch_3", old_pickle({"data": np.zeros((1, 3072), np.uint8), "labels": [3]}), "labels up to 3"),
        ("batches.meta", b"nonsense", "batches.meta is damaged"),
        ("data_batch_3.bin", b"\0" * 3072, "a multiple of 3073 bytes"),
        ("data_batch_3.bin", b"", "found: 0 bytes"),
        ("data_batch_3.bin", b"\x03" * 3073, "labels up to 3"),
    ],
)
def test_damaged_batches_are_named(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    files = binary_archive("cifar10") if name.endswith(".bin") else python_archive("cifar10")
    with pytest.raises(DeitfastError, match=f"(?s){words}"):
        open_source("cifar10", write_tree(tmp_path / "c", files | {name: data}), scratch=tmp_path / "scratch")
    assert not any((tmp_path / "scratch").glob("*"))


def test_incomplete_and_confused_archives(tmp_path: Path) -> None:
    files = python_archive("cifar10")
    del files["data_batch_4"], files["batches.meta"]
    with pytest.raises(UserError, match=r"incomplete: data_batch_4, batches\.meta missing"):
        open_source("cifar10", write_tree(tmp_path / "ten", files))
    hundred = write_tree(tmp_path / "hundred", binary_archive("cifar100"))
    with pytest.raises(UserError, match=r"(?s)holds cifar100.*expected: cifar10"):
        open_source("cifar10", hundred)
    with pytest.raises(
        UserError, match=r"(?s)holds no cifar100.*cifar-100-python\.tar\.gz or cifar-100-binary\.tar\.gz"
    ):
        open_source("cifar100", write_tree(tmp_path / "other", {"train": b"a file", "b.txt": b""}))
