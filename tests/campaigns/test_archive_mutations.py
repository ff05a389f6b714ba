"""Damaged archives and label files: each is read or refused with a message, never an exception of another kind."""

import io
import random
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import DeitfastError
from pipelines.storage.sources.factory import open_source
from pipelines.storage.transcode import BadImageError
from tests.campaigns.damage import BYTES, ends
from tests.helpers.archives import contents, tar_bytes, write_tree
from tests.helpers.parquet import image_table, write_table

FILES = {f"train/{c}/{n}.jpg": bytes([n]) * 300 for c in "ab" for n in range(3)}
NUMBERS = [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"7" * 11 + b"\0", b"\x80" + b"\0" * 10 + b"\1", b"-1         \0"]


def archives() -> dict[str, bytes]:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    tar = tar_bytes(FILES)
    modes = {"gz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}
    compressed = {kind: tar_bytes(FILES, mode) for kind, mode in modes.items()}
    return {"tar": tar, "joined": tar + tar, "zip": buffer.getvalue(), **compressed}


def mutated(rng: np.random.Generator, original: bytes) -> bytes:
    data, kind = bytearray(original), int(rng.integers(6))
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(data)))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at : at + 8] = rng.integers(0, 256, 8, dtype=np.uint8).tobytes()
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 600))]
        elif kind == 3:
            data[at:at] = bytes(int(rng.integers(1, 600)))
        elif kind == 4:  # a number in a tar's header, with the right checksum
            head = at // 512 * 512
            data[head + 124 : head + 136] = NUMBERS[int(rng.integers(len(NUMBERS)))]
            data[head + 156 : head + 157] = bytes([int(rng.choice(list(b"0157LKxgS3")))])
            data[head + 148 : head + 156] = b" " * 8
            data[head + 148 : head + 156] = b"%06o\0 " % sum(data[head : head + 512])
        else:  # a 32-bit number of a zip's
            data[at : at + 4] = int(rng.choice([0, 0xFFFFFFFF, 0x7FFFFFFF, 1])).to_bytes(4, "little")
        data = data or bytearray(b"x")
    return bytes(data)


def test_damaged_archives_are_read_or_refused(tmp_path: Path, cases: int) -> None:
    rng, tally = np.random.default_rng(cases), Counter[str]()
    for _ in range(cases):
        name, original = list(archives().items())[int(rng.integers(6))]
        path = tmp_path / f"x.{name}"
        path.write_bytes(mutated(rng, original))
        try:
            source = open_source("folder", path, scratch=tmp_path / "scratch")
            for entries in source.splits.values():
                for entry in entries:
                    source.read(entry)
            tally["read"] += 1
            source.close()
        except (DeitfastError, BadImageError, OSError) as error:
            tally["refused" if str(error) else "refused without a word"] += 1
    assert not any((tmp_path / "scratch").glob("*"))
    assert set(tally) == {"read", "refused"}


def test_damaged_label_files_are_read_or_refused(tmp_path: Path, cases: int) -> None:
    wnids = ["n01440764", "n01443537"]
    names = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, 5)]
    tree = {f"train/{wnid}/{n}.JPEG": b"" for wnid in wnids for n in range(2)} | {f"val/{name}": b"" for name in names}
    labels = {
        "val.txt": "".join(f"{name} {n % 2}\n" for n, name in enumerate(names)).encode(),
        "LOC_val_solution.csv": b"ImageId,PredictionString\n"
        + "".join(f"{name[:-5]},{wnids[n % 2]} 1 2 3 4 \n" for n, name in enumerate(names)).encode(),
        "val_synset_labels.txt": "".join(f"{wnids[n % 2]}\n" for n in range(4)).encode(),
    }
    root, rng, tally = write_tree(tmp_path, tree), np.random.default_rng(cases), Counter[str]()
    for _ in range(cases):
        name, original = list(labels.items())[int(rng.integers(3))]
        (root / name).write_bytes(mutated(rng, original))
        try:
            assert len(open_source("imagenet", root).splits["val"]) <= 4
            tally["read"] += 1
        except DeitfastError as error:
            tally["refused" if str(error) else "refused without a word"] += 1
        (root / name).unlink()
    assert set(tally) == {"read", "refused"}


def test_damaged_label_tables_are_read_or_refused(tmp_path: Path, cases: int) -> None:
    names = list(FILES)
    tables = {
        "l.csv": b"file,label,split\n" + b"".join(f'{name},"{name[6]}",train\n'.encode() for name in names),
        "l.tsv": b"".join(f"{name}\t{name[6]}\n".encode() for name in names),
        "l.jsonl": b"".join(b'{"file_name": "%s", "label": %d}\n' % (name.encode(), n) for n, name in enumerate(names)),
        "l.txt": b"".join(f"{name} {n}\n".encode() for n, name in enumerate(names)),
    }
    root, rng, tally = write_tree(tmp_path / "s", FILES), np.random.default_rng(cases), Counter[str]()
    for _ in range(cases):
        name, original = list(tables.items())[int(rng.integers(4))]
        (tmp_path / name).write_bytes(mutated(rng, original))
        try:
            source = open_source("folder", root, labels=[tmp_path / name])
            assert 1 <= sum(map(len, source.splits.values())) <= len(names)
            tally["read"] += 1
        except DeitfastError as error:
            tally["refused" if str(error) else "refused without a word"] += 1
    assert set(tally) == {"read", "refused"}


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_damaged_parquet_and_arrow_files_are_read_or_refused(tmp_path: Path, cases: int, ending: str) -> None:
    """Neither has checksums: what a changed bit does to an image, its decoder sees or nobody."""
    path, tally = tmp_path / f"x.{ending}", Counter[str]()
    whole = write_table(path, image_table([0, 1, 1, 0, 1, 0, 1] * 10, names=["a", "b"])).read_bytes()
    for case in range(cases):
        draw = random.Random(f"{cases} {case}")
        path.write_bytes(draw.choice((*BYTES, ends, ends))(draw, bytearray(whole)))
        try:
            source = open_source("huggingface", path, scratch=tmp_path / "scratch")
            contents(source)
            source.close()
            tally["read"] += 1
        except DeitfastError as error:
            tally["refused" if path.name in str(error) else str(error)] += 1
    assert not any((tmp_path / "scratch").glob("*"))
    assert set(tally) == {"read", "refused"}
