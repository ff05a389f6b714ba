"""Several processes learn what one would."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from small_runs import weights

ROOT = Path(__file__).parents[1]
SETTINGS = ("augment.mix_group=4", "model.patch=16", "model.drop_path=0.0", "optim.name=sgd", "optim.lr=0.05")


def train(data: Path, out: Path, world: int) -> None:
    """Train one epoch with `world` processes under torchrun."""
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    options = ["--data", data, "--out", out, "--batch", 16, "--epochs", 1, "--device", "cpu", *settings]
    runner = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m"]
    subprocess.run(
        [sys.executable, "-m", *runner, "deitfast", "train", *map(str, options)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def test_two_ranks_learn_what_one_does(tiny_small: Path, tmp_path: Path) -> None:
    train(tiny_small, tmp_path / "one", 1)
    train(tiny_small, tmp_path / "two", 2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), atol=1e-5), name
