"""Conversion: what becomes of each kind of image, what is refused, and that interruptions leave no trace."""

import io
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import MemorySource, drawn, encoded, entries, jpeg, pixels
from PIL import Image

from pipelines.errors import Failure, Mistake
from pipelines.spec import DatasetSpec
from pipelines.storage import convert_split
from pipelines.storage.beton import JPEG, RAW, BetonReader
from pipelines.storage.convert import convert
from pipelines.storage.dataset import Dataset, content_fingerprint, read_spec
from pipelines.storage.journal import Journal
from pipelines.storage.pool import in_order
from pipelines.storage.transcode import BadImageError, Codec, Kind, Sample, transcode


def stored(sample: Sample) -> np.ndarray:
    if sample.mode == RAW:
        return np.frombuffer(sample.data, np.uint8).reshape(sample.height, sample.width, 3)
    return pixels(sample.data)


def difference(left: np.ndarray, right: np.ndarray) -> float:
    assert left.shape == right.shape
    return float(np.abs(left.astype(int) - right.astype(int)).mean())


@pytest.mark.parametrize("name", ["colour.JPEG", "progressive.JPEG", "full_chroma.JPEG", "rotated.JPEG"])
def test_colour_jpegs_pass_through(odd, name):
    sample = transcode(odd[name], name, Codec())
    assert sample.data == odd[name]
    assert (sample.height, sample.width) == pixels(odd[name]).shape[:2]
    assert sample.kind & Kind.PASSED
    assert bool(sample.kind & Kind.ROTATED) == (name == "rotated.JPEG")


@pytest.mark.parametrize(
    ("name", "kind", "mode"),
    [
        ("cmyk.JPEG", Kind.REENCODED | Kind.CMYK, JPEG),
        ("really_png.JPEG", Kind.REENCODED | Kind.MISNAMED, JPEG),
        ("small.png", Kind.RAW, RAW),
        ("small_grey.png", Kind.RAW | Kind.GREY, RAW),
        ("palette.png", Kind.REENCODED | Kind.PALETTE, JPEG),
        ("alpha.png", Kind.REENCODED | Kind.ALPHA, JPEG),
        ("bitmap.bmp", Kind.RAW, RAW),
    ],
)
def test_other_files_become_what_imagefolder_sees(odd, name, kind, mode):
    sample = transcode(odd[name], name, Codec())
    assert sample.kind == kind
    assert sample.mode == mode
    assert difference(stored(sample), pixels(odd[name])) <= (0 if mode == RAW else 3)


def test_grey_jpegs_become_colour_and_keep_their_pixels(odd):
    sample = transcode(odd["grey.JPEG"], "grey.JPEG", Codec())
    assert sample.kind == Kind.REENCODED | Kind.GREY
    assert Image.open(io.BytesIO(sample.data)).mode == "RGB"
    assert difference(stored(sample), pixels(odd["grey.JPEG"])) < 0.1


def test_sixteen_bits_are_scaled_not_clipped(odd):
    deep = np.asarray(Image.open(io.BytesIO(odd["deep.png"]))).astype(float)
    sample = transcode(odd["deep.png"], "deep.png", Codec())
    assert sample.kind == Kind.REENCODED | Kind.GREY | Kind.DEEP
    assert np.abs(stored(sample)[..., 0] - deep * 255 / 65535).mean() < 1
    small = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    scaled = stored(transcode(encoded(Image.fromarray(small), "PNG"), "x.png", Codec()))
    assert scaled[0, :, 1].tolist() == [0, 0, 1, 1, 128, 255]


def test_pixels_are_stored_raw_or_as_jpeg_by_their_size():
    assert stored(transcode(drawn(32, 128), "#1", Codec())).tolist() == drawn(32, 128).tolist()
    assert transcode(drawn(32, 129), "#2", Codec()).mode == JPEG


def test_max_side_shrinks_only_what_is_longer():
    long, short = jpeg(100, 300, 1), jpeg(300, 200, 2)
    shrunk = transcode(long, "x.JPEG", Codec(max_side=200))
    assert (shrunk.height, shrunk.width) == (67, 200)
    assert shrunk.kind == Kind.REENCODED | Kind.SHRUNK
    expected = np.asarray(Image.fromarray(pixels(long)).resize((200, 67), Image.Resampling.BICUBIC))
    assert difference(stored(shrunk), expected) < 4
    assert transcode(short, "x.JPEG", Codec(max_side=300)).data == short


