"""Several processes learn what one would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.small_runs import run, tiny_recipe, weights

ROOT = Path(__file__).parents[3]
SETTINGS = ("augment.mix_group=4", "model.patch=16", "model.drop_path=0.0", "optim.name=sgd", "optim.lr=0.05")


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


def train(data: Path, out: Path, world: int) -> None:
    """Train one epoch with `world` processes."""
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    launched(world, "train", "--data", data, "--out", out, "--batch", 16, "--epochs", 1, *settings)


def test_two_ranks_learn_what_one_does(tiny_small: Path, tmp_path: Path) -> None:
    train(tiny_small, tmp_path / "one", 1)
    train(tiny_small, tmp_path / "two", 2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_fill_one_cache_and_learn_the_same_from_it(tiny_small: Path, tmp_path: Path, world: int) -> None:
    teacher = tmp_path / "teacher"
    run(tiny_small, teacher, tiny_recipe("model.arch=vit_ti", "train.epochs=1", "train.ema=0"))
    settings = [word for setting in (*SETTINGS, "train.amp=off", "train.ema=0") for word in ("--set", setting)]
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
