"""From options to a recipe: what wins, what is fitted, what is told; arguments and environment before that."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from deitfast.cli.app import COMMANDS, app
from deitfast.cli.arguments import check_launcher, expand_home
from deitfast.cli.options import FLAGS, DataFacts, RecipeOptions, make_recipe, plan_training, unfinished_run
from deitfast.cli.train import train
from deitfast.config.recipe import Recipe, flatten
from deitfast.run_folder import RunFolder, RunInfo, resume_command
from pipelines.errors import UserError
from tests.helpers.command_line import call
from tests.helpers.published_weights import timm_model

PHOTOS = DataFacts("folder", 400, (60, 60), "f", validated=True)
MANY = DataFacts("imagenet", 400, (1300,) * 1000, "f", validated=True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, without a launcher's variables."""
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DEITFAST_DATA"):
        monkeypatch.delenv(name, raising=False)


def test_every_flag_sets_a_field_that_is_there() -> None:
    assert set(FLAGS.values()) <= set(flatten(Recipe()))
    assert FLAGS.keys() <= inspect.signature(train).parameters.keys()


def test_ablations_yield_to_options_and_those_to_set() -> None:
    options = RecipeOptions.of(ablate=["sgd"], epochs=7, batch=64, settings=["train.epochs=9", "optim.lr=0.2"])
    recipe, _ = make_recipe(options, MANY, None)
    assert (recipe.optim.name, recipe.optim.lr, recipe.train.epochs, recipe.train.batch) == ("sgd", 0.2, 9, 64)


def test_a_method_yields_to_set_and_stands_in_the_folder_s_name() -> None:
    options = RecipeOptions.of(method="class-embedding", teacher="regnet_y_16gf", settings=["distill.alpha=0.7"])
    recipe, notes = make_recipe(options, MANY, None)
    assert (recipe.distill.mode, recipe.distill.alpha, recipe.model.prediction) == ("hard", 0.7, "class")
    assert not any("changes nothing" in note or "no effect" in note for note in notes)
    assert plan_training(options, data=None, out=None).job.out.name == "demo-deit_ti-class-embedding"
    with pytest.raises(UserError, match="--method and --distill are mutually exclusive"):
        RecipeOptions.of(method="class-embedding", distill="hard")


@pytest.mark.parametrize("arch", ["resnet18", "vit_ti"])
def test_a_network_without_a_distillation_token_learns_through_its_class_head(arch: str) -> None:
    typed = {"arch": arch, "distill": "hard", "teacher": "regnet_y_16gf"}
    recipe, notes = make_recipe(RecipeOptions.of(**typed), MANY, None)
    assert (recipe.distill.head, recipe.distilled) == ("class", False)
    assert any(note.startswith(f"{arch} has no distillation token: its class head") for note in notes)
    with pytest.raises(UserError, match="has no distillation token"):
        make_recipe(RecipeOptions.of(**typed, settings=["distill.head=distillation"]), MANY, None)


def test_all_mistakes_are_told_at_once_however_they_were_made() -> None:
    options = RecipeOptions.of(batch=-1, settings=["train.epcohs=3", "model.arch=alexnet", "augment.size=100"])
    with pytest.raises(UserError) as caught:
        make_recipe(options, PHOTOS, None)
    told = str(caught.value)
    for name in ("train.batch", "did you mean train.epochs", "model.arch", "augment.size 100"):
        assert name in told


def test_defaults_fit_the_data_and_a_file_s_own_fields_stay(tmp_path: Path) -> None:
    recipe, notes = make_recipe(RecipeOptions.of(), PHOTOS, None)
    assert (recipe.train.batch, recipe.augment.mix_group) == (96, 32)
    assert any("batch 96 instead of 1,024" in note for note in notes)
    (tmp_path / "mine.toml").write_text('extends = "deit_ti_imagenet"\n[train]\nbatch = 1024')
    with pytest.raises(UserError, match=r"train\.batch 1024 does not fit 120 images"):
        make_recipe(RecipeOptions.of(recipe="mine.toml"), PHOTOS, None)


