"""Conversions that are killed, stopped or run out of disk: they go on, and end with the same bytes."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.errors import DeitfastError
from pipelines.storage.convert import split
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.journal import MAGIC
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.formats.format import Format, beton, shards
from tests.helpers.sample_images import MemorySource, contents_of, entries, jpeg, mixed_source

SOURCE = """
import signal, sys, time
from dataclasses import dataclass
sys.path[:0] = {paths!r}
from tests.helpers.sample_images import MemorySource, entries, jpeg
from pipelines.storage.convert import split
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.formats.format import beton, shards

@dataclass(frozen=True)
class Slow(MemorySource):
    def read(self, entry):
        time.sleep(float(sys.argv[3]))
        return super().read(entry)

def slow():
    files = [jpeg(20 + n % 50, 300, n) for n in range(120)]
    return Slow(splits={{"train": entries(files), "val": entries(files[:30])}})

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a script inherit deafness
    split.BATCH_IMAGES, split.FLUSH_BYTES = 5, 1
    source = slow()
    print("starting", flush=True)
    form = beton() if sys.argv[4] == ".beton" else shards(20_000)
    convert(source, sys.argv[1], ConvertOptions(workers=int(sys.argv[2]), form=form))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = Path(__file__).resolve().parent
    path = tmp_path_factory.mktemp("script") / "slow_conversion.py"
    path.write_text(SOURCE.format(paths=[str(here), str(here.parent)]))
    return path


@pytest.fixture(params=[beton(), shards(20_000)], ids=lambda form: form.suffix)
def form(request: pytest.FixtureRequest) -> Format:
    return request.param


def start(
    script: Path, folder: Path, workers: int = 1, seconds: float = 0.002, suffix: str = ".beton"
) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(script), str(folder), str(workers), str(seconds), suffix]
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


def blocks(folder: Path) -> int:
    """Blocks in a conversion's journals."""
    return sum(journal.read_bytes().count(MAGIC) for journal in folder.glob("*.journal"))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_killed_conversions_go_on_and_end_the_same(script, tmp_path, form):
    start(script, tmp_path / "whole", suffix=form.suffix).communicate()
    rng = random.Random(5)
    torn = 0
    for workers in (1, 1, 2, 1):
        process = start(script, tmp_path / "killed", workers, suffix=form.suffix)
        until = time.monotonic() + 20
        while not blocks(tmp_path / "killed") and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.04))
        process.kill()
        process.communicate()
        for journal in (tmp_path / "killed").glob("*.journal"):
            content = journal.read_bytes()
            torn += content.count(MAGIC)
            journal.write_bytes(content[: -rng.randrange(1, 30)])  # as if its last block was torn
        assert soon_gone(process.pid)
    assert torn
    _, errors = start(script, tmp_path / "killed", suffix=form.suffix).communicate()
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
        convert(source, folder, ConvertOptions(workers=1, **options), progress=progress)


@pytest.fixture
def eager(monkeypatch):
    """Small batches, each one journaled."""
    monkeypatch.setattr(split, "BATCH_IMAGES", 4)
    monkeypatch.setattr(split, "FLUSH_BYTES", 1)


def test_a_partial_of_other_options_images_or_format_is_started_anew(odd, tmp_path, eager, form):
    source, reversed_ = mixed_source(odd), mixed_source(dict(reversed(odd.items())))
    convert(source, tmp_path / "plain", ConvertOptions(workers=1, form=form))
    others = [shards(10_000)] if form.suffix == ".beton" else [shards(10_000), beton()]
    befores = [(source, {"max_side": 60}), (reversed_, {}), (source, {"quality": 50})]
    attempts = [(before, {"form": form, **options}) for before, options in befores]
    for number, (before, options) in enumerate([*attempts, *((source, {"form": other}) for other in others)]):
        convert_until(before, tmp_path / str(number), 20, **options)
        assert (tmp_path / str(number) / "train.journal").stat().st_size > 0
        convert(source, tmp_path / str(number), ConvertOptions(workers=1, form=form))
        assert contents_of(tmp_path / str(number)) == contents_of(tmp_path / "plain")
        assert sorted(path.name for path in (tmp_path / str(number)).iterdir()) == [
            *["classes.txt"] * (form.suffix == ".wds"), "dataset.json", f"train{form.suffix}", f"val{form.suffix}",
        ]  # fmt: skip


