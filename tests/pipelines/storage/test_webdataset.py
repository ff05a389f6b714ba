"""WebDataset shards of others as a source: keys, classes, splits; and our own shards, read as anybody's."""

import json
from pathlib import Path

import pytest

from pipelines.errors import DeitfastError, UserError
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.formats.format import named_format
from pipelines.storage.sources.factory import open_source
from tests.helpers.archives import contents, tar_bytes, write_tree
from tests.helpers.sample_images import MemorySource, drawn, entries, jpeg


def shard(labels: list[str | None], *, first: int = 0, ending: str = "cls") -> bytes:
    """Return a tar of images of these labels; None: it says no class."""
    files: dict[str, bytes] = {}
    for number, label in enumerate(labels, start=first):
        files[f"{number:06}.jpg"] = b"image %d" % number
        if label is not None:
            files[f"{number:06}.{ending}"] = label.encode()
    return tar_bytes(files)


def test_shards_in_one_folder_say_their_split(tmp_path: Path) -> None:
    files = {
        "imagenet1k-train-0000.tar": shard(["1", "0", "1"]),
        "imagenet1k-train-0001.tar": shard(["10", "2"], first=3),
        "imagenet1k-validation-00.tar": shard(["2", "10"]),
    }
    source = open_source("wds", write_tree(tmp_path / "s", files))
    assert source.classes == ("0", "1", "2", "10")  # as numbers
    assert contents(source) == [
        ("0", "imagenet1k-train-0000.tar/000001.jpg", b"image 1"),
        ("1", "imagenet1k-train-0000.tar/000000.jpg", b"image 0"),
        ("1", "imagenet1k-train-0000.tar/000002.jpg", b"image 2"),
        ("2", "imagenet1k-train-0001.tar/000004.jpg", b"image 4"),
        ("10", "imagenet1k-train-0001.tar/000003.jpg", b"image 3"),
    ]
    assert [name for name, *_ in contents(source, "val")] == ["2", "10"]
    assert source.notes == ("3 shards: 4 classes, 5 train + 2 val images",)


@pytest.mark.parametrize("names", ["classnames.txt", "classes.txt"])
def test_a_text_names_the_numbers(tmp_path: Path, names: str) -> None:
    """In the text's order, not the alphabet's, so that a network's outputs fit."""
    files = {"train/0.tar": shard(["0", "1", "2"]), "test/0.tar": shard(["1"]), names: b"zebra\ncat\nape\n"}
    source = open_source("wds", write_tree(tmp_path / "s", files))
    assert source.classes == ("zebra", "cat", "ape")
    assert [(name, data) for name, _, data in contents(source, "test")] == [("cat", b"image 0")]


def test_names_that_are_no_names_leave_the_numbers(tmp_path: Path) -> None:
    for text in (b"crane\ncrane\n", b"crane\n\n"):  # ImageNet has two cranes
        source = open_source("wds", write_tree(tmp_path / "s", {"0.tar": shard(["0", "1"]), "classes.txt": text}))
        assert source.classes == ("0", "1")


def test_the_nearest_folder_says_the_split(tmp_path: Path) -> None:
    files = {"my-test-data/train/0.tar": shard(["0"]), "my-test-data/0-val.tar": shard(["0", "0"])}
    source = open_source("wds", write_tree(tmp_path / "s", files))
    assert {split: len(images) for split, images in source.splits.items()} == {"train": 1, "val": 2}


def test_a_key_ends_at_the_first_dot(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes({"a.b/1.input.jpg": b"x", "a.b/1.cls": b"5", "a.b/1.seg.txt": b""}))
    assert open_source("wds", tmp_path / "x.tar").classes == ("5",)


@pytest.mark.parametrize(
    ("labels", "ending", "classes"),
    [
        (["7\n", " 007 "], "cls", ("7",)),
        (["cat", "dog"], "cls", ("cat", "dog")),
        ([json.dumps({"label": 3, "width": 9}), json.dumps({"cls": "4"})], "json", ("3", "4")),
    ],
)
def test_classes_as_programs_write_them(
    tmp_path: Path, labels: list[str | None], ending: str, classes: tuple[str, ...]
) -> None:
    (tmp_path / "x.tar").write_bytes(shard(labels, ending=ending))
    assert open_source("wds", tmp_path / "x.tar").classes == classes


def test_images_of_no_class_are_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(shard(["0", None, "1"]))
    source = open_source("wds", tmp_path / "x.tar")
    assert len(source.splits["train"]) == 2
    assert "1 image without a class left out" in source.notes


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "captions.tar").write_bytes(shard([None, None]))
    with pytest.raises(UserError, match=r"no images to train on[\s\S]*1 shard with 2 images of no class"):
        open_source("wds", tmp_path / "captions.tar")
    (tmp_path / "val.tar").write_bytes(shard(["0"]))
    with pytest.raises(UserError, match="no images to train on"):
        open_source("wds", tmp_path / "val.tar")
    with pytest.raises(UserError, match="does not exist"):
        open_source("wds", tmp_path / "missing")
    with pytest.raises(UserError, match="no images to train on"):
        open_source("wds", write_tree(tmp_path / "s", {"a/1.jpg": b""}))
    (tmp_path / "cut.tar").write_bytes(shard(["0"])[:700])
    with pytest.raises(DeitfastError):
        open_source("wds", tmp_path / "cut.tar")
    for label in (b"\xff", b"\x80\x02K"):
        (tmp_path / "x.tar").write_bytes(tar_bytes({"1.jpg": b"", "1.cls": label}))
        with pytest.raises(DeitfastError, match=r"1\.cls says no class"):
            open_source("wds", tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(tar_bytes({"1.jpg": b"", "1.json": b"{"}))
    with pytest.raises(DeitfastError, match=r"1\.json says no class"):
        open_source("wds", tmp_path / "x.tar")


def test_who_takes_shards_for_a_folder_is_told(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "s", {"train-0.tar": shard(["0"])})
    for path in (folder, folder / "train-0.tar"):
        with pytest.raises(UserError, match="if these are WebDataset shards: convert wds"):
            open_source("folder", path)


def test_our_own_shards_are_shards_like_any_other(tmp_path: Path) -> None:
    """Without our index and dataset.json, the same images come out: JPEGs as they are, PNGs as their pixels."""
    images = [jpeg(40, 48, seed=n) for n in range(9)] + [drawn(8, 9, seed=n) for n in range(4)]
    source = MemorySource(splits={"train": entries(images)})
    convert(source, tmp_path / "d", ConvertOptions(form=named_format("wds", 10_000), workers=1))
    shards = {path.name: path.read_bytes() for path in (tmp_path / "d" / "train.wds").glob("*.tar")}
    names = {"classes.txt": (tmp_path / "d" / "classes.txt").read_bytes()}
    assert len(shards) > 1
    again = open_source("wds", write_tree(tmp_path / "s", shards | names))
    assert again.classes == source.classes
    spec = convert(again, tmp_path / "e", ConvertOptions(workers=1))
    first = convert(source, tmp_path / "f", ConvertOptions(workers=1))
    assert spec.splits["train"].counts == first.splits["train"].counts
    assert spec.splits["train"].converted == first.splits["train"].converted
