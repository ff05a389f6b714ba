"""Training: what a run leaves behind, and that an interrupted one ends where an undisturbed one does."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deitfast.progress import LOGGERS
from deitfast.run_folder import RunFolder
from deitfast.train import step as step_module
from deitfast.train.checkpointer import Checkpointer
from deitfast.train.monitor import StepMonitor
from deitfast.train.optim import learning_rate, peak_lr
from deitfast.train.trainer import Trainer
from deitfast.weights.load import load_model
from pipelines.errors import DeitfastError, UserError
from tests.helpers.small_runs import EVERY_STEP, CrashError, crash_after, run, tiny_recipe, weights


@pytest.fixture(scope="module")
def teacher(tiny_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "teacher"
    run(tiny_small, out, tiny_recipe("model.arch=vit_ti", "train.epochs=1", "train.ema=0"))
    return out


def test_a_run_leaves_what_is_needed_to_read_and_repeat_it(tiny_small: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    row = run(tiny_small, tmp_path / "run", recipe)
    folder = RunFolder(tmp_path / "run")
    assert folder.recipe() == recipe
    assert folder.info().classes == tuple("abcdefghij")
    assert json.loads((folder.path / "environment.json").read_text())["libraries"]["torch"]
    assert "epoch 2/2" in folder.log.read_text()
    rows = folder.metrics()
    assert [each["epoch"] for each in rows] == [1, 2]
    assert rows[-1] == row
    assert row["images"] == 80
    assert row["val"]["class"]["samples"] == 20
    assert row["val_ema"]["class"]["samples"] == 20
    assert math.isfinite(row["loss"])
    assert 0 < row["waited_seconds"] < row["seconds"]
    assert folder.finished()
    evaluation = json.loads(folder.evaluation.read_text())
    assert evaluation["epoch"] == 2
    assert sum(map(sum, evaluation["val"]["class"]["confusion"])) == 20
    assert load_model(folder.path, torch.device("cpu"), which="last").epoch == 2


@pytest.mark.parametrize(("mode", "steps"), [("none", 2), ("soft", 5), ("hard", 7)])
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(
    tiny_small: Path, tmp_path: Path, teacher: Path, monkeypatch, mode: str, steps: int
) -> None:
    distill = [f"distill.mode={mode}", f"distill.teacher={teacher}"] if mode != "none" else []
    recipe = tiny_recipe(*distill, EVERY_STEP)
    undisturbed = run(tiny_small, tmp_path / "whole", recipe)
    with monkeypatch.context() as patch:
        crash_after(patch, steps)
        with pytest.raises(CrashError):
            run(tiny_small, tmp_path / "cut", recipe)
    resumed = run(tiny_small, tmp_path / "cut", recipe, resume=True)
    timing = {"seconds", "images_per_second", "waited_seconds"}
    assert {k: v for k, v in resumed.items() if k not in timing} == {
        k: v for k, v in undisturbed.items() if k not in timing
    }
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert [row["epoch"] for row in RunFolder(tmp_path / "cut").metrics()] == [1, 2]


def test_distillation_learns_from_the_teacher(tiny_small: Path, tmp_path: Path, teacher: Path) -> None:
    row = run(tiny_small, tmp_path / "run", tiny_recipe("distill.mode=hard", f"distill.teacher={teacher}"))
    assert set(row["val"]) == {"class", "distillation", "joint"}
    assert row["distill"] > 0
    assert row["loss"] == pytest.approx(0.5 * row["base"] + 0.5 * row["distill"], rel=1e-4)


def test_accumulation_changes_memory_not_what_is_learned(tiny_small: Path, tmp_path: Path) -> None:
    plain = ("train.epochs=1", "model.drop_path=0.5", "optim.name=sgd", "optim.lr=0.1")
    run(tiny_small, tmp_path / "one", tiny_recipe(*plain))
    run(tiny_small, tmp_path / "four", tiny_recipe(*plain, "train.accumulate=4"))
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    for name in one:
        assert torch.allclose(one[name].float(), four[name].float(), atol=2e-5), name


@pytest.mark.parametrize("settings", [(), ("schedule.shape=constant",)])
def test_a_finished_run_is_lengthened_and_says_what_that_does_to_its_rate(
    tiny_small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: tuple[str, ...]
) -> None:
    plain = ("train.ema=0", "schedule.warmup_epochs=1", "schedule.min_lr=0.00001", *settings)
    out, recipes = tmp_path / "run", [tiny_recipe(*plain, f"train.epochs={epochs}") for epochs in (2, 4)]
    run(tiny_small, out, recipes[0])
    caplog.clear()
    row = run(tiny_small, out, recipes[1], resume=True)
    assert [each["epoch"] for each in RunFolder(out).metrics()] == [1, 2, 3, 4]
    assert row["epoch"] == 4
    assert RunFolder(out).recipe() == recipes[1]
    peak = peak_lr(recipes[0].optim, 16)
    old, new = (learning_rate(recipe.schedule, peak, recipe.train.epochs, 5, *at) for recipe, at in
                zip(recipes, ((1, 4), (2, 0)), strict=True))  # fmt: skip
    if settings:
        assert f"2 epochs are now 4: the rate stays on its course, at {new:.3g}" in caplog.text
    else:
        assert f"goes from {old:.3g} to {new:.3g}; a run of that length" in caplog.text
        assert new > 1.5 * old
    with pytest.raises(UserError, match=r"train\.epochs 4 -> 2"):
        run(tiny_small, out, recipes[0], resume=True)
    before = weights(out)
    run(tiny_small, out, recipes[1], resume=True)  # nothing is left to do
    after = weights(out)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resume_refuses_another_run(tiny_small: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("train.epochs=1")
    run(tiny_small, tmp_path / "run", recipe)
    with pytest.raises(UserError, match="already holds a run"):
        run(tiny_small, tmp_path / "run", recipe)
    with pytest.raises(UserError, match=r"optim\.lr 0\.001 -> 0\.002"):
        run(tiny_small, tmp_path / "run", tiny_recipe("train.epochs=1", "optim.lr=0.002"), resume=True)
    with pytest.raises(UserError, match="another data set"):
        run(tiny_dataset, tmp_path / "run", recipe, resume=True)
    run(tiny_small, tmp_path / "run", tiny_recipe("train.epochs=1", "loader.prefetch=1"), resume=True)


@pytest.mark.parametrize("content", [b"", b'{"data": "somewhere"}', b"\xff", None])
def test_a_run_that_does_not_say_what_it_is_of_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "run.json"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(DeitfastError, match=r"run\.json is damaged") as raised:
        RunFolder(tmp_path).info()
    assert raised.value.remedy


def test_two_runs_in_one_folder_are_refused(tiny_small: Path, tmp_path: Path, monkeypatch) -> None:
    recipe, refused = tiny_recipe("train.epochs=1"), []

    def again(folder: RunFolder, row: dict) -> None:
        monkeypatch.undo()
        with pytest.raises(UserError, match="another run is writing here"):
            run(tiny_small, tmp_path / "run", recipe, resume=True)
        refused.append(row)

    monkeypatch.setattr(RunFolder, "append", again)
    run(tiny_small, tmp_path / "run", recipe)
    assert refused


def test_a_log_that_finds_no_room_costs_no_run(tiny_small: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    for logger in LOGGERS:  # a command that ran in this process may have left its own
        monkeypatch.setattr(logger, "handlers", [])
    recipe = tiny_recipe("train.epochs=1", "train.ema=0")
    for name, file in (("full", "/dev/full"), ("gone", "/nowhere/log.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.txt").symlink_to(file)
    run(tiny_small, tmp_path / "full", recipe)
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(DeitfastError, match=r"cannot write .*log.txt"):
        run(tiny_small, tmp_path / "gone", recipe)


def test_a_teacher_of_other_classes_is_refused(tiny_dataset: Path, tmp_path: Path, teacher: Path) -> None:
    recipe = tiny_recipe("distill.mode=hard", f"distill.teacher={teacher}")
    with pytest.raises(UserError, match="does not know class ant") as caught:
        run(tiny_dataset, tmp_path / "run", recipe)
    assert "10 classes: a, b, c" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_stays_non_finite_ends_the_run(tiny_small: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("optim.name=sgd", "optim.lr=100", "optim.lr_batch=1", "schedule.warmup_epochs=0", EVERY_STEP)
    with pytest.raises(DeitfastError, match="is not finite"):
        run(tiny_small, tmp_path / "run", recipe)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


def test_a_loss_that_was_not_finite_once_costs_no_run(tiny_small: Path, tmp_path: Path, monkeypatch) -> None:
    original, calls = step_module.TrainStep.step, []

    def sometimes_bad(self, *arguments):
        calls.append(None)
        losses = original(self, *arguments)
        return losses * math.nan if len(calls) == 7 else losses

    undisturbed = run(tiny_small, tmp_path / "good", tiny_recipe())
    monkeypatch.setattr(step_module.TrainStep, "step", sometimes_bad)
    recovered = run(tiny_small, tmp_path / "bad", tiny_recipe(EVERY_STEP))
    assert recovered["loss"] == undisturbed["loss"]
    good, bad = weights(tmp_path / "good"), weights(tmp_path / "bad")
    assert all(torch.equal(good[name], bad[name]) for name in good)


@pytest.mark.parametrize("at", [1, 5, 10], ids=["first step", "last of an epoch", "last of all"])
def test_a_gradient_that_is_not_finite_once_costs_no_run(
    tiny_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Its loss is finite, and the weights after it are not: they are never saved, and the run goes back."""
    original, calls = step_module.TrainStep.step, []

    def sometimes_bad(self, *arguments):
        calls.append(None)
        if len(calls) != at:
            return original(self, *arguments)
        weight = next(weight for weight in self.model.parameters() if weight.ndim > 1)
        handle = weight.register_hook(lambda gradient: gradient * math.nan)
        try:
            return original(self, *arguments)
        finally:
            handle.remove()

    run(tiny_small, tmp_path / "good", tiny_recipe())
    monkeypatch.setattr(step_module.TrainStep, "step", sometimes_bad)
    run(tiny_small, tmp_path / "bad", tiny_recipe())
    good, bad = weights(tmp_path / "good"), weights(tmp_path / "bad")
    assert all(torch.equal(good[name], bad[name]) for name in good)
    assert len(calls) > 10