@pytest.mark.parametrize("version", ["1.0", split.pillow_version])
def test_what_another_pillow_began_is_started_anew(odd, tmp_path, eager, form, monkeypatch, version):
    """Its JPEGs may be other bytes: half a split of each would be a data set of no version."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(split, "pillow_version", version)
        convert_until(mixed_source(odd), tmp_path, 20, form=form)
    options = ConvertOptions(workers=1, form=form)
    convert(mixed_source(odd), tmp_path, options, progress=lambda *step: seen.append(step))
    assert seen[0][1] == (0 if version == "1.0" else 16)  # of 20: the last batch had not reached the journal


@pytest.mark.parametrize("before", [beton(), shards(20_000), shards(10_000)], ids=["beton", "same", "smaller"])
def test_a_finished_split_of_another_conversion_leaves_no_trace(odd, tmp_path, eager, form, before):
    convert(mixed_source(odd), tmp_path / "plain", ConvertOptions(workers=1, form=form))
    convert_until(mixed_source(odd, copies=6), tmp_path / "d", 2, split="val", form=before)
    assert (tmp_path / "d" / f"train{before.suffix}").exists()
    convert(mixed_source(odd), tmp_path / "d", ConvertOptions(workers=1, form=form))
    assert contents_of(tmp_path / "d") == contents_of(tmp_path / "plain")


def test_a_finished_split_is_not_converted_again(odd, tmp_path, eager, form):
    convert_until(mixed_source(odd), tmp_path / "d", 2, split="val", form=form)
    seen = []
    convert(
        mixed_source(odd),
        tmp_path / "d",
        ConvertOptions(workers=1, form=form),
        progress=lambda *step: seen.append(step),
    )
    assert seen[0][:3] == ("train", 40, 40)
    convert(mixed_source(odd), tmp_path / "plain", ConvertOptions(workers=1, form=form))
    assert contents_of(tmp_path / "d") == contents_of(tmp_path / "plain")


def shorten(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - size)


def last_shard(folder: Path) -> Path:
    return max(folder.glob("*.tar"))


@pytest.mark.parametrize(
    ("form", "lose"),
    [
        (beton(), lambda partial: shorten(partial, 20_000)),
        (shards(20_000), lambda partial: shorten(last_shard(partial), 600)),
        (shards(20_000), lambda partial: last_shard(partial).unlink()),
        (shards(20_000), lambda partial: (partial / "000001.tar").unlink()),
    ],
    ids=["beton", "end", "last shard", "second shard"],
)
def test_data_lost_behind_the_journal_is_written_again(odd, tmp_path, eager, form, lose):
    convert(mixed_source(odd), tmp_path / "plain", ConvertOptions(workers=1, form=form))
    convert_until(mixed_source(odd), tmp_path / "d", 30, form=form)
    lose(tmp_path / "d" / f"train{form.suffix}.partial")
    seen = []
    convert(
        mixed_source(odd),
        tmp_path / "d",
        ConvertOptions(workers=1, form=form),
        progress=lambda *step: seen.append(step),
    )
    assert seen[0][1] < 30
    assert contents_of(tmp_path / "d") == contents_of(tmp_path / "plain")


def spoil(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"spoiled")


@pytest.mark.parametrize(
    ("form", "harm"),
    [
        (beton(), lambda partial: spoil(partial, (2 << 20) + 3000)),  # the data starts on the second page
        (shards(20_000), lambda partial: spoil(partial / "000001.tar", 3000)),
        (shards(20_000), lambda partial: spoil(partial / "000001.tar", 0)),
        (shards(20_000), lambda partial: shorten(partial / "000001.tar", 512)),
    ],
    ids=["beton", "image", "header", "cut"],
)
def test_data_spoiled_on_the_disk_is_found_before_it_gets_its_name(odd, tmp_path, eager, form, harm):
    convert_until(mixed_source(odd), tmp_path, 30, form=form)
    harm(tmp_path / f"train{form.suffix}.partial")
    with pytest.raises(DeitfastError, match="does not read back"):
        convert(mixed_source(odd), tmp_path, ConvertOptions(workers=1, form=form))
    assert not (tmp_path / f"train{form.suffix}").exists()
    assert convert(mixed_source(odd), tmp_path, ConvertOptions(workers=1, form=form)).splits["train"].samples == 40


@pytest.mark.parametrize("last", ["train", "dataset.json"])
def test_a_disk_that_is_full_for_the_last_names_is_a_failure(odd, tmp_path, monkeypatch, form, last):
    original = Path.replace

    def full(path: Path, target: Path) -> Path:
        if target.stem == last or target.name == last:
            raise OSError(28, "No space left on device")
        return original(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(DeitfastError, match=r"cannot write .*\n.*No space left") as raised:
            convert(mixed_source(odd), tmp_path / "d", ConvertOptions(workers=1, form=form))
        assert type(raised.value) is DeitfastError
    assert not (tmp_path / "d" / "dataset.json").exists()
    convert(mixed_source(odd), tmp_path / "d", ConvertOptions(workers=1, form=form))
    convert(mixed_source(odd), tmp_path / "plain", ConvertOptions(workers=1, form=form))
    assert contents_of(tmp_path / "d") == contents_of(tmp_path / "plain")


def test_a_full_disk_is_a_failure_and_the_rest_is_kept(tmp_path, eager, form):
    limit = 600_000 + (2 << 20)  # a .beton's data starts on the second page
    if form.suffix == ".wds":
        form, limit = shards(10**9), 600_000  # the limit is a file's: one shard
    source = MemorySource(splits={"train": entries([jpeg(300, 300, n, quality=95) for n in range(60)])})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(DeitfastError, match=r"no room to go on(.|\n)*MiB more(.|\n)*MiB free") as raised:
            convert(source, tmp_path / "d", ConvertOptions(workers=1, form=form))
        assert type(raised.value) is DeitfastError
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    seen = []
    convert(source, tmp_path / "d", ConvertOptions(workers=1, form=form), progress=lambda *step: seen.append(step))
    assert seen[0][1] > 4
    convert(source, tmp_path / "whole", ConvertOptions(workers=1, form=form))
    assert contents_of(tmp_path / "d") == contents_of(tmp_path / "whole")