@pytest.mark.parametrize("recipe", ["", "deit_ti_cifar10"])
def test_images_are_normalized_as_the_weights_ask_for_whatever_the_recipe(tmp_path: Path, recipe: str) -> None:
    config = json.dumps({"architecture": "deit_tiny_patch16_224", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    save_file(timm_model(patch=4).state_dict(), tmp_path / "weights.safetensors", {"timm": config})
    asked = {"recipe": recipe} if recipe else {}
    found, notes = make_recipe(RecipeOptions.of(finetune=tmp_path / "weights.safetensors", **asked), MANY, None)
    assert (found.augment.mean, found.augment.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert any(note.startswith("normalization as") for note in notes)


def test_a_share_of_the_images_counts_as_the_loader_counts_it() -> None:
    assert PHOTOS.images(0.1) == 12
    assert DataFacts("folder", 400, (1, 0, 5), "f", validated=True).images(0.5) == 4


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["augment.color_jitter=0.4"], "augment.color_jitter has no effect"),
        (["optim.momentum=0.5"], "optim.momentum has no effect"),
        (["distill.tau=2"], "distill.tau has no effect"),
        (["train.seed=0"], "train.seed = 0 changes nothing"),
        (["augment.mixup=0", "augment.cutmix=0", "augment.mix_group=32"], "augment.mix_group has no effect"),
    ],
)
def test_a_setting_without_effect_is_told(typed: list[str], says: str) -> None:
    _, notes = make_recipe(RecipeOptions.of(settings=typed), MANY, None)
    assert any(note.startswith(says) for note in notes), notes


def test_an_ablation_without_effect_is_told() -> None:
    small = DataFacts("cifar10", 32, (5000,) * 10, "f", validated=True)
    _, notes = make_recipe(RecipeOptions.of(ablate=["no-repeated-augmentation"]), small, None)
    assert any(note.startswith("augment.repeats = 1 changes nothing") for note in notes)


def start_run(name: str, options: RecipeOptions, fingerprint: str = "f") -> RunFolder:
    """Write what a run that was started and never finished an epoch leaves in runs/."""
    folder = RunFolder(Path("runs") / name)
    command = ("deitfast", "train", "--data", "d")
    folder.create(make_recipe(options, PHOTOS, None)[0], RunInfo("d", "folder", fingerprint, ("a", "b"), command))
    return folder


def test_resume_without_a_folder_finds_the_run_of_this_recipe_and_data() -> None:
    options = RecipeOptions.of(epochs=5)
    ours = start_run("ours", options)
    start_run("longer", RecipeOptions.of(epochs=6))
    start_run("other-data", options, fingerprint="another")
    start_run("done", options).append({"epoch": 5, "loss": 1.0})  # the newest one, to which nothing is left to do
    ours.append({"epoch": 4, "loss": 1.0})
    assert unfinished_run(make_recipe(options, PHOTOS, None)[0], PHOTOS, options) == ours
    with pytest.raises(UserError, match="no unfinished run") as caught:
        unfinished_run(make_recipe(RecipeOptions.of(epochs=7), PHOTOS, None)[0], PHOTOS, RecipeOptions.of(epochs=7))
    assert caught.value.remedy.endswith("--resume")


