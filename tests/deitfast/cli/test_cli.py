"""The command line as a user meets it: exit codes, short messages, nothing left half-written."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from deitfast.cli import main
from deitfast.run_folder import RunFolder
from pipelines.storage.formats.beton import BetonReader
from tests.helpers.command_line import call

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, without the user's own settings."""
    monkeypatch.chdir(tmp_path)
    for name in ("IMAGENET_DIR", "DEITFAST_DATA", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_help_comes_at_once() -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "deitfast", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for command in ("convert", "info", "verify", "train", "eval", "export", "report", "bench", "doctor", "recipes"):
        assert command in done.stdout
    for heavy in ("torch", "numpy", "numba", "PIL", "pydantic", "matplotlib"):
        assert f" {heavy}\n" not in done.stderr, f"--help imports {heavy}"
    assert time.monotonic() - began < 10  # a loaded machine's bound; what keeps it short is checked above


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["convert", "imagenet"], "ImageNet not found: imagenet does not exist"),
        (["convert", "cifar10"], "convert cifar10 requires SOURCE"),
        (["convert", "mnist", "x"], "'mnist' is not one of"),
        (["convert", "folder", "missing"], "missing"),
        (["convert", "folder", "missing", "--format", "tar"], "'tar' is not one of"),
        (["convert", "folder", "missing", "--shard-size", "5"], "--shard-size without shards"),
        (["convert", "dataset", "missing"], "convert dataset requires OUTPUT"),
        (["convert", "dataset", "missing", "output", "--format", "wds"], "missing"),
        (["info", "missing"], "missing"),
        (["verify", "missing"], "missing"),
        (["eval", "missing"], "there is no run in missing"),
        (["train", "--data", "missing"], "missing"),
        (["train", "--resume"], "no unfinished run of this recipe and data in runs/"),
        (["train", "--nonsense"], "No such option"),
        (["nonsense"], "No such command"),
        (["recipes", "nonsense"], "recipe not found: nonsense"),
        (["report", "missing"], "there is no run in missing"),
        (["report"], "Missing argument"),
        (["bench", "--data", "missing"], "missing"),
        (["bench", "everything"], "bench has no part called everything"),
        (["bench", "--try", "workers"], "--try workers has no value"),
    ],
)
def test_mistakes_are_the_users_and_exit_with_2(capsys, arguments: list[str], says: str) -> None:
    code, _, err = call(capsys, *arguments)
    assert code == 2, err
    assert says in err
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--set", "augment.sise=32"], "did you mean augment.size?"),
        (["--arch", "alexnet"], "'alexnet' is not one of"),
        (["--distill", "hard"], "--distill hard requires a teacher"),
        (["--distill", "loud"], "'loud' is not one of"),
        (["--teacher", "resnet18"], "--teacher requires --distill"),
        (["--teacher-weights", "somewhere"], "--teacher-weights: weights file not found: somewhere"),
        (["--views", "2"], "--views requires --distill"),
        (["--per-image"], "--per-image requires --distill"),
        (["--distill", "hard", "--teacher", "nowhere"], "teacher 'nowhere' not found"),
        (["--recipe", "nowhere.toml"], "recipe not found: nowhere.toml"),
        (["--device", "abacus"], "unknown device abacus"),
        (["--batch", "4096"], "batch"),
        (["--data-fraction", "1.5"], "train.fraction"),
        (["--data-fraction", "0.1"], "train.batch 64 does not fit 10 images"),
    ],
)
def test_options_that_do_not_fit_leave_no_run_behind(capsys, tiny_small: Path, options: list[str], says: str) -> None:
    code, _, err = call(capsys, "train", "--data", tiny_small, "--batch", 64, "--out", "run", *options)
    assert code == 2, err
    assert says in err
    assert not Path("run").exists()


def test_names_that_the_terminal_cannot_show_are_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "images/train/\N{CAT FACE}"
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "1.png")
    done = subprocess.run(
        [sys.executable, "-m", "deitfast", "convert", "folder", tmp_path / "images", tmp_path / "data"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, "classes: \\U0001f431" in done.stdout) == (0, True), done.stderr


def test_brackets_in_names_are_shown(capsys) -> None:
    folder = Path("[bold] images/train/cat [female]")
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "1.png")
    code, shown, err = call(capsys, "convert", "folder", folder.parents[1], "[data]", "--workers", 1)
    assert code == 0, err
    assert all(name in shown for name in ("[data]: folder", "classes: cat [female]", "source: [bold] images"))


