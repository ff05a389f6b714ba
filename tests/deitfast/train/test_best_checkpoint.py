"""The best checkpoint of a run: of the best validation top-1, plain or averaged, whichever is better."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deitfast.config.recipe import DistillSpec
from deitfast.distill.teacher import load_teacher
from deitfast.models.vit import build_model
from deitfast.run_folder import RunFolder
from deitfast.train import trainer
from deitfast.weights import checkpoint
from deitfast.weights.adapt import init_from_pretrained
from deitfast.weights.load import load_model
from deitfast.weights.read import read_weights
from tests.helpers.command_line import call
from tests.helpers.small_runs import run, tiny_recipe
from tests.helpers.small_teachers import distilled, judged

__all__ = ["judged"]
CPU = torch.device("cpu")
RECIPE = tiny_recipe("train.epochs=3", "train.ema=0.5", "train.checkpoint_minutes=10")


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations give planted figures: plain .2, .6, .6, averaged .1, .3, .7 in epochs 1, 2, 3."""
    original, scores = trainer.Trainer._evaluate, iter([(0.2, 0.1), (0.6, 0.3), (0.6, 0.7)])

    def evaluate(self, *arguments):
        found = original(self, *arguments)
        plain, averaged = next(scores)
        for name, top1 in (("val", plain), ("val_ema", averaged)):
            found[name]["class"]["top1"] = top1
        return found

    monkeypatch.setattr(trainer.Trainer, "_evaluate", evaluate)


def test_the_best_epochs_weights_are_kept_beside_the_last(
    capsys, tiny_small: Path, tmp_path: Path, scored, monkeypatch
) -> None:
    saved = []
    original = checkpoint.save_best
    monkeypatch.setattr(
        "deitfast.train.trainer.checkpoint.save_best",
        lambda path, epoch, top1, weights, averaged: (
            saved.append((epoch, top1, averaged)),
            original(path, epoch, top1, weights, averaged=averaged),
        ),
    )
    out = tmp_path / "run"
    run(tiny_small, out, RECIPE)
    assert saved == [(0, 0.2, False), (1, 0.6, False), (2, 0.7, True)]
    best, last = load_model(out, CPU), load_model(out, CPU, which="last")
    averaged = load_model(out, CPU, ema=True)
    assert (best.weights, best.epoch, last.weights) == ("best averaged weights", 3, "weights")
    states = [each.model.state_dict() for each in (best, averaged, last)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])
    assert read_weights(out).path == RunFolder(out).best
    code, printed, err = call(capsys, "eval", out, "--which", "best", "--device", "cpu")
    assert code == 0, err
    assert "best averaged weights of epoch 3" in " ".join(printed.split())
    code, _, err = call(capsys, "eval", out, "--which", "best", "--ema")
    assert (code, "exclude each other" in err) == (2, True)
    code, printed, err = call(capsys, "export", out, tmp_path / "x.safetensors", "--which", "last")
    assert code == 0, err
    assert torch.equal(read_weights(tmp_path / "x.safetensors").tensors["head.weight"], states[2]["head.weight"])
    classes, written = RunFolder(out).info().classes, {}
    for which, state in (("best", states[0]), ("last", states[2]), ("auto", states[0])):
        teacher = load_teacher(DistillSpec(mode="hard", teacher=str(out), teacher_checkpoint=which), classes)
        assert torch.equal(teacher.model.state_dict()["head.weight"], state["head.weight"])
        for start in ("weights", "finetune"):
            spec = replace(RECIPE.model, start_checkpoint=which, **{start: str(out)})
            model = build_model(spec, size=32, classes=len(classes), distilled=False)
            init_from_pretrained(model, spec, classes)
            assert torch.equal(model.state_dict()["head.weight"], state["head.weight"])
        if which != "auto":
            file = tmp_path / f"{which}.json"
            code, _, err = call(capsys, "predict", out, tiny_small, "--which", which, "--json", file, "--device", "cpu")
            assert code == 0, err
            written[which] = file.read_text()
    assert written["best"] != written["last"]


@pytest.mark.parametrize("head", ["class", "distillation", "joint"])
def test_the_head_that_predicts_picks_the_best_and_stands_in_the_line(
    tiny_small: Path, tmp_path: Path, judged, monkeypatch, caplog, head: str
) -> None:
    original, scores = trainer.Trainer._evaluate, {"class": 0.11, "distillation": 0.22, "joint": 0.33}

    def evaluate(self, *arguments):
        found = original(self, *arguments)
        for name, top1 in scores.items():
            found["val"][name]["top1"] = top1
        return found

    monkeypatch.setattr(trainer.Trainer, "_evaluate", evaluate)
    row = run(tiny_small, tmp_path / "run", distilled("train.epochs=1", f"model.prediction={head}"))
    assert set(row["val"]) == set(scores)
    assert checkpoint.best_before(RunFolder(tmp_path / "run").best, 1) == scores[head]
    assert f"top-1 {scores[head]:.2%}" in caplog.text
