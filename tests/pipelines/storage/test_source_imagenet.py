"""ImageNet in the shapes that people have it in: the same images, order and labels out of all of them."""

import contextlib
import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from pipelines.errors import DeitfastError, UserError
from pipelines.storage.sources.factory import open_source
from pipelines.storage.sources.imagenet_labels import read_meta
from pipelines.storage.sources.opened_source import OpenedSource
from tests.helpers.archives import contents, tar_bytes, write_tree

WNIDS = ["n01440764", "n01443537", "n02084071"]
TRAIN = {
    wnid: {f"{wnid}_{number}.JPEG": f"{wnid} {number}".encode() for number in (10, 2, 33)} for wnid in reversed(WNIDS)
}
VAL = {f"ILSVRC2012_val_{number:08d}.JPEG": f"val {number}".encode() for number in range(1, 6)}
VAL_WNIDS = [WNIDS[place] for place in (2, 0, 1, 1, 0)]
IDS = {"n02084071": 1, "n01443537": 2, "n01440764": 3}  # the official numbers do not follow the wnids
EXPECTED_TRAIN = sorted((wnid, f"train/{wnid}/{name}", data) for wnid in TRAIN for name, data in TRAIN[wnid].items())
EXPECTED_VAL = list(zip(VAL_WNIDS, VAL.values(), strict=True))


def meta_mat(compressed: bool = True) -> bytes:
    """The devkit's meta.mat in small, with the kinds of fields that it has."""
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("children", "O"), ("height", "O")]
    synsets = np.zeros((len(IDS) + 1, 1), kinds)
    for row, (wnid, number) in enumerate([*IDS.items(), ("n00001740", 1001)]):
        synsets[row, 0] = (np.float64(number), wnid, "a fish, perhaps", "ü" * row, np.arange(row + 0.0), np.uint8(7))
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": synsets}, do_compression=compressed)
    return buffer.getvalue()


def ground_truth() -> bytes:
    return "".join(f"{IDS[wnid]}\n" for wnid in VAL_WNIDS).encode()


def devkit() -> bytes:
    files = {"data/meta.mat": meta_mat(), "data/ILSVRC2012_validation_ground_truth.txt": ground_truth()}
    return tar_bytes({f"ILSVRC2012_devkit_t12/{name}": data for name, data in files.items()}, "w:gz")


LABEL_FILES = {
    "devkit": {"ILSVRC2012_devkit_t12.tar.gz": devkit()},
    "devkit, extracted": {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta_mat(compressed=False),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": ground_truth(),
    },
    "synsets": {"val_synset_labels.txt": "\n".join(VAL_WNIDS).encode()},
    "tensorflow": {"imagenet_2012_validation_synset_labels.txt": "\r\n".join([*VAL_WNIDS, ""]).encode()},
    "caffe": {
        "val.txt": "".join(
            f"{name} {WNIDS.index(wnid)}\n" for name, wnid in sorted(zip(VAL, VAL_WNIDS, strict=True), reverse=True)
        ).encode()
    },
    "kaggle": {
        "LOC_val_solution.csv": b"ImageId,PredictionString\n"
        + "".join(
            f"{name.removesuffix('.JPEG')},{wnid} 85 1 499 272 {wnid} 1 2 3 4 \n"
            for name, wnid in zip(VAL, VAL_WNIDS, strict=True)
        ).encode()
    },
}
NESTED = {f"{wnid}.tar": tar_bytes(images) for wnid, images in TRAIN.items()}
TREE = {f"train/{wnid}/{name}": data for wnid, images in TRAIN.items() for name, data in images.items()}
FLAT_VAL = {f"val/{name}": data for name, data in VAL.items()}
CLASSED_VAL = {f"val/{wnid}/{name}": data for wnid, (name, data) in zip(VAL_WNIDS, sorted(VAL.items()), strict=True)}
TARS = {"ILSVRC2012_img_train.tar": tar_bytes(NESTED), "ILSVRC2012_img_val.tar": tar_bytes(VAL)}


def check(source: OpenedSource, train: list = EXPECTED_TRAIN) -> None:
    assert source.classes == tuple(WNIDS)
    assert contents(source) == train
    assert [(wnid, data) for wnid, _, data in contents(source, "val")] == EXPECTED_VAL


@pytest.mark.parametrize("labels", LABEL_FILES)
def test_official_tars_with_every_file_of_labels(tmp_path: Path, labels: str) -> None:
    source = open_source("imagenet", write_tree(tmp_path, TARS | LABEL_FILES[labels]))
    check(source)
    assert source.splits["val"][0].name == "val/ILSVRC2012_val_00000001.JPEG"
    check(pickle.loads(pickle.dumps(source)))


