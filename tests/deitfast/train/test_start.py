"""Runs that start from weights: what they begin with, what the folder says, and that --resume needs no file."""

import json
from pathlib import Path

import pytest
import torch

from deitfast.run_folder import RunFolder
from pipelines.errors import UserError
from tests.helpers.command_line import call
from tests.helpers.published_weights import hugging_face, timm_model
from tests.helpers.small_runs import EVERY_STEP, CrashError, crash_after, run, tiny_recipe, weights

STILL = ("optim.lr=1e-12", "schedule.warmup_epochs=0", "schedule.min_lr=0.0", "train.epochs=1", "model.patch=8")
"""A run that learns nothing to speak of: what it ends with is what it began with."""
OFFICIAL = "model.depth=12", "model.assume_class_order=true"
"""What the weights of `official` need."""


@pytest.fixture
def official(tmp_path: Path) -> Path:
    torch.save({"model": timm_model(classes=10).state_dict()}, tmp_path / "official.pth")
    return tmp_path / "official.pth"


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-6)


def test_a_run_begins_with_the_weights_it_is_given(tiny_small: Path, tmp_path: Path, official: Path) -> None:
    run(tiny_small, tmp_path / "run", tiny_recipe(*STILL, *OFFICIAL, f"model.weights={official}"))
    theirs, found = timm_model(classes=10).state_dict(), weights(tmp_path / "run")
    for name, value in theirs.items():
        assert same(found[name], value), name
        assert same(found[f"average of {name}"], value), name
    start = RunFolder(tmp_path / "run").info().start
    assert (start["file"], start["kind"]) == (str(official), "DeiT and timm")
    assert start["fitted"].startswith("as they are, classes matched in the data set's order")
    assert len(start["blake2b"]) == 32


@pytest.mark.parametrize(("kept", "classes"), [(True, "abcdefghij"), (False, "klmnopqrst")])
def test_fine_tuning_a_run_keeps_its_head_for_the_same_classes_only(
    tiny_small: Path, tmp_path: Path, kept: bool, classes: str
) -> None:
    run(tiny_small, tmp_path / "first", tiny_recipe(*STILL, "train.seed=5"))
    described = tmp_path / "first" / "run.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"classes": list(classes)}))
    recipe = tiny_recipe(*STILL, "augment.size=48", f"model.finetune={tmp_path / 'first'}")
    run(tiny_small, tmp_path / "second", recipe)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert same(first["blocks.1.mlp.fc1.weight"], second["blocks.1.mlp.fc1.weight"])
    assert same(first["pos_embed"][:, :1], second["pos_embed"][:, :1])
    assert second["pos_embed"].shape == (1, 37, 192)
    assert same(first["head.weight"], second["head.weight"]) == kept
    start = RunFolder(tmp_path / "second").info().start
    assert start["fitted"] == "positions 4^2 -> 6^2, " + ("heads kept, matched by name" if kept else "new: head")
    if not kept:
        with pytest.raises(UserError, match="does not know class a"):
            run(tiny_small, tmp_path / "third", tiny_recipe(*STILL, f"model.weights={tmp_path / 'first'}"))


def test_a_resumed_run_neither_needs_nor_applies_its_weights(
    tiny_small: Path, tmp_path: Path, official: Path, monkeypatch
) -> None:
    recipe = tiny_recipe("model.patch=8", "model.depth=12", f"model.finetune={official}", EVERY_STEP)
    run(tiny_small, tmp_path / "whole", recipe)
    with monkeypatch.context() as patch:
        crash_after(patch, 3)
        with pytest.raises(CrashError):
            run(tiny_small, tmp_path / "cut", recipe)
    official.unlink()
    run(tiny_small, tmp_path / "cut", recipe, resume=True)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert RunFolder(tmp_path / "cut").info().start["kind"] == "DeiT and timm"


