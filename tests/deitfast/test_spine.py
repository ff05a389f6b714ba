"""The way from the command line to the optimizer's step is short, and nothing is begun that is going to be refused."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deitfast.distill import teacher as teacher_module
from deitfast.train import trainer as trainer_module
from tests.helpers.command_line import call
from tests.helpers.small_runs import run, tiny_recipe

ROOT = Path(__file__).parents[2]
SMALL = (
    "--arch",
    "vit_ti",
    "--batch",
    16,
    "--device",
    "cpu",
    "--set",
    "augment.mix_group=8",
    "--set",
    "model.patch=16",
)


@pytest.fixture(scope="module")
def taken(tiny_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    run(tiny_small, out, tiny_recipe("train.epochs=1"))
    return out


def own_frames() -> list[str]:
    """Return the functions of ours that are on the stack, the outermost first."""
    found, frame = [], sys._getframe(1)
    while frame := frame.f_back:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT / "deitfast") or file.is_relative_to(ROOT / "pipelines"):
            found.append(f"{file.stem}.{frame.f_code.co_name}")
    return found[::-1]


def test_six_frames_lead_from_main_to_the_optimizer(
    capsys: pytest.CaptureFixture[str], tiny_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    original: Callable = torch.optim.AdamW.step

    def stepping(self, *arguments, **options):
        seen.append(own_frames())
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    code, _, err = call(capsys, "train", "--data", tiny_small, "--out", tmp_path / "run", "--epochs", 1, *SMALL)
    assert code == 0, err
    assert len(seen[0]) <= 6, seen[0]


@pytest.mark.parametrize("words", [(), ("--per-image",), ("--views", "3")], ids=lambda words: " ".join(words))
def test_a_taken_folder_is_refused_before_anything_is_opened(
    capsys: pytest.CaptureFixture[str],
    tiny_small: Path,
    taken: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    def touched(*arguments: object, **options: object) -> None:
        raise AssertionError("opened before the folder was refused")

    for name in ("open_training", "open_split", "TrainStep"):
        monkeypatch.setattr(trainer_module, name, touched)
    monkeypatch.setattr(teacher_module, "load_teacher", touched)
    distill = ("--distill", "hard", "--teacher", taken)
    settings = (*SMALL, *distill, "--arch", "deit_ti", *words)
    code, _, err = call(capsys, "train", "--data", tiny_small, "--out", taken, *settings)
    assert code == 2
    assert "already holds a run" in err, err