def test_a_damaged_data_set_fails_with_1(capsys, tiny_small: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in tiny_small.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    beton = damaged / "train.beton"
    content = bytearray(beton.read_bytes())
    content[BetonReader(beton).offsets[3] + 100] ^= 0xFF
    beton.write_bytes(content)
    code, _, err = call(capsys, "verify", damaged)
    assert code == 1
    assert "train sample 3" in err
    beton.write_bytes(content[: len(content) // 2])
    code, _, err = call(capsys, "train", "--data", damaged, "--batch", 64, "--out", "run")
    assert code == 1
    assert "train.beton" in err


def test_a_user_converts_trains_evaluates_and_goes_on(capsys, tiny_small: Path) -> None:
    small = ["--data", tiny_small, "--batch", 16, "--set", "augment.mix_group=8", "--set", "model.patch=16"]
    assert call(capsys, "train", *small, "--arch", "vit_ti", "--epochs", 1, "--out", "teacher")[0] == 0
    distilled = ["train", *small, "--distill", "hard", "--teacher", "teacher", "--epochs", 1, "--out", "student"]
    code, out, err = call(capsys, *distilled)
    assert code == 0
    assert "joint" in out
    assert f"report: {Path('student/report.html')}" in err
    code, out, _ = call(capsys, "eval", "student", "--json", "metrics.json", "--loader", "reference")
    assert code == 0
    assert "confusion matrix" in out
    heads = json.loads(Path("metrics.json").read_text())["heads"]
    assert set(heads) == {"class", "distillation", "joint"}
    assert sum(map(sum, heads["joint"]["confusion"])) == 20
    code, _, err = call(capsys, *distilled)
    assert code == 2
    assert "--resume" in err
    assert call(capsys, "train", "--out", "student", "--resume")[0] == 0
    code, out, _ = call(capsys, "info", "student")
    assert code == 0
    assert "1 of 1" in out
    assert call(capsys, "info", tiny_small)[0] == 0


def test_a_user_teaches_once_and_trains_without_the_teacher(capsys, tiny_small: Path) -> None:
    small = ["--data", tiny_small, "--batch", 16, "--set", "augment.mix_group=8", "--set", "model.patch=16"]
    assert call(capsys, "train", *small, "--arch", "vit_ti", "--epochs", 1, "--out", "teacher")[0] == 0
    code, out, err = call(capsys, "teach", *small, "--teacher", "teacher", "--epochs", 2)
    assert code == 0
    assert "is complete: 160 images" in err
    assert "2 of each of 80 images" in out
    (cache,) = Path("caches").iterdir()
    assert cache.name.startswith("cifar10-vit_ti-")
    assert "complete" in call(capsys, "info", cache)[1]
    assert "intact and complete" in call(capsys, "verify", cache)[2]
    student = ["train", *small, "--distill", "hard", "--epochs", 2, "--set", "train.ema=0"]
    code, _, err = call(capsys, *student, "--teacher", "teacher", "--out", "student")
    assert code == 0
    assert "which is complete: no teacher is loaded" in err
    assert [row["teacher_views"] for row in RunFolder(Path("student")).metrics()] == [0, 0]
    shutil.rmtree("teacher")
    assert call(capsys, *student, "--cache", cache, "--out", "alone")[0] == 0
    code, _, err = call(capsys, *student[:-1], "train.ema=0", "--epochs", 4, "--cache", cache, "--out", "longer")
    assert code == 2
    assert "--views 2 uses them again" in err
    code, _, err = call(capsys, *student, "--epochs", 4, "--views", 2, "--cache", cache, "--out", "longer")
    assert code == 0
    assert "reused (2 views of each image" in err
    content = bytearray((cache / "targets.npy").read_bytes())
    content[200] ^= 1
    (cache / "targets.npy").write_bytes(content)
    code, _, err = call(capsys, "verify", cache)
    assert code == 1
    assert "targets.npy: damaged" in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--teacher", "nowhere"], "teacher 'nowhere' not found"),
        ([], "teach requires --teacher"),
        (["--teacher", "resnet18", "--views", 4, "--set", "augment.repeats=3"], "--views 4 must be a multiple"),
        (["--teacher", "resnet18", "--views", 4, "--per-image"], "mutually exclusive"),
        (["--teacher", "resnet18", "--distill", "none"], "teach requires --distill hard or soft"),
    ],
)
def test_teaching_that_cannot_be_leaves_no_cache_behind(capsys, tiny_small: Path, options: list, says: str) -> None:
    code, _, err = call(capsys, "teach", "--data", tiny_small, "--out", "cache", *options)
    assert code == 2, err
    assert says in err
    assert not Path("cache").exists()


def test_a_user_goes_over_to_shards(capsys, tiny_small: Path) -> None:
    made = ["convert", "dataset", tiny_small, "shards", "--format", "wds", "--shard-size", 1]
    code, out, _ = call(capsys, *made)
    assert code == 0
    assert "train.wds" in out
    code, _, err = call(capsys, *made)
    assert code == 0
    assert "nothing to do" in err
    code, _, err = call(capsys, *made[:-1], 2)
    assert code == 2
    assert "shard_size 1000000, in train.wds" in err
    assert call(capsys, "verify", "shards")[0] == 0
    Path("shards/train.wds/000000.tar").unlink()
    code, _, err = call(capsys, "verify", "shards")
    assert code == 1
    assert "shards/train.wds/000000.tar: no such file" in err
    code, _, err = call(capsys, "train", "--data", "shards", "--batch", 64, "--out", "run")
    assert code == 1
    assert "shards/train.wds/000000.tar: no such file" in err


def test_recipes_and_doctor_speak(capsys) -> None:
    code, out, _ = call(capsys, "recipes")
    assert code == 0
    assert "deit_ti_imagenet" in out
    assert "no-mixup-no-cutmix" in out
    assert "75.8" in out
    code, out, _ = call(capsys, "recipes", "deit_ti_cifar10")
    assert code == 0
    assert "mix_group = 64" in out
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    assert "loader" in out


def test_unforeseen_errors_are_short_and_exit_with_1(capsys, monkeypatch) -> None:
    def broken() -> None:
        raise RuntimeError("wires crossed")

    monkeypatch.setattr("deitfast.cli.tables.describe_machine", broken)
    code, _, err = call(capsys, "doctor")
    assert code == 1
    assert "wires crossed" in err
    assert "--debug" in err
    with pytest.raises(RuntimeError, match="wires crossed"):
        main(["doctor", "--debug"])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.EMFILE, "Too many open files", "train.beton"),
            "train.beton: Too many open files\n  hint: let",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device\n  hint: free some space"),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_the_machine_lacks_is_no_internal_error(capsys, monkeypatch, error: BaseException, told: str) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr("deitfast.cli.tables.describe_machine", broken)
    code, _, err = call(capsys, "doctor")
    assert code == 1
    assert told in err
    assert "internal error" not in err


def test_ctrl_c_saves_and_a_resumed_run_goes_on(tiny_small: Path) -> None:
    command = [sys.executable, "-m", "deitfast", "train", "--data", str(tiny_small), "--out", "run", "--batch", "16"]
    command += ["--set", "augment.mix_group=8", "--set", "model.patch=16", "--set", "train.evaluate_every=1000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--epochs", "1000"], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not Path("run/metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Resume: python -m deitfast train --data" in err
    assert "--out run --batch 16" in err
    assert err.splitlines()[-2].endswith(" --resume")
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
    epochs = len(Path("run/metrics.jsonl").read_text().splitlines())
    assert 1 <= epochs < 1000
    assert not list(Path("run").glob("*.partial"))


def test_bench_measures_prints_and_writes(capsys, tiny_small: Path) -> None:
    small = ["--data", tiny_small, "--batch", 16, "--set", "augment.mix_group=8", "--set", "model.patch=16"]
    code, out, _ = call(capsys, "bench", "train", *small, "--seconds", 0.05, "--json", "a.json", "--html", "a.html")
    assert code == 0
    assert "all together" in out
    assert json.loads(Path("a.json").read_text())["setting"]["batch"] == 16
    assert Path("a.html").read_text().startswith("<!doctype html>")
