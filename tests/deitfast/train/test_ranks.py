"""Several processes learn what one would."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deitfast.run_folder import RunFolder
from tests.helpers.command_line import call
from tests.helpers.small_runs import run, tiny_recipe, weights

ROOT = Path(__file__).parents[3]
SETTINGS = (
    "augment.mix_group=4",
    "model.patch=16",
    "model.depth=2",
    "model.drop_path=0.5",
    "optim.name=sgd",
    "optim.lr=0.05",
    "train.amp=off",
)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun leaves a folder wherever temporary files go."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def launched(world: int, *words: object) -> None:
    """Run a command of deitfast in `world` processes under torchrun."""
    runner = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m", "deitfast"]
    done = subprocess.run(
        [sys.executable, "-m", *runner, *map(str, words), "--device", "cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_two_ranks_learn_what_one_does(capsys, tiny_small: Path, tmp_path: Path) -> None:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    line = ["train", "--data", tiny_small, "--batch", 16, "--epochs", 1, *settings]
    assert call(capsys, *line, "--out", tmp_path / "one", "--device", "cpu")[0] == 0
    launched(2, *line, "--out", tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), atol=1e-5), name
    first, second = (RunFolder(tmp_path / name).metrics()[-1] for name in ("one", "two"))
    assert second["loss"] == pytest.approx(first["loss"], abs=1e-5)  # of all ranks, as are images and their rate
    assert second["images"] == first["images"] == 80
    assert second["images_per_second"] == pytest.approx(80 / second["seconds"], rel=0.01)
    assert second["val"]["class"] == pytest.approx(first["val"]["class"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_fill_one_cache_and_learn_the_same_from_it(tiny_small: Path, tmp_path: Path, world: int) -> None:
    teacher = tmp_path / "teacher"
    run(tiny_small, teacher, tiny_recipe("model.arch=vit_ti", "train.epochs=1", "train.ema=0"))
    settings = [word for setting in (*SETTINGS, "train.ema=0") for word in ("--set", setting)]
    common = ["--data", tiny_small, "--teacher", teacher, "--distill", "hard", "--epochs", 2, "--batch", 16, *settings]
    launched(1, "teach", *common, "--out", tmp_path / "one")
    launched(world, "teach", *common, "--out", tmp_path / "many")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "many")]
    assert files[0] == files[1]
    launched(world, "train", *common, "--cache", "none", "--out", tmp_path / "loop")
    launched(world, "train", *common, "--cache", tmp_path / "through", "--out", tmp_path / "writing")
    launched(world, "train", *common, "--cache", tmp_path / "many", "--out", tmp_path / "reading")
    through = {path.name: path.read_bytes() for path in (tmp_path / "through").iterdir()}
    assert through == files[0]
    loop = weights(tmp_path / "loop")
    for name in ("writing", "reading"):
        found = weights(tmp_path / name)
        assert all(torch.equal(value, found[key]) for key, value in loop.items()), name


FAULTS = {
    "error": "planted: an image cannot be read",
    "memory": "out of GPU memory for the training step",
    "killed": "no sign of life",
    "evaluation": "planted: the disk is full",
    "nan forever": "is not finite",
}
"""What may go wrong on one rank, and what the last lines say then."""


def faulty(fault: str, rank: int, world: int, data: Path, out: Path, *words: str) -> tuple[str, int, float]:
    """Train with a fault on one rank; return what is on the terminal, the exit code and the seconds it took."""
    settings = [word for setting in (*SETTINGS, "train.ema=0") for word in ("--set", setting)]
    train = ["train", "--data", str(data), "--out", str(out), "--batch", "16", "--epochs", "2", "--device", "cpu"]
    runner = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    script = str(ROOT / "tests" / "helpers" / "faulty_rank.py")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *runner, script, fault, str(rank), *train, *settings, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    return done.stdout + done.stderr, done.returncode, time.monotonic() - began


def named(fault: str, rank: int, text: str) -> bool:
    """Whether the last lines say which rank failed, and why."""
    told = [line for line in text.splitlines() if FAULTS[fault] in line]
    return any(f"rank {rank}" in line for line in told)


def test_an_error_on_one_rank_ends_all_and_is_named(tiny_small: Path, tmp_path: Path) -> None:
    text, code, _ = faulty("error", 1, 2, tiny_small, tmp_path / "run")
    assert code != 0
    assert named("error", 1, text), text
    assert text.count("error: planted: an image cannot be read") == 1


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("fault", ["memory", "killed", "evaluation", "nan forever"])
def test_a_fault_on_one_rank_ends_all_within_a_minute(tiny_small: Path, tmp_path: Path, fault: str, world: int) -> None:
    text, code, seconds = faulty(fault, world - 1, world, tiny_small, tmp_path / "run")
    assert code != 0
    assert any(FAULTS[fault] in line for line in text.splitlines()), text
    assert fault == "nan forever" or named(fault, world - 1, text), text
    assert seconds < 120  # with the start of the processes, on a loaded machine


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["nan loss", "nan gradient"])
def test_a_passing_nan_on_one_rank_costs_no_run(tiny_small: Path, tmp_path: Path, fault: str) -> None:
    """All ranks go back to the same checkpoint, and end with the weights of an undisturbed run."""
    every_step = ("--set", "train.checkpoint_minutes=0")
    faulty("none", 1, 2, tiny_small, tmp_path / "good", *every_step)
    text, code, _ = faulty(fault, 1, 2, tiny_small, tmp_path / "bad", *every_step)
    assert code == 0, text
    assert "going back to the last good checkpoint" in text
    good, bad = weights(tmp_path / "good"), weights(tmp_path / "bad")
    assert all(torch.equal(good[name], bad[name]) for name in good)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_the_loss_is_that_of_all_ranks(
    tiny_small: Path, tmp_path: Path
) -> None:
    every_step = ("--set", "train.checkpoint_minutes=0")
    faulty("none", 1, 2, tiny_small, tmp_path / "whole", *every_step)
    text, code, _ = faulty("interrupted", 1, 2, tiny_small, tmp_path / "run", *every_step)
    assert code != 0
    assert "SIGINT: stopped at epoch 1, step" in text
    text, code, _ = faulty("none", 1, 2, tiny_small, tmp_path / "run", *every_step, "--resume")
    assert code == 0, text
    rows = [RunFolder(tmp_path / name).metrics() for name in ("whole", "run")]
    for whole, resumed in zip(*rows, strict=True):
        assert resumed["loss"] == pytest.approx(whole["loss"], abs=1e-6)
        assert resumed["images"] == whole["images"]
    good, found = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(good[name], found[name]) for name in good)