def test_the_line_that_started_a_run_makes_its_recipe_again_on_any_number_of_ranks(monkeypatch) -> None:
    options = RecipeOptions.of(recipe="deit_ti_imagenet", settings=["optim.lr=1e-3"], ablate=["no-erasing"])
    ours = start_run("ours", options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert make_recipe(options, PHOTOS, None)[0] != ours.recipe()
    assert make_recipe(options, PHOTOS, ours)[0] == ours.recipe()


def test_the_line_that_resumes_a_run_is_the_one_that_started_it() -> None:
    folder = Path("runs/a b")
    started = ("/usr/bin/deitfast", "train", "--data", "d", "--epochs", "5")
    assert resume_command(folder, started) == "deitfast train --data d --epochs 5 --out 'runs/a b' --resume"
    named = ("/x/deitfast/__main__.py", "train", "--out=runs/x", "--resume")
    assert resume_command(folder, named) == "python -m deitfast train --out=runs/x --resume"
    assert resume_command(folder, ()) == "deitfast train --out 'runs/a b' --resume"


@pytest.mark.parametrize(
    ("argument", "expanded"),
    [
        ("~/x", "{}/x"), ("~", "{}"), ("--out=~/x", "--out={}/x"), ("distill.teacher=~/t", "distill.teacher={}/t"),
        ("a~/b", "a~/b"), ("~other/x", "~other/x"), ("--out", "--out"), ("", ""),
    ],
)  # fmt: skip
def test_home_is_expanded_where_a_shell_does_not(argument: str, expanded: str) -> None:
    assert expand_home(argument) == expanded.format(Path.home())


@pytest.mark.parametrize(
    ("line", "after"),
    [
        (["eval", "r", "--json", ""], "--json"),
        (["eval", "r", "--json="], "--json"),
        (["convert", "folder", ""], "folder"),
        ([""], "deitfast"),
    ],
)
def test_an_empty_argument_is_named(capsys: pytest.CaptureFixture[str], line: list[str], after: str) -> None:
    code, _, err = call(capsys, *line)
    assert (code, f"nothing is given after {after}" in err) == (2, True)


def test_a_name_that_is_no_text_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "train", "--out", "a\udcff")  # as Python reads a byte of Latin-1
    assert (code, "'a\\udcff' is no text in UTF-8" in err) == (2, True)


@pytest.mark.parametrize(
    "left_over",
    [
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"},
        {"RANK": "1"},
        {"WORLD_SIZE": "two"},
        {"LOCAL_RANK": "-1"},
        {"LOCAL_WORLD_SIZE": "0"},
        {"LOCAL_WORLD_SIZE": "two"},
    ],
)
def test_variables_left_over_by_a_launcher_are_named(capsys, monkeypatch, left_over: dict[str, str]) -> None:
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    code, _, err = call(capsys, "train")
    assert code == 2
    name, value = next(iter(left_over.items()))
    assert f"{name}={value}" in err
    assert "unset" in err
    assert not list(Path.cwd().iterdir())


def test_a_launcher_s_variables_pass(monkeypatch) -> None:
    check_launcher()
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    check_launcher()


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("deitfast tr", "train"),
        ("deitfast train --recipe deit_ti_c", "deit_ti_cifar100"),
        ("deitfast train --arch regnet", "regnet_y_16gf"),
        ("deitfast train --ablate no-m", "no-mixup"),
        ("deitfast eval x --loader r", "resident"),
        ("deitfast train --set optim.l", "optim.lr="),
        ("deitfast convert ima", "imagenet"),
        ("deitfast train --distill h", "hard"),
    ],
)
def test_completion_knows_the_choices_without_torch(words: str, completed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "deitfast"], capture_output=True, text=True,
        env={**os.environ, "_DEITFAST_COMPLETE": "complete_bash", "COMP_WORDS": words,
             "COMP_CWORD": str(len(words.split()) - 1)},
    )  # fmt: skip
    assert completed in done.stdout.split(), done.stderr[-500:]
    assert " torch\n" not in done.stderr


def test_help_lists_the_commands_in_the_order_of_their_use() -> None:
    listed = [(command.rich_help_panel, command.name) for command in app.registered_commands]
    assert listed == [(panel, name) for panel, names in COMMANDS.items() for name in names]


@pytest.mark.parametrize("command", ["train", "teach", "eval", "export", "convert", "bench", "report"])
def test_every_option_stands_in_a_panel(command: str) -> None:
    info = next(each for each in app.registered_commands if (each.name or each.callback.__name__).strip("_") == command)
    for name, annotation in info.callback.__annotations__.items():
        for option in getattr(annotation, "__metadata__", ()):
            if type(option).__name__ == "OptionInfo":
                assert option.rich_help_panel, name
                assert option.help, name
