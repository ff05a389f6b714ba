"""One Ctrl-C is enough: whatever a run is doing it ends soon, and goes on later as if nothing had been."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from deitfast.distill import targets as targets_module
from deitfast.interrupt import Interrupted, Stop, catching_signals
from deitfast.progress import Display
from deitfast.report import live
from deitfast.run_folder import RunFolder
from deitfast.train import step as step_module
from deitfast.train import trainer as train_module
from deitfast.train.job import TrainJob
from deitfast.train.trainer import train
from pipelines.loaders import host
from tests.helpers.small_runs import CPU, EVERY_STEP, SOON, run, tiny_recipe, weights
from tests.helpers.small_teachers import distilled, judged, taught

__all__ = ["judged"]
RECIPE = tiny_recipe("loader.name=reference", "train.epochs=1", "train.ema=0", EVERY_STEP)
LONG = 60.0
"""Seconds that what is interrupted would have taken."""


def interrupted_then_slow(*arguments: object, **options: object) -> None:
    """Press Ctrl-C, and go on for a long time."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(LONG)


def stopped(data: Path, out: Path, **runtime: bool) -> float:
    """Train until Ctrl-C comes; return the seconds it took in all."""
    job = TrainJob(RECIPE, data, out, resume=False, command=("test",))
    began = time.monotonic()
    with pytest.raises(Interrupted):
        train(job, replace(CPU, **runtime), Display(Console(), quiet=True))
    return time.monotonic() - began


def goes_on(data: Path, out: Path, whole: Path) -> None:
    """Resume, and hold the result against an undisturbed run's."""
    run(data, out, RECIPE, resume=True, report=True)
    assert [row["epoch"] for row in RunFolder(out).metrics()] == [1]
    ours, theirs = weights(out), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (out / "report.html").exists()


@pytest.fixture(scope="module")
def whole(tiny_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(tiny_small, out, RECIPE)
    return out


def test_while_evaluating(tiny_small: Path, tmp_path: Path, whole: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", interrupted_then_slow)
        assert stopped(tiny_small, tmp_path / "run") < SOON
    assert RunFolder(tmp_path / "run").checkpoint.exists()
    assert RunFolder(tmp_path / "run").metrics() == []
    goes_on(tiny_small, tmp_path / "run", whole)


def test_while_the_report_is_written(tiny_small: Path, tmp_path: Path, whole: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(live, "samples_of", interrupted_then_slow)
        assert stopped(tiny_small, tmp_path / "run") < SOON
    goes_on(tiny_small, tmp_path / "run", whole)


def test_while_images_come_slowly(tiny_small: Path, tmp_path: Path, whole: Path, monkeypatch) -> None:
    """The batch that is being made is given up as well: at 1 s an image it would take 8 s more."""
    original, calls = host.decode_window, []

    def slow(*arguments: object):
        calls.append(None)
        if len(calls) == 40:
            os.kill(os.getpid(), signal.SIGINT)
        if len(calls) >= 40:
            time.sleep(1.0)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(host, "decode_window", slow)
        assert stopped(tiny_small, tmp_path / "run") < SOON
    assert len(calls) < 46
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("deitfast")]
    goes_on(tiny_small, tmp_path / "run", whole)


def test_while_a_complete_cache_is_checked(tiny_small: Path, tmp_path: Path, judged, monkeypatch) -> None:
    taught(tiny_small, tmp_path / "cache", distilled())
    monkeypatch.setattr(targets_module, "spot_check", interrupted_then_slow)
    began = time.monotonic()
    with pytest.raises(Interrupted):
        taught(tiny_small, tmp_path / "cache", distilled())
    assert time.monotonic() - began < SOON


@pytest.mark.parametrize("compiled", [False, True])
def test_while_the_first_step_compiles(
    tiny_small: Path, tmp_path: Path, whole: Path, monkeypatch, compiled: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(step_module.TrainStep, "step", interrupted_then_slow)
        patch.setattr(torch.nn.Module, "compile", lambda *arguments, **how: None)
        patch.setattr(torch, "compile", lambda function, **how: function)
        assert stopped(tiny_small, tmp_path / "run", compile=compiled) < SOON
    assert RunFolder(tmp_path / "run").checkpoint.exists()
    goes_on(tiny_small, tmp_path / "run", whole)


def test_between_steps_a_request_waits_for_the_step(tiny_small: Path, tmp_path: Path, whole: Path, monkeypatch) -> None:
    original: Callable = step_module.TrainStep.step
    done = []

    def asked_in_the_middle(self, *arguments):
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        done.append(None)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step_module.TrainStep, "step", asked_in_the_middle)
        stopped(tiny_small, tmp_path / "run")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["steps"] == 3
    assert "stopped at epoch 1, step 3. Resume: deitfast train --out" in (tmp_path / "run" / "log.txt").read_text()
    goes_on(tiny_small, tmp_path / "run", whole)


def test_what_diverged_unseen_is_not_saved(
    tiny_small: Path, tmp_path: Path, whole: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    original: Callable = step_module.TrainStep.step
    done = []

    def diverged(self, *arguments):
        losses = original(self, *arguments)
        if done:  # what was saved after the first step is not proved by this loss: the run goes back to its start
            os.kill(os.getpid(), signal.SIGINT)
            losses *= float("nan")
        done.append(None)
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(step_module.TrainStep, "step", diverged)
        stopped(tiny_small, tmp_path / "run")
    assert "the loss is not finite at epoch 1, step 2" in caplog.text
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["steps"] == 0
    goes_on(tiny_small, tmp_path / "run", whole)


def test_several_ranks_leave_together_only() -> None:
    stop = Stop(replace(CPU, world=2))
    stop.handle_signal(signal.SIGINT, None)
    with stop.interruptible():
        pass
    stop.check(sync=False)


def test_a_second_signal_ends_at_once_and_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with catching_signals(CPU) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)  # a logout sends both
        assert stop.signal == signal.SIGTERM
        with pytest.raises(Interrupted), stop.interruptible():
            pytest.fail("the block was entered")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