def test_a_given_quality_reencodes_where_that_is_smaller():
    fine, coarse = jpeg(200, 200, 1, quality=98), jpeg(200, 200, 1, quality=30)
    assert len(transcode(fine, "x.JPEG", Codec(quality=80)).data) < len(fine)
    assert transcode(coarse, "x.JPEG", Codec(quality=80)).data == coarse


@pytest.mark.parametrize("codec", [Codec(), Codec(max_side=64), Codec(quality=80)])
@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(["colour.JPEG", "progressive.JPEG", "grey.JPEG", "cmyk.JPEG"]), share=st.floats(0, 0.999))
def test_cut_jpegs_are_refused_wherever_they_are_cut(odd, codec, name, share):
    content = odd[name]
    with pytest.raises(BadImageError):
        transcode(content[: int(share * len(content))], name, codec)
    with pytest.raises(BadImageError):
        transcode(content[:-1], name, codec)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", r"not an image \(it starts with b'<html>"),
        (encoded(drawn(90, 90), "PNG")[:-3000], "truncated|cut|broken"),
        (np.zeros((4, 4), np.uint8), "instead of uint8"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.new("1", (65501, 1)), "PNG"), "65501 pixels"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(content, reason):
    with pytest.raises(BadImageError, match=reason):
        transcode(content, "x.JPEG", Codec())


def test_codecs_out_of_range_are_mistakes():
    for wrong in ({"max_side": 5}, {"max_side": -1}, {"quality": 0}, {"quality": 101}):
        with pytest.raises(Mistake, match="out of range"):
            Codec(**wrong)


def mixed_source(odd: dict[str, bytes], copies: int = 3) -> MemorySource:
    contents = [content for _ in range(copies) for content in odd.values()] + [drawn(32, 32, 3)]
    splits = {"train": entries(contents), "val": entries(contents[:4])}
    return MemorySource(splits=splits)


def test_convert_counts_and_keeps_the_sources_order(odd, tmp_path):
    seen = []
    source = mixed_source(odd)
    spec = convert(source, tmp_path / "d", workers=1, progress=lambda *step: seen.append(step))
    train = spec.splits["train"]
    assert (train.samples, train.counts) == (40, (20, 20))
    assert train.converted == {
        "passed through": 12, "re-encoded": 18, "stored raw": 10, "grey": 9, "CMYK": 3, "16-bit": 3,
        "palette": 3, "transparent": 3, "EXIF-rotated": 3, "named JPEG but not one": 21,
    }  # fmt: skip
    dataset = Dataset.open(tmp_path / "d")
    reader = dataset.split("train")
    assert dataset.spec == spec == read_spec(tmp_path / "d")
    assert reader.labels.tolist() == [entry.label for entry in source.splits["train"]]
    assert [reader.checked_sample(n).tobytes() for n in range(4)] == list(odd.values())[:4]
    assert train.fingerprint == content_fingerprint(reader)
    assert seen[0] == ("train", 0, 40, 0)
    assert ("train", 40, 40) in [step[:3] for step in seen]
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["dataset.json", "train.beton", "val.beton"]


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_bytes_do_not_depend_on_the_workers(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_split, "BATCH_IMAGES", 3)
    for workers in (1, 2):
        convert(mixed_source(odd), tmp_path / str(workers), workers=workers, max_side=100)
    assert contents_of(tmp_path / "1") == contents_of(tmp_path / "2")


def test_bad_files_stop_a_conversion_or_are_skipped(odd, tmp_path):
    files = list(odd.values())[:4]
    contents = [files[0], files[1][:-50], files[2], b"", files[3], b"text"]
    source = MemorySource(splits={"train": entries(contents, labels=[0, 0, 0, 0, 1, 1])})
    with pytest.raises(Mistake, match=r"1\.JPEG: the JPEG stops before its end(.|\n)*--skip-bad"):
        convert(source, tmp_path / "d", workers=1)
    assert not (tmp_path / "d" / "dataset.json").exists()
    spec = convert(source, tmp_path / "d", workers=1, skip_bad=True)
    assert spec.splits["train"].samples == 3
    assert spec.splits["train"].converted["skipped"] == 3
    lines = (tmp_path / "d" / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["1.JPEG", "3.JPEG", "5.JPEG"]
    convert(source, tmp_path / "fresh", workers=1, skip_bad=True)
    assert contents_of(tmp_path / "d") == contents_of(tmp_path / "fresh")


def test_going_on_without_skip_bad_does_not_keep_what_was_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_split, "BATCH_IMAGES", 1)
    monkeypatch.setattr(convert_split, "FLUSH_BYTES", 0)
    contents = [jpeg(30, 30), b"", jpeg(30, 31), OSError(5, "broken disk")]
    source = MemorySource(splits={"train": entries(contents)})
    with pytest.raises(Failure, match=r"3\.JPEG: cannot be read: broken disk"):
        convert(source, tmp_path / "d", workers=1, skip_bad=True)
    seen = []
    for skip_bad in (False, True):  # the digest of the listing goes by name, label and size: this is the same source
        with pytest.raises(Failure) as raised:
            convert(source, tmp_path / "d", workers=1, skip_bad=skip_bad, progress=lambda *step: seen.append(step))
        assert ("1.JPEG: the file is empty" in str(raised.value)) == (not skip_bad)
    assert seen[0] == ("train", 3, 4, 0)


def test_classes_without_images_are_mistakes(tmp_path):
    image = jpeg(20, 20)
    with pytest.raises(Mistake, match=r"1 of 2 classes(.|\n)*none of b"):
        convert(MemorySource(splits={"train": entries([image], labels=[0])}), tmp_path / "d", workers=1)
    assert not (tmp_path / "d").exists()
    source = MemorySource(splits={"train": entries([image, b""], labels=[0, 1])})
    with pytest.raises(Mistake, match="none of b"):
        convert(source, tmp_path / "d", workers=1, skip_bad=True)
    with pytest.raises(Mistake, match="no images found"):
        convert(MemorySource(splits={"train": []}), tmp_path / "e", workers=1)


def test_a_finished_dataset_is_left_alone(odd, tmp_path):
    source = mixed_source(odd, copies=1)
    first = convert(source, tmp_path, workers=1)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert convert(source, tmp_path, workers=1) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    for other, options in ((source, {"max_side": 50}), (mixed_source(odd, copies=2), {})):
        with pytest.raises(Mistake, match="holds another dataset already"):
            convert(other, tmp_path, workers=1, **options)


def test_what_is_in_the_way_is_not_overwritten(odd, tmp_path):
    (tmp_path / "train.beton").write_bytes(b"precious")
    with pytest.raises(Mistake, match="in the way"):
        convert(mixed_source(odd), tmp_path, workers=1)
    assert (tmp_path / "train.beton").read_bytes() == b"precious"
    with pytest.raises(Mistake, match="cannot be the output folder"):
        convert(mixed_source(odd), tmp_path / "train.beton", workers=1)


def test_two_conversions_into_one_folder_are_refused(odd, tmp_path):
    def again(*_):
        with pytest.raises(Mistake, match="another conversion"):
            convert(mixed_source(odd), tmp_path, workers=1)

    convert(mixed_source(odd, copies=1), tmp_path, workers=1, progress=again)


SOURCE = """
import sys, time
from dataclasses import dataclass
sys.path[:0] = {paths!r}
from images import MemorySource, entries, jpeg
from pipelines.storage import convert_split
from pipelines.storage.convert import convert

@dataclass(frozen=True)
class Slow(MemorySource):
    def read(self, entry):
        time.sleep(float(sys.argv[3]))
        return super().read(entry)

def slow():
    files = [jpeg(20 + n % 50, 300, n) for n in range(120)]
    return Slow(splits={{"train": entries(files), "val": entries(files[:30])}})

if __name__ == "__main__":
    convert_split.BATCH_IMAGES, convert_split.FLUSH_BYTES = 5, 1
    source = slow()
    print("starting", flush=True)
    convert(source, sys.argv[1], workers=int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = Path(__file__).resolve().parent
    path = tmp_path_factory.mktemp("script") / "slow_conversion.py"
    path.write_text(SOURCE.format(paths=[str(here), str(here.parent)]))
    return path


def start(script: Path, folder: Path, workers: int = 1, seconds: float = 0.002) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(script), str(folder), str(workers), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"starting\n"
    return process


def members(session: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] != "Z" and int(fields[3]) == session:
            found.append(int(path.parent.name))
    return found


def soon_gone(group: int) -> bool:
    """Return whether every process of a group ends within ten seconds."""
    until = time.monotonic() + 10
    while members(group) and time.monotonic() < until:
        time.sleep(0.02)
    return not members(group)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_killed_conversions_go_on_and_end_the_same(script, tmp_path):
    start(script, tmp_path / "whole").communicate()
    rng = random.Random(5)
    torn = 0
    for workers in (1, 1, 2, 1):
        process = start(script, tmp_path / "killed", workers)
        time.sleep(rng.uniform(0.02, 0.12) + 0.5 * (workers - 1))
        process.kill()
        process.communicate()
        for journal in (tmp_path / "killed").glob("*.journal"):
            content = journal.read_bytes()
            torn += content.count(b"blk1")
            journal.write_bytes(content[: -rng.randrange(1, 30)])  # as if its last block was torn
        assert soon_gone(process.pid)
    assert torn
    _, errors = start(script, tmp_path / "killed").communicate()
    assert errors == b""
    assert contents_of(tmp_path / "killed") == contents_of(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ctrl_c_leaves_no_process_and_one_traceback(script, tmp_path):
    process = start(script, tmp_path / "d", workers=2, seconds=0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert errors.count(b"Traceback") == 1  # the parent's own, which the CLI turns into exit code 130
    assert errors.rstrip().endswith(b"KeyboardInterrupt")
    assert soon_gone(process.pid)


class StopError(Exception):
    pass


def convert_until(source: MemorySource, folder: Path, images: int, split: str = "train", **options) -> None:
    """Convert and break off once so many images of a split are written."""

    def progress(stage: str, done: int, *_) -> None:
        if stage == split and done >= images:
            raise StopError

    with pytest.raises(StopError):
        convert(source, folder, workers=1, progress=progress, **options)


@pytest.fixture
def eager(monkeypatch):
    """Small batches, each one journalled."""
    monkeypatch.setattr(convert_split, "BATCH_IMAGES", 4)
    monkeypatch.setattr(convert_split, "FLUSH_BYTES", 1)


def test_a_partial_of_other_options_or_images_is_started_anew(odd, tmp_path, eager):
    source, other = mixed_source(odd), mixed_source(dict(reversed(odd.items())))
    convert(source, tmp_path / "plain", workers=1)
    for number, (before, options) in enumerate([(source, {"max_side": 60}), (other, {}), (source, {"quality": 50})]):
        convert_until(before, tmp_path / str(number), 20, **options)
        assert (tmp_path / str(number) / "train.journal").stat().st_size > 0
        convert(source, tmp_path / str(number), workers=1)
        assert contents_of(tmp_path / str(number)) == contents_of(tmp_path / "plain")


def test_a_finished_split_of_another_conversion_leaves_no_trace(odd, tmp_path, eager):
    convert(mixed_source(odd), tmp_path / "plain", workers=1)
    convert_until(mixed_source(odd, copies=6), tmp_path / "d", 2, split="val")
    assert (tmp_path / "d" / "train.beton").exists()
    convert(mixed_source(odd), tmp_path / "d", workers=1)
    assert contents_of(tmp_path / "d") == contents_of(tmp_path / "plain")


def test_a_finished_split_is_not_converted_again(odd, tmp_path, eager):
    convert_until(mixed_source(odd), tmp_path / "d", 2, split="val")
    seen = []
    convert(mixed_source(odd), tmp_path / "d", workers=1, progress=lambda *step: seen.append(step))
    assert seen[0][:3] == ("train", 40, 40)
    convert(mixed_source(odd), tmp_path / "plain", workers=1)
    assert contents_of(tmp_path / "d") == contents_of(tmp_path / "plain")


def test_data_lost_behind_the_journal_is_written_again(odd, tmp_path, eager):
    convert(mixed_source(odd), tmp_path / "plain", workers=1)
    convert_until(mixed_source(odd), tmp_path / "d", 30)
    partial = tmp_path / "d" / "train.beton.partial"
    with partial.open("r+b") as file:
        file.truncate(partial.stat().st_size - 20_000)
    convert(mixed_source(odd), tmp_path / "d", workers=1)
    assert contents_of(tmp_path / "d") == contents_of(tmp_path / "plain")


def test_data_spoilt_on_the_disk_is_found_before_it_gets_its_name(odd, tmp_path, eager):
    convert_until(mixed_source(odd), tmp_path, 30)
    partial = tmp_path / "train.beton.partial"
    with partial.open("r+b") as file:
        file.seek((2 << 20) + 3000)  # the data starts on the second page
        file.write(b"spoilt")
    with pytest.raises(Failure, match="does not read back"):
        convert(mixed_source(odd), tmp_path, workers=1)
    assert not (tmp_path / "train.beton").exists()
    assert convert(mixed_source(odd), tmp_path, workers=1).splits["train"].samples == 40


def test_a_full_disk_is_a_failure_and_the_rest_is_kept(tmp_path, eager):
    source = MemorySource(splits={"train": entries([jpeg(300, 300, n, quality=95) for n in range(60)])})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((2 << 20) + 600_000, hard))
    try:
        with pytest.raises(Failure, match=r"no room to go on(.|\n)*MiB more(.|\n)*MiB free") as raised:
            convert(source, tmp_path / "d", workers=1)
        assert type(raised.value) is Failure
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    seen = []
    convert(source, tmp_path / "d", workers=1, progress=lambda *step: seen.append(step))
    assert seen[0][1] > 4
    convert(source, tmp_path / "whole", workers=1)
    assert contents_of(tmp_path / "d") == contents_of(tmp_path / "whole")


@pytest.mark.parametrize("cut", range(1, 120, 7))
def test_torn_journals_give_whole_blocks(tmp_path, cut):
    path = tmp_path / "x.journal"
    journal = Journal(path, "key", 1 << 40)
    for number in range(6):
        journal.add((number != 2, 0, 1, 5, 6, 0, 99, 10, 4096 + 10 * number), number, "bad" if number == 2 else "")
        if number % 2:
            journal.flush()
    journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path, "key", 1 << 40)
    assert len(again.records) in (0, 2, 4)
    assert again.records["offset"].tolist() == [4096 + 10 * n for n in range(len(again.records))]
    assert again.reasons == ({2: "bad"} if len(again.records) == 4 else {})
    again.close()
    assert len(Journal(path, "other key", 1 << 40).records) == 0


def test_a_flipped_bit_ends_a_journal_before_its_block(tmp_path):
    path = tmp_path / "x.journal"
    journal = Journal(path, "key", 1 << 40)
    for number in range(3):
        journal.add((True, 0, 1, 5, 6, 0, 99, 10, 4096 + 10 * number), number, "")
        journal.flush()
    journal.close()
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert len(Journal(path, "key", 1 << 40).records) == 2


def square(number: int) -> int:
    """Run by worker processes."""
    if number == 13:
        raise Mistake("unlucky", found="13")
    if number == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.005 * (number % 3))
    return number * number


def test_workers_give_results_in_order():
    assert list(in_order(square, range(12), 2)) == [number * number for number in range(12)]


def test_workers_errors_and_deaths_are_reported():
    with pytest.raises(Mistake, match="unlucky") as raised:
        list(in_order(square, [1, 13, 2], 2))
    assert raised.value.found == "13"
    with pytest.raises(Failure, match=r"worker process died(.|\n)*out of memory"):
        list(in_order(square, [1, 14, 2], 2))


def test_workers_import_no_torch():
    program = "import sys, pipelines.storage.convert_split; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=Path(__file__).parents[1]).returncode == 0


def test_fixtures_are_what_they_promise(tiny_dataset, tiny_small):
    tiny, small = Dataset.open(tiny_dataset), Dataset.open(tiny_small)
    assert isinstance(tiny.spec, DatasetSpec)
    assert pickle.loads(pickle.dumps(tiny.spec)) == tiny.spec
    sides = BetonReader(tiny_dataset / "train.beton").heights
    assert sides.min() >= 20
    assert sides.max() <= 400
    assert set(small.split("train").modes) == {RAW}
    assert small.split("val").sizes.tolist() == [3072] * 20