def test_a_run_without_a_checkpoint_begins_again_with_the_same_weights_only(
    tiny_small: Path, tmp_path: Path, official: Path
) -> None:
    recipe = tiny_recipe(*STILL, *OFFICIAL, f"model.weights={official}")
    run(tiny_small, tmp_path / "run", recipe)
    for name in ("checkpoint.pt", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    run(tiny_small, tmp_path / "run", recipe, resume=True)
    (tmp_path / "run" / "checkpoint.pt").unlink()
    other = timm_model(classes=10)
    torch.nn.init.zeros_(other.head.weight)
    torch.save({"model": other.state_dict()}, official)
    with pytest.raises(UserError, match=r"is not what .* was started from"):
        run(tiny_small, tmp_path / "run", recipe, resume=True)


def test_a_user_fine_tunes_resumes_and_exports(capsys, tiny_small: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    hugging_face("with_teacher", classes=1000).save_pretrained("published")
    line = ["train", "--data", tiny_small, "--finetune", "published", "--batch", 16, "--epochs", 1, "--out", "run"]
    line += ["--set", "augment.mix_group=8", "--ablate", "no-erasing", "--ablate", "no-mixup"]
    code, out, err = call(capsys, *line)
    assert code == 0, err
    assert "new: head, head_dist" in out.replace("\n", " ")
    recipe = RunFolder(Path("run")).recipe()
    assert (recipe.model.token, recipe.model.patch, recipe.augment.size) == ("on", 8, 32)
    assert (recipe.augment.erasing, recipe.augment.mixup) == (0, 0)
    Path("published/model.safetensors").unlink()
    assert call(capsys, *line, "--resume")[0] == 0
    assert call(capsys, "export", "run", "out.safetensors", "--ema")[0] == 0
    code, out, err = call(
        capsys, "eval", "--weights", "out.safetensors", "--data", tiny_small, "--json", "m.json", "--check"
    )
    assert code == 0, err
    assert "changed predictions" in out
    report = json.loads(Path("m.json").read_text())
    assert set(report["heads"]) == {"class", "distillation", "joint"}
    assert (report["check"]["images"], report["check"]["changed"], report["check"]["logits"]) == (20, 0, 0.0)


def test_the_same_line_with_a_recipe_goes_on(capsys, tiny_small: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": timm_model(distilled=True, patch=16).state_dict()}, "d.pth")
    line = ["train", "--data", tiny_small, "--recipe", "deit_ti_cifar10", "--finetune", "d.pth", "--out", "run"]
    line += ["--batch", 16, "--epochs", 1, "--set", "augment.mix_group=8", "--set", "model.patch=16"]
    assert call(capsys, *line)[0] == 0
    code, _, err = call(capsys, *line, "--resume")
    assert code == 0, err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["train", "--weights", "a.pth", "--finetune", "b.pth"], "mutually exclusive"),
        (["train", "--weights", "a.pth"], "weights file not found: a.pth"),
        (["train", "--ablate", "no-mixing"], "unknown ablation no-mixing"),
        (["train", "--recipe", "deit_b_384_finetune"], "starts from trained weights"),
        (["eval"], "give a run folder or --weights FILE"),
        (["eval", "run", "--weights", "a.pth"], "give a run folder or --weights FILE"),
        (["eval", "--weights", "a.pth"], "weights file not found: a.pth"),
        (["eval", "--weights", "a.pth", "--arch", "alexnet"], "'alexnet' is not one of"),
        (["eval", "run", "--set", "augment.size=3"], "--arch and --set require --weights"),
        (["export", "run", "out.safetensors"], "weights file not found: run"),
        (["export", "run", "out", "--format", "tflite"], "there is no format tflite"),
        (["export", "run", "out.safetensors", "--format", "onnx"], "would not be what its name says"),
    ],
)
def test_mistakes_are_named(capsys, tiny_small: Path, tmp_path: Path, monkeypatch, line: list[str], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(tiny_small)] if line[0] != "export" else []
    code, _, err = call(capsys, *line, *data)
    assert code == 2, err
    assert says in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("loader", ["cpu", "reference"])
def test_check_compares_loaders_on_the_same_images(
    capsys, tiny_dataset: Path, tmp_path: Path, monkeypatch, loader: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(timm_model(size=224, patch=16, classes=4).state_dict(), "four.pth")
    line = ["eval", "--weights", "four.pth", "--arch", "deit_ti", "--data", tiny_dataset, "--split", "train"]
    line += ["--set", "train.amp=off", "--assume-class-order"]
    code, out, err = call(capsys, *line, "--loader", loader, "--check", "--json", "m.json")
    assert code == 0, err
    assert f"{loader} loader against the reference loader" in out
    check = json.loads(Path("m.json").read_text())["check"]
    assert check["images"] == 32
    assert check["logits"] == 0 if loader == "reference" else check["logits"] < 0.1
    assert check["changed"] <= 1
