"""TensorBoard: what its files hold, that a run that went back has no point twice, and what happens without it."""

import math
import sys
from pathlib import Path

import pytest
from rich.console import Console

from deitfast.config.recipe import Recipe
from deitfast.progress import Display
from deitfast.train import callbacks, monitor
from deitfast.train import step as step_module
from deitfast.train.callbacks import TensorBoard
from deitfast.train.job import TrainJob
from deitfast.train.trainer import train
from pipelines.errors import UserError
from tests.helpers.small_runs import CPU, CrashError, crash_after, tiny_recipe


@pytest.fixture(autouse=True)
def looks_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "LOOK_SECONDS", 0.0)


def watched(data: Path, out: Path, recipe: Recipe, *, resume: bool = False) -> None:
    job = TrainJob(recipe, data, out, resume, command=("test",), tensorboard=True)
    train(job, CPU, Display(Console(), quiet=True))


def points(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows of a run: (step, value) of every tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run_folder / "tensorboard"))
    read.Reload()
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_a_resumed_run_has_every_point_once(tiny_small: Path, tmp_path: Path, monkeypatch) -> None:
    recipe = tiny_recipe(
        "train.checkpoint_minutes=1000", "train.ema=0"
    )  # so that resuming goes back over steps that were shown
    watched(tiny_small, tmp_path / "whole", recipe)
    with monkeypatch.context() as patch:
        crash_after(patch, 8)
        with pytest.raises(CrashError):
            watched(tiny_small, tmp_path / "cut", recipe)
    assert [step for step, _ in points(tmp_path / "cut")["running/loss"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    watched(tiny_small, tmp_path / "cut", recipe, resume=True)
    whole, cut = points(tmp_path / "whole"), points(tmp_path / "cut")
    assert [step for step, _ in cut["running/loss"]] == list(range(1, 11))
    assert [step for step, _ in cut["val/class/top1"]] == [5, 10]
    assert {"epoch/lr", "epoch/images_per_second", "running/waiting", "val/class/auc"} <= cut.keys()
    for tag in ("running/loss", "epoch/loss", "epoch/lr", "val/class/top1"):
        assert cut[tag] == whole[tag]


def test_going_back_to_a_checkpoint_replaces_points(tiny_small: Path, tmp_path: Path, monkeypatch) -> None:
    original, calls = step_module.TrainStep.step, []

    def bad_once(self, *arguments):
        calls.append(None)
        return original(self, *arguments) * (math.nan if len(calls) == 8 else 1)

    monkeypatch.setattr(step_module.TrainStep, "step", bad_once)
    watched(tiny_small, tmp_path / "run", tiny_recipe("train.checkpoint_minutes=1000", "train.ema=0"))
    assert [step for step, _ in points(tmp_path / "run")["running/loss"]] == list(range(1, 11))


def test_without_tensorboard_nothing_is_started(tiny_small: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(UserError, match="TensorBoard is not installed") as caught:
        watched(tiny_small, tmp_path / "run", tiny_recipe())
    assert "pip install" in caught.value.remedy
    assert not (tmp_path / "run").exists()


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(callbacks.log, "propagate", True)
    monkeypatch.setattr(callbacks.log, "handlers", [])  # a command that ran in this process may have left its own
    return caplog


def test_files_that_cannot_be_written_cost_a_warning(tmp_path: Path, warnings_of) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    board = TensorBoard(tmp_path / "tensorboard")
    for step in (1, 2):
        board.write(step, {"x": 1.0})
    board.close()
    assert warnings_of.text.count("TensorBoard's files cannot be written") == 1


def test_a_disk_that_fills_up_costs_a_warning(tmp_path: Path, warnings_of, monkeypatch) -> None:
    """What TensorBoard's thread fails with, its writer raises at every call that follows, `close` among them."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    board = TensorBoard(tmp_path)
    board.write(1, {"x": 1.0})
    writer = board._writer
    monkeypatch.setattr(board._writer, "flush", full)
    monkeypatch.setattr(board._writer, "close", full)
    for step in (2, 3):
        board.write(step, {"x": 1.0})
    board.close()
    assert warnings_of.text.count("TensorBoard's files cannot be written") == 1
    monkeypatch.undo()
    writer.close()  # its thread would otherwise outlive the folder
