"""What fits a recipe to its data is told: the data set taken, the cache's mixing, averages of a short run."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from deitfast.cli import fitting
from deitfast.cli.data_facts import data_folder
from deitfast.cli.options import RecipeOptions, make_recipe
from deitfast.config.fit_to_data import DataFacts
from tests.helpers.command_line import call

PHOTOS = DataFacts("folder", 400, (60, 60), "f", True)
MANY = DataFacts("imagenet", 400, (1300,) * 1000, "f", True)


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache that was filled for mixing groups of 8, without repeated augmentation."""
    identity = {"augment.mix_group": 8, "augment.repeats": 1, "augment.mixup": 0.8, "augment.cutmix": 1.0}
    monkeypatch.setattr(fitting, "is_cache", lambda folder: folder == tmp_path)
    monkeypatch.setattr(fitting, "read_manifest", lambda folder: SimpleNamespace(identity=identity))
    return str(tmp_path)


def test_mixing_is_the_teacher_caches(filled: str) -> None:
    recipe, notes = make_recipe(RecipeOptions.of(distill="hard", cache=filled), PHOTOS, None)
    assert (recipe.augment.mix_group, recipe.augment.repeats) == (8, 1)
    assert recipe.train.batch % 8 == 0
    said = [note for note in notes if note.endswith(f"as the teacher cache {filled} has it")]
    assert said == [
        f"augment.mix_group 8 instead of 64, augment.repeats 1 instead of 3: as the teacher cache {filled} has it"
    ]
    typed = RecipeOptions.of(distill="hard", cache=filled, settings=["augment.mix_group=16"])
    assert make_recipe(typed, PHOTOS, None)[0].augment.mix_group == 16  # and the cache refuses it by name


def test_the_averaged_weights_of_a_short_run_are_told() -> None:
    def said(facts: DataFacts, *settings: str) -> list[str]:
        _, notes = make_recipe(RecipeOptions.of(settings=list(settings)), facts, None)
        return [note for note in notes if note.startswith("averaged weights")]

    assert said(PHOTOS) == ["averaged weights: decay at most 0.971 instead of 0.99996: 300 steps in all"]
    assert said(PHOTOS, "train.ema=0.99") == []
    assert said(PHOTOS, "train.ema=0") == []
    assert said(MANY) == []


def test_a_data_set_of_one_class_is_told() -> None:
    alone = replace(PHOTOS, counts=(sum(PHOTOS.counts),))
    for facts, lines in ((PHOTOS, 0), (alone, 1)):
        _, notes = make_recipe(RecipeOptions.of(settings=[]), facts, None)
        assert [note.startswith("the data set has one class") for note in notes].count(True) == lines


@pytest.mark.parametrize(("local", "lines"), [("0", 1), ("1", 0)])
def test_a_mistake_is_told_by_a_machines_first_rank(
    capsys, monkeypatch, tmp_path: Path, local: str, lines: int
) -> None:
    monkeypatch.chdir(tmp_path)
    launcher = {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": local, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    code, _, err = call(capsys, "train", "--data", "nowhere")
    assert (code, err.count("error:")) == (2, lines)


def test_what_was_converted_is_named_where_the_demo_set_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`convert imagenet` and then `train` without --data: the demo set is trained on, which nobody should overlook."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEITFAST_DATA", raising=False)
    caplog.set_level("INFO", logger="deitfast")
    assert data_folder(None) == Path("data/demo")
    assert caplog.messages[-1].endswith("using the built-in demo set, data/demo")
    for name in ("demo", "imagenet", "my photos", "unfinished"):
        (tmp_path / "data" / name).mkdir(parents=True)
        if name != "unfinished":
            (tmp_path / "data" / name / "dataset.json").touch()
    assert data_folder(None) == Path("data/demo")
    told = "; to use data/imagenet: --data data/imagenet; to use data/my photos: --data 'data/my photos'"
    assert caplog.messages[-1].endswith("demo set, data/demo" + told)