SYNSETS = LABEL_FILES["synsets"]
KAGGLE = {f"ILSVRC/Data/CLS-LOC/{name}": data for name, data in (TREE | FLAT_VAL).items()}
KAGGLE |= LABEL_FILES["kaggle"] | {"ILSVRC/Data/CLS-LOC/test/1.JPEG": b"", "ILSVRC/Annotations/CLS-LOC/1.xml": b""}
LAYOUTS = {
    "tree": TREE | CLASSED_VAL,
    "tree with flat val": TREE | FLAT_VAL | SYNSETS,
    "tree beside its tars": TREE | TARS | SYNSETS,
    "train tree, val tar": {"ILSVRC2012_img_val.tar": TARS["ILSVRC2012_img_val.tar"]} | TREE | SYNSETS,
    "one class extracted, another's tar gone": {name: data for name, data in TREE.items() if WNIDS[2] not in name}
    | {f"train/{wnid}.tar": NESTED[f"{wnid}.tar"] for wnid in WNIDS[1:]}
    | CLASSED_VAL,
    "val half sorted": TREE | dict([*CLASSED_VAL.items()][:2]) | dict([*FLAT_VAL.items()][2:]) | SYNSETS,
    "class tars not yet extracted": {f"train/{name}": data for name, data in NESTED.items()} | CLASSED_VAL,
    "kaggle": KAGGLE,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str) -> None:
    check(open_source("imagenet", write_tree(tmp_path, LAYOUTS[layout])))


@pytest.mark.parametrize("layout", ["tree", "tree with flat val", "kaggle"])
def test_layouts_inside_a_tar(tmp_path: Path, layout: str) -> None:
    (tmp_path / "all.tar").write_bytes(tar_bytes(LAYOUTS[layout]))
    check(open_source("imagenet", tmp_path / "all.tar"))


def test_official_folder_names(tmp_path: Path) -> None:
    names = {name.replace("train/", "ILSVRC2012_img_train/", 1): data for name, data in TREE.items()}
    names |= {name.replace("val/", "ILSVRC2012_img_val/", 1): data for name, data in FLAT_VAL.items()}
    expected = [(wnid, "ILSVRC2012_img_" + name, data) for wnid, name, data in EXPECTED_TRAIN]
    check(open_source("imagenet", write_tree(tmp_path, names | SYNSETS)), expected)


def test_classes_beside_the_validation_folder(tmp_path: Path) -> None:
    names = {name.removeprefix("train/"): data for name, data in TREE.items()}
    expected = [(wnid, name.removeprefix("train/"), data) for wnid, name, data in EXPECTED_TRAIN]
    check(open_source("imagenet", write_tree(tmp_path, names | FLAT_VAL | SYNSETS)), expected)


def test_the_training_tar_itself_finds_what_lies_beside_it(tmp_path: Path) -> None:
    write_tree(tmp_path, TARS | SYNSETS)
    check(open_source("imagenet", tmp_path / "ILSVRC2012_img_train.tar"))


