"""The report: what a person finds in it, what it makes of damage, and that its images are the run's own."""

import json
import re
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deitfast.config import recipe as recipes
from deitfast.config.recipe import Recipe
from deitfast.data_loaders import open_training
from deitfast.distill.teacher import Teacher, load_teacher
from deitfast.report import live, samples
from deitfast.report.live import LiveReport
from deitfast.report.read import read_run
from deitfast.report.write import write_report
from deitfast.run_folder import RunFolder
from pipelines.augment.chain import augment
from pipelines.errors import DeitfastError
from pipelines.storage.dataset import Dataset
from tests.helpers.report_runs import Outline, fake, page_of
from tests.helpers.small_runs import CPU, run, tiny_recipe
from tests.helpers.small_teachers import taught

FILES = ("recipe.toml", "run.json", "environment.json", "metrics.jsonl", "evaluation.json", "checkpoint.pt")


@pytest.fixture(scope="module")
def trained(tiny_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of two epochs and its teacher beside it."""
    folder = tmp_path_factory.mktemp("runs")
    run(tiny_small, folder / "teacher", tiny_recipe("model.arch=vit_ti", "train.epochs=1", "train.ema=0"))
    distilled = tiny_recipe("distill.mode=hard", f"distill.teacher={folder / 'teacher'}")
    run(tiny_small, folder / "student", distilled, report=True)
    return folder / "student"


def test_training_leaves_a_page_that_needs_nothing_else(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    outline = Outline(page)
    assert outline.open == []
    assert outline.outside == []
    assert "script" not in outline.tags
    assert "@import" not in page
    assert "url(http" not in page
    assert outline.tags.count("svg") == 10  # eight panels, confusion matrix, accuracy of each class
    assert outline.tags.count("img") == samples.SHOWN
    final = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    for head in ("class", "distillation", "joint"):
        for weights in ("val", "val_ema"):
            assert f"{100 * final[weights][head]['top5']:.2f}" in outline.text
    assert "2 of 2 epochs, hard, exact targets, from teacher" in outline.text
    assert "prefers-color-scheme: dark" in page
    assert not (trained / "tensorboard").exists()  # nobody asked for it
    table = (trained / "report.md").read_text()
    assert f"| joint | averaged | {100 * final['val_ema']['joint']['top1']:.2f} |" in table


def test_the_same_run_gives_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    pages = []
    for name in ("one", "other"):
        write_report([trained], tmp_path / f"{name}.html", tmp_path / f"{name}.md")
        pages.append((tmp_path / f"{name}.html").read_bytes())
    assert pages[0] == pages[1] == (trained / "report.html").read_bytes()


def test_figures_share_no_ids_that_differ(trained: Path) -> None:
    """Inline figures live in one document: an id that stands twice must be the same thing twice."""
    page = (trained / "report.html").read_text()
    found: dict[str, set[str]] = {}
    for element in re.findall(r'<(?:path|clipPath|rect|image)\b[^>]*\bid="[^"]+"[^>]*>', page):
        found.setdefault(re.search(r'id="([^"]+)"', element)[1], set()).add(element)  # pyright: ignore
    assert found
    assert all(len(elements) == 1 for elements in found.values())


@pytest.mark.parametrize("settings", [(), ("augment.repeats=2",), ("augment.mixup=0.0", "augment.cutmix=0.0")])
def test_images_and_teacher_classes_are_those_of_the_runs_first_step(
    tiny_small: Path, trained: Path, tmp_path: Path, monkeypatch, settings: tuple[str, ...]
) -> None:
    recipe = recipes.override(read_recipe(trained), recipes.parse_settings(["train.batch=64", *settings]))
    with closing(Dataset.open(tiny_small)) as dataset:
        with closing(open_training(dataset, recipe, CPU)) as loader:
            whole = augment(next(loader.epoch(0)), recipe.augment, dtype=torch.float32, train=True)
        reader, read = dataset.split("train"), []
        original = type(reader).read_verified
        monkeypatch.setattr(type(reader), "read_verified", lambda self, n: read.append(n) or original(self, n))
        monkeypatch.setattr(samples, "why_not", lambda name: "the compiled codec reads where nothing counts")
        few, shown = samples.first_inputs(dataset, recipe)
        assert len(shown) == samples.SHOWN
        assert sorted(read) == sorted(set(few.params.sample.tolist()))
        assert len(read) <= 2 * samples.SHOWN
        answers, note = samples._teacher_classes(recipe, dataset.spec.classes, few, shown)
    row = {pair: n for n, pair in enumerate(zip(whole.params.sample, whole.params.view, strict=True))}
    rows = [row[pair] for pair in zip(few.params.sample[shown], few.params.view[shown], strict=True)]
    assert torch.equal(few.pixels[shown], whole.pixels[rows])
    assert torch.equal(few.lam[shown], whole.lam[rows])
    assert torch.equal(few.mix_labels[shown], whole.mix_labels[rows])
    teacher = Teacher(load_teacher(recipe.distill, tuple("abcdefghij")), recipe, CPU)
    labels = teacher.logits(whole.pixels).argmax(1)[rows]
    assert answers == ["abcdefghij"[label] for label in labels.tolist()]
    assert note == ""
    if recipe.augment.repeats == 1:  # from a cache, of a teacher who is gone
        taught(tiny_small, tmp_path / "cache", recipes.override(recipe, {"train.epochs": 1}))
        alone = recipes.override(recipe, {"distill.teacher": "", "distill.cache": str(tmp_path / "cache")})
        assert samples._teacher_classes(alone, tuple("abcdefghij"), few, shown) == (answers, "")


def read_recipe(folder: Path) -> Recipe:
    return recipes.load(str(folder / "recipe.toml"))


def test_pictures_are_the_pixels_before_normalization(tiny_small: Path, trained: Path) -> None:
    recipe = recipes.override(
        read_recipe(trained), {"augment.mixup": 0.0, "augment.cutmix": 0.0, "augment.erasing": 0.0}
    )
    spec = replace(recipe.augment, policy="none", color_jitter=0.0, flip=0.0, padding=0)
    with closing(Dataset.open(tiny_small)) as dataset:
        inputs, shown = samples.first_inputs(dataset, replace(recipe, augment=spec))
        stored = dataset.split("train").sample(int(inputs.params.sample[shown[0]])).reshape(32, 32, 3)
    assert np.array_equal(samples.pixels_of(inputs.pixels[shown], spec)[0], stored)


def test_targets_and_steps_are_told(trained: Path) -> None:
    pictures, note = samples.samples_of(read_run(trained))
    assert note == ""
    for picture in pictures:
        assert sum(share for _, share in picture.target) == pytest.approx(1)
        assert picture.teacher in tuple("abcdefghij")
        assert picture.image.startswith("data:image/png;base64,")
        assert len(picture.target) == 1 or set(picture.operations) & {"MixUp", "CutMix"}


@pytest.mark.parametrize("missing", FILES)
def test_a_run_cut_short_is_reported_as_far_as_it_goes(trained: Path, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / missing).unlink()
    (notes,) = [read_run(folder).notes]
    assert len(notes) == 1
    assert missing.partition(".")[0] in notes[0]
    text = Outline(page_of(folder)).text
    assert notes[0] in text
    if missing != "metrics.jsonl":
        assert "Every head" in text
    assert notes[0] in (folder.parent / "page.md").read_text()


def test_class_names_and_paths_are_text_not_markup(tmp_path: Path) -> None:
    classes = ("<script>alert(1)</script>", "a & b", "$\\frac{$", "猫", '"quoted"', "|")
    folder = fake(tmp_path / "<i>run&", classes=classes)
    page = page_of(folder)
    outline = Outline(page)
    assert "script" not in outline.tags
    assert "i" not in outline.tags
    for name in classes:
        assert name in outline.text
    assert "<i>run&" in outline.text


def test_refreshing_keeps_to_its_share_of_the_time(tmp_path: Path, monkeypatch) -> None:
    clock, written = [0.0], []
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])

    def slow_write(*arguments: object) -> None:
        written.append(clock[0])
        clock[0] += 5

    monkeypatch.setattr(live, "write", slow_write)
    report = LiveReport(fake(tmp_path / "run"))
    for _ in range(200):
        clock[0] += 10
        report.refresh()
    assert written[0] == 100 * live.FIRST_SECONDS
    assert 2 <= len(written) <= 4
    assert 5 * len(written) <= live.TIME_SHARE * clock[0]


def test_a_report_that_fails_costs_a_warning_not_the_run(tiny_small: Path, tmp_path: Path, monkeypatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(live, "write", broken)
    row = run(tiny_small, tmp_path / "run", tiny_recipe("train.epochs=1", "train.ema=0"), report=True)
    assert row["epoch"] == 1
    assert "the report could not be written: RuntimeError: no font" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("error", [DeitfastError("disk gone"), OSError("disk gone")])
def test_images_that_cannot_be_had_are_a_sentence(trained: Path, monkeypatch, error: Exception) -> None:
    def gone(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(samples.Dataset, "open", gone)
    assert samples.samples_of(read_run(trained)) == ([], "No training images are shown: disk gone.")


def test_another_data_set_in_the_same_place_is_not_shown(trained: Path) -> None:
    record = read_run(trained)
    pictures, note = samples.samples_of(replace(record, info=record.info | {"fingerprint": "other"}))
    assert pictures == []
    assert "holds another data set by now" in note


def test_a_metrics_file_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DeitfastError, match=r"metrics\.jsonl is a folder"):
        RunFolder(tmp_path).metrics()
