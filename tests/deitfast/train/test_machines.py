"""Two machines that share no folder: two torchrun agents in two folders, each with a copy of the data set."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deitfast.run_folder import RunFolder
from tests.helpers.small_runs import run, tiny_recipe, weights

ROOT = Path(__file__).parents[3]
FAULTY = ROOT / "tests" / "helpers" / "faulty_rank.py"
SETTINGS = (
    "augment.mix_group=4", "model.patch=16", "model.depth=2", "optim.name=sgd", "optim.lr=0.05", "train.amp=off",
    "train.ema=0", "train.checkpoint_minutes=0",
)  # fmt: skip
TRAIN = ("--batch", "16", "--epochs", "2", *(word for setting in SETTINGS for word in ("--set", setting)))
pytestmark = pytest.mark.slow


@pytest.fixture
def machines(tiny_small: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The machines' folders, with a data set in each."""
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        shutil.copytree(tiny_small, folder / "data")
    return folders


def start(machines: tuple[Path, ...], *words: str, others: tuple[str, ...] = (), fault: str = "none") -> list[str]:
    """Run one line of deitfast on every machine, `others` added on all but the first; return what each one says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    agents = []
    for number, folder in enumerate(machines):
        where = ["--nnodes", str(len(machines)), "--node-rank", str(number), "--nproc-per-node", "1"]
        meet = ["--master-addr", "127.0.0.1", "--master-port", port]
        line = [*words, *(others if number else ()), "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        command = [sys.executable, "-m", "torch.distributed.run", *where, *meet, str(FAULTY), fault, "1", *line]
        agents.append(
            subprocess.Popen(
                command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    return [f"{text}\nexit {agent.returncode}" for text, agent in zip(said, agents, strict=True)]


def ended(said: list[str]) -> bool:
    return all(text.endswith("exit 0") for text in said)


def test_a_run_is_resumed_where_only_the_first_machine_has_its_folder(machines: tuple[Path, Path]) -> None:
    line = ("train", "--data", "data", *TRAIN)
    assert ended(said := start(machines, *line, "--out", "whole")), said
    assert not (machines[1] / "whole").exists()
    said = start(machines, *line, "--out", "run", fault="interrupted")
    assert not ended(said)
    stopped = re.search(r"SIGINT: stopped at epoch (\d), step (\d)", said[0])
    assert stopped, said
    # the second machine's line names its data alone: recipe and checkpoint are the first one's
    said = start(machines, "train", "--out", "run", "--resume", others=("--data", "data"))
    assert ended(said), said
    assert f"resuming in epoch {stopped[1]} after {stopped[2]} steps" in said[0]
    good, found = weights(machines[0] / "whole"), weights(machines[0] / "run")
    assert all(torch.equal(good[name], found[name]) for name in good)
    said = start(machines, *line, "--out", "nan", fault="nan loss")
    assert ended(said), said
    assert "going back to the last good checkpoint" in said[0]
    found = weights(machines[0] / "nan")
    assert all(torch.equal(good[name], found[name]) for name in good)


def test_other_data_on_a_machine_is_told(machines: tuple[Path, Path], tiny_dataset: Path) -> None:
    shutil.rmtree(machines[1] / "data")
    shutil.copytree(tiny_dataset, machines[1] / "data")
    said = start(machines, "train", "--data", "data", *TRAIN, "--out", "run")
    assert not ended(said)
    assert sum(text.count("reads another data set than rank 0") > 0 for text in said) > 0, said


def test_a_teacher_s_targets_without_a_shared_folder(machines: tuple[Path, Path], tmp_path: Path) -> None:
    run(machines[0] / "data", tmp_path / "teacher", tiny_recipe("model.arch=vit_ti", "train.epochs=1", "train.ema=0"))
    for folder in machines:
        shutil.copytree(tmp_path / "teacher", folder / "teacher")
    line = ("--data", "data", "--distill", "hard", "--teacher", "teacher", *TRAIN)
    assert ended(said := start(machines, "train", *line, "--out", "loop")), said
    assert "the machines do not share" in said[0]
    assert not (machines[0] / "caches").exists()
    said = start(machines, "train", *line, "--out", "own", "--cache", "cache")
    assert not ended(said)
    assert any("rank 1" in text and "does not see the teacher cache of rank 0" in text for text in said), said
    shutil.rmtree(machines[0] / "cache")
    assert ended(said := start(machines[:1], "teach", *line, "--out", "cache")), said
    shutil.copytree(machines[0] / "cache", machines[1] / "cache")
    assert ended(said := start(machines, "train", *line, "--out", "copies", "--cache", "cache")), said
    assert "no teacher is loaded" in said[0]
    good, found = weights(machines[0] / "loop"), weights(machines[0] / "copies")
    assert all(torch.equal(good[name], found[name]) for name in good)
    assert RunFolder(machines[0] / "copies").finished()
