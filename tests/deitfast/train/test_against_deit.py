"""`deitfast train` itself, as a command, against facebookresearch/deit's own loop: what one learns, the other does.

Thirty steps from the same weights on the same batches. All that happens behind the model's input is compared, so also
that the run uses what its pieces compute: the rate scaled by the batch, its schedule, every group's rate, gradients
that are zeroed and clipped, the average after the update, and the weights that are evaluated.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from deitfast.eval.evaluate import final_head
from deitfast.run_folder import RunFolder
from deitfast.train.step import TrainStep
from pipelines.storage.dataset import Dataset
from tests.helpers import deit_reference as deit
from tests.helpers.command_line import call
from tests.helpers.small_runs import weights

STEPS = 30
LOSS, WEIGHT = 1e-6, 2e-5
ADAMW = ("optim.lr=0.002", "optim.weight_decay=0.5", "optim.eps=1e-6", "schedule.min_lr=0.0005")
"""An epsilon above rounding: the keys' bias has no gradient, and Adam makes a step of what rounding leaves of none."""
SGD = ("optim.name=sgd", "optim.lr=0.05", "optim.weight_decay=0.0005", "schedule.min_lr=0.01")
BY_EPOCH = ("schedule.per=epoch", "schedule.warmup_lr=0.0002")
"""The reference's own schedule: a rate for each epoch."""
SETTINGS = (
    "model.patch=16", f"model.depth={deit.DEPTH}", f"model.width={deit.WIDTH}", "augment.mix_group=4",
    "optim.lr_batch=16", "schedule.warmup_epochs=1", "distill.normalization=batch_classes", "train.amp=off",
)  # fmt: skip
"""Batches of 8, a rate for 16; the reference's divisor of the soft term, its only one."""


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of weights have two blocks instead of twelve, for speed; no report, which is no part of this."""
    monkeypatch.setattr("deitfast.weights.read.STANDARD_DEPTH", deit.DEPTH)
    monkeypatch.setattr("deitfast.report.live.LiveReport.write", lambda self, **options: None)


@pytest.fixture
def learned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return a function (data, mode, settings) that runs the command and watches its steps."""

    def learn(data: Path, mode: str, *settings: str) -> deit.Learned:
        found, step = deit.Learned(), TrainStep.step

        def watched(self: TrainStep, *arguments: Any) -> torch.Tensor:
            losses = step(self, *arguments)
            found.losses.append(losses[0].item())
            found.rates.append(deit.rates_of(self.model, self.optimizer))
            return losses

        monkeypatch.setattr(TrainStep, "step", watched)
        options = ["--distill", mode, "--weights", tmp_path / "start.pth", "--assume-class-order"]
        options += ["--teacher", tmp_path / "teacher.pth", "--cache", "none"] if mode != "none" else []
        for setting in (*SETTINGS, *settings):
            options += ["--set", setting]
        code, _, err = call(
            capsys, "train", "--data", data, "--arch", "deit_ti", "--epochs", 3, "--batch", 8, "--device", "cpu",
            "--out", tmp_path / "run", *options,
        )  # fmt: skip
        assert code == 0, err
        last = weights(tmp_path / "run")
        found.weights = {name: value for name, value in last.items() if not name.startswith("average of ")}
        found.averages = {
            name[len("average of ") :]: value for name, value in last.items() if name not in found.weights
        }
        row = RunFolder(tmp_path / "run").metrics()[-1]
        found.evaluated = {name: row[name][final_head(row[name])]["loss"] for name in ("val", "val_ema") if name in row}
        return found

    return learn


def assert_same(ours: deit.Learned, theirs: deit.Learned) -> None:
    assert len(ours.losses) == len(theirs.losses) == STEPS
    assert ours.losses == pytest.approx(theirs.losses, abs=LOSS)
    assert all(one == pytest.approx(other, rel=1e-9) for one, other in zip(ours.rates, theirs.rates, strict=True))
    for one, other in ((ours.weights, theirs.weights), (ours.averages, theirs.averages)):
        assert one.keys() == other.keys()
        apart = {name: (value - other[name]).abs().max().item() for name, value in one.items()}
        assert max(apart.values(), default=0) <= WEIGHT, max(apart.items(), key=lambda each: each[1])
    assert ours.evaluated == pytest.approx(theirs.evaluated, abs=1e-5)


def compare(learned: Any, data: Path, folder: Path, mode: str, *settings: str) -> tuple[deit.Learned, deit.Learned]:
    """Train twice, by the command and by the reference, from weights and with a teacher that timm drew."""
    torch.manual_seed(0)
    start, teacher = deit.network(distilled=mode != "none").state_dict(), deit.network(distilled=False)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save(start, folder / "start.pth")
    torch.save(teacher.state_dict(), folder / "teacher.pth")
    ours = learned(data, mode, *settings)
    recipe = RunFolder(folder / "run").recipe()
    with closing(Dataset.open(data)) as dataset:
        theirs = deit.train_as_deit(dataset, recipe, start, teacher if mode != "none" else None)
    assert_same(ours, theirs)
    if recipe.optim.clip:
        assert theirs.clipped > STEPS // 3
    assert max(theirs.losses) - min(theirs.losses) > 1e-3
    if theirs.averages:
        assert theirs.evaluated["val"] != pytest.approx(theirs.evaluated["val_ema"], abs=3e-5)
    return ours, theirs


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("none", (*ADAMW, "optim.clip=0.5", "train.ema=0.9", "model.drop_path=0.2", "train.seed=3")),
        ("soft", (*SGD, "train.ema=0.9", *BY_EPOCH)),
        ("hard", (*ADAMW, "optim.layer_decay=0.7", "train.smoothing=0", "train.ema=0")),
    ],
    ids=["none-adamw-clip-drop_path", "soft-sgd-by_epoch", "hard-adamw-layer_decay"],
)
def test_a_run_learns_what_deits_own_loop_does(
    learned: Any, tiny_small: Path, tmp_path: Path, mode: str, settings: tuple[str, ...]
) -> None:
    compare(learned, tiny_small, tmp_path, mode, *settings)


PLAIN = ("augment.mixup=0", "augment.cutmix=0")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "soft", "hard"])
@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize(
    "settings",
    [
        ("optim.clip=0", "train.smoothing=0"),
        ("optim.clip=0.5", "train.smoothing=0.1", *BY_EPOCH),
        ("optim.clip=0.5", "train.smoothing=0", *PLAIN),
        ("optim.clip=0", "train.smoothing=0.1", *PLAIN, *BY_EPOCH),
    ],
    ids=["mixed", "clip-smoothing-mixed-by_epoch", "clip", "smoothing-by_epoch"],
)
def test_whatever_the_settings(
    learned: Any, tiny_small: Path, tmp_path: Path, mode: str, optimizer: tuple[str, ...], settings: tuple[str, ...]
) -> None:
    compare(learned, tiny_small, tmp_path, mode, *optimizer, "train.ema=0.9", *settings)