def test_class_tars_without_end_marks_do_not_run_into_each_other(tmp_path: Path) -> None:
    whole = [sum(512 + 512 * -(-len(data) // 512) for data in images.values()) for images in TRAIN.values()]
    bare = {name: data[:size] for (name, data), size in zip(NESTED.items(), whole, strict=True)}
    check(
        open_source("imagenet", write_tree(tmp_path, {**TARS, **SYNSETS, "ILSVRC2012_img_train.tar": tar_bytes(bare)}))
    )


def test_parts_of_imagenet_work_with_a_word(tmp_path: Path) -> None:
    some = {name: data for name, data in (TREE | FLAT_VAL | SYNSETS).items() if WNIDS[1] not in name}
    source = open_source("imagenet", write_tree(tmp_path / "two classes", some))
    assert source.classes == (WNIDS[0], WNIDS[2])
    assert [data for *_, data in contents(source, "val")] == [b"val 1", b"val 2", b"val 5"]
    assert source.notes == (
        "2 validation images left out: their classes are not in the training set",
        "2 of ImageNet's 1,000 classes are here",
    )
    source = open_source("imagenet", write_tree(tmp_path / "no val", TREE))
    assert list(source.splits) == ["train"]
    assert any("no validation split" in note for note in source.notes)
    spilt = open_source("imagenet", write_tree(tmp_path / "spilt", TREE | {"train/n02084071_1.JPEG": b""}))
    assert "1 image outside train/<wnid>/ left out" in spilt.notes
    source = open_source("imagenet", tmp_path / "no val", val_fraction=0.3)
    assert [entry.label for entry in source.splits["val"]] == [0, 1, 2]


def test_meta_mat_as_scipy_reads_it() -> None:
    for compressed in (True, False):
        assert read_meta(meta_mat(compressed)) == {number: wnid for wnid, number in IDS.items()} | {1001: "n00001740"}


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        (FLAT_VAL, UserError, r"nothing that says their classes.*devkit_t12\.tar\.gz.*val_synset_labels.*found: none"),
        (
            FLAT_VAL | {"ILSVRC2012_validation_ground_truth.txt": ground_truth()},
            UserError,
            r"found: ILSVRC2012_validation_ground_truth\.txt without the meta\.mat",
        ),
        (FLAT_VAL | {"val_synset_labels.txt": b"n01440764\nfish\n"}, DeitfastError, "'fish' in line 2"),
        (FLAT_VAL | {"val_synset_labels.txt": b"n01440764\n" * 4}, UserError, "00000005.JPEG has no label"),
        (FLAT_VAL | {"val.txt": b"ILSVRC2012_val_00000001.JPEG 999\n"}, UserError, "expected: 1,000 training classes"),
        (FLAT_VAL | {"val.txt": b"hello\n"}, DeitfastError, "'hello' in line 1"),
        (FLAT_VAL | {"ILSVRC2012_devkit_t12.tar.gz": devkit()[:300]}, DeitfastError, "cannot be understood"),
        (
            FLAT_VAL | {"ILSVRC2012_devkit_t12.tar.gz": tar_bytes({"a": b""}, "w:gz")},
            DeitfastError,
            r"no .* and no meta\.mat",
        ),
        (
            FLAT_VAL | {"ILSVRC2012_validation_ground_truth.txt": b"1 2 9", "meta.mat": meta_mat()},
            DeitfastError,
            r"found: KeyError\(9\)",
        ),
        (
            FLAT_VAL | {"ILSVRC2012_validation_ground_truth.txt": b"1 2 3", "meta.mat": b"hello"},
            DeitfastError,
            "no little-endian MATLAB 5 file",
        ),
        ({"val/other.JPEG": b"", **SYNSETS}, UserError, r"val/other\.JPEG has no label.*numbered 1 to 5"),
        (
            {"val/images/1.JPEG": b"", "val/val_annotations.txt": b""},
            UserError,
            "of no class that the training.*images",
        ),
        ({"train/n02000000/notes.txt": b""}, UserError, "1 of 4 classes have no images.*n02000000"),
    ],
)
def test_what_is_wrong_beside_a_good_train(tmp_path: Path, files: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=f"(?s){words}"):
        open_source("imagenet", write_tree(tmp_path, TREE | files))


def test_no_training_images(tmp_path: Path) -> None:
    write_tree(tmp_path, {"ILSVRC2012_img_val.tar": TARS["ILSVRC2012_img_val.tar"], "readme.txt": b""})
    with pytest.raises(
        UserError, match=r"(?s)no ImageNet training images.*found: ILSVRC2012_img_val\.tar, readme\.txt"
    ):
        open_source("imagenet", tmp_path)
    flat = write_tree(tmp_path / "flat", {"train/a_1.JPEG": b"", "train/a_2.JPEG": b""})
    with pytest.raises(UserError, match="found: train, with 2 images in none of these"):
        open_source("imagenet", flat)


@pytest.mark.parametrize("cut", [1, 700, 3000, 6000])
def test_a_cut_training_tar_is_refused(tmp_path: Path, cut: int) -> None:
    whole = tar_bytes(NESTED)
    end = sum(512 + len(data) for data in NESTED.values())
    write_tree(tmp_path, {"ILSVRC2012_img_train.tar": whole[: end - cut]})
    with pytest.raises(DeitfastError, match="is damaged or was not downloaded to its end"):
        open_source("imagenet", tmp_path)


@pytest.mark.parametrize("at", range(128, 700, 37))
def test_a_damaged_meta_mat_raises_nothing_unforeseen(at: int) -> None:
    data = bytearray(meta_mat(compressed=False))
    data[at : at + 4] = struct.pack("<I", 0x7FFFFFFF)
    with contextlib.suppress(ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError):
        read_meta(bytes(data))