def test_a_look_proves_the_checkpoint_before_the_step_that_it_has_seen(
    tiny_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the step at which it looks: on a GPU the sums that it reads are those of an earlier look."""
    proved: list[tuple[tuple[int, int], tuple[int, int]]] = []
    after_step, prove = StepMonitor.after_step, Checkpointer.prove
    now = [(0, 0)]

    def late(self, state, *arguments):
        seen, now[0] = after_step(self, state, *arguments), (state.epoch, state.steps)
        return replace(seen, finite_at=(state.epoch, state.steps - 1)) if seen else None

    def watched(self, epoch, steps):
        proved.append((now[0], (epoch, steps)))
        prove(self, epoch, steps)

    monkeypatch.setattr("deitfast.train.monitor.LOOK_SECONDS", 0.0)
    monkeypatch.setattr(StepMonitor, "after_step", late)
    monkeypatch.setattr(Checkpointer, "prove", watched)
    run(tiny_small, tmp_path / "run", tiny_recipe("train.epochs=1", "train.ema=0"))
    ahead = [(looked[1], seen[1]) for looked, seen in proved]
    assert ahead == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (5, 5)]  # the epoch's end waits for all of it


def test_the_bar_tells_rate_waiting_and_the_end_of_the_run() -> None:
    """After 4 of 5 steps of the second of 3 epochs; two evaluations are to come."""
    said, logged = [], []
    run = SimpleNamespace(
        recipe=tiny_recipe("train.epochs=3", "train.batch=16", "train.evaluate_every=1"),
        state=SimpleNamespace(epoch=1, steps=4, seconds=2.0, waited=0.5),
        loop=SimpleNamespace(loader=SimpleNamespace(steps_per_epoch=5)),
        callbacks=SimpleNamespace(log_step=lambda step, **figures: logged.append((step, figures))),
        seconds_to_evaluate=10.0,
        _steps_done=lambda: 9,
    )
    bar = SimpleNamespace(reach=lambda *shown: said.append(shown))
    Trainer._show(run, bar, {"loss": 1.5})  # pyright: ignore[reportArgumentType]
    assert said == [(4, "loss 1.500, 32 images/s, waiting 25%, run ends in 23 s")]
    assert logged == [(9, {"loss": 1.5, "images_per_second": 32, "waiting": 0.25})]


@pytest.mark.parametrize(("top1", "saved"), [(0.59, 0), (0.6, 0), (0.61, 1)])
def test_only_a_better_epoch_takes_the_best_ones_place(tmp_path: Path, top1: float, saved: int) -> None:
    """Of equals the earlier stays: it is the one that was told, and may be in use."""
    written = []
    run = SimpleNamespace(
        recipe=tiny_recipe(),
        folder=RunFolder(tmp_path),
        best_top1=0.6,
        step=SimpleNamespace(ema=None, model=None),
        checkpoints=SimpleNamespace(save_best=lambda *values, averaged: written.append(values)),
    )
    said = Trainer._save_best(run, {"epoch": 3, "val": {"class": {"top1": top1}}})  # pyright: ignore
    assert (len(written), bool(said), run.best_top1) == (saved, bool(saved), max(0.6, top1))
