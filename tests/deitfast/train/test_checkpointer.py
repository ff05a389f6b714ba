"""Checkpoints beside the training: what a snapshot holds, which file is gone back to, and what a full disk does."""

from pathlib import Path
from threading import Event

import pytest
import torch
from torch import nn

from deitfast.train.checkpointer import Checkpointer, all_finite
from deitfast.weights import checkpoint
from pipelines.errors import DeitfastError

CPU = torch.device("cpu")


def state_of(steps: int, value: float = 0.0) -> dict:
    return {"epoch": 0, "steps": steps, "model": {"weight": torch.full((4,), value)}, "optimizer": {"lr": [0.1]}}


def steps_in(path: Path) -> int:
    return checkpoint.load(path, CPU)["steps"]


def test_a_snapshot_is_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training does to the weights while the file is written does not come into it."""
    saver, state, save = Checkpointer(tmp_path / "checkpoint.pt", writes=True), state_of(1, 5.0), checkpoint.save

    def late(path: Path, snapshot: dict) -> None:
        state["model"]["weight"].zero_()
        save(path, snapshot)

    monkeypatch.setattr(checkpoint, "save", late)
    saver.save(state)
    saver.close()
    assert checkpoint.load(saver.path, CPU)["model"]["weight"].tolist() == [5.0] * 4
    assert not state["model"]["weight"].any()


def test_the_checkpoint_before_is_kept_until_the_new_one_is_proved(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path / "checkpoint.pt", writes=True)
    for steps in (1, 2, 3):
        saver.save(state_of(steps))
        saver.wait()
    assert saver.best() == saver.previous  # 2 and 3 may be past saving; 1 was followed by nothing known either
    assert steps_in(saver.previous) == 1
    saver.prove(0, 4)
    assert saver.best() == saver.path
    assert steps_in(saver.path) == 3
    saver.save(state_of(5))
    saver.close()
    assert steps_in(saver.previous) == 3


def test_a_step_before_a_checkpoint_proves_nothing(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path / "checkpoint.pt", writes=True)
    saver.save(state_of(1))
    saver.prove(0, 2)
    saver.save(state_of(3))
    saver.prove(0, 3)
    saver.wait()
    assert saver.best() == saver.previous
    saver.close()


def test_a_full_disk_is_told_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Checkpointer(tmp_path / "checkpoint.pt", writes=True)
    monkeypatch.setattr(checkpoint, "save", _full)
    saver.save(state_of(1))
    with pytest.raises(DeitfastError, match="full"):
        saver.save(state_of(2))
    saver.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path / "checkpoint.pt", writes=False)
    saver.save(state_of(1))
    saver.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["model", "ema", "optimizer"])
def test_one_bad_number_anywhere_is_found(value: float, where: str) -> None:
    tree = {"model": {"a": torch.zeros(3), "count": torch.tensor(3)}, "ema": {"model": {"a": torch.zeros(3)}}}
    tree |= {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2, 2)}}, "groups": [{"lr": 1.0}]}}
    assert all_finite(tree)
    assert all_finite(tree | {"large": torch.full((2,), -1e30)})  # its square is not
    tensors = {
        "model": tree["model"]["a"],
        "ema": tree["ema"]["model"]["a"],
        "optimizer": tree["optimizer"]["state"][0]["exp_avg"],
    }
    tensors[where].view(-1)[1] = value
    assert not all_finite(tree)


def test_the_best_weights_are_of_the_moment_and_written_beside_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the checkpoint before is still being written, for which nothing waits."""
    saver, model, save = Checkpointer(tmp_path / "checkpoint.pt", writes=True), nn.Linear(2, 1), checkpoint.save
    go = Event()

    def slow(path: Path, state: dict) -> None:
        assert go.wait(30)
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", slow)
    weight = model.weight.detach().clone()
    saver.save(state_of(1, 5.0))
    saver.save_best(tmp_path / "best.pt", 3, 0.5, model, averaged=True)
    model.weight.data.zero_()
    go.set()
    saver.wait()
    best = checkpoint.load(tmp_path / "best.pt", CPU)
    assert (best["epoch"], best["top1"], best["averaged"]) == (3, 0.5, True)
    assert torch.equal(best["model"]["weight"], weight)
    assert steps_in(saver.path) == 1
    monkeypatch.setattr(checkpoint, "save", _full)
    saver.save_best(tmp_path / "best.pt", 4, 0.6, model, averaged=False)
    with pytest.raises(DeitfastError, match="full"):
        saver.close()


def _full(*arguments: object) -> None:
    raise DeitfastError("the disk is full")
