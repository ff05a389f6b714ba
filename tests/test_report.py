"""The report: what a person finds in it, what it makes of damage, and that its images are the run's own."""

import json
import re
import shutil
from contextlib import closing
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import CPU, run, tiny_recipe
from teaching import taught
from test_cli import call

from deitfast import recipe as recipes
from deitfast.data import open_training
from deitfast.recipe import Recipe
from deitfast.report import live, samples, summary
from deitfast.report.compare import differences, efficiency, lessons
from deitfast.report.live import LiveReport
from deitfast.report.read import distinct, read_run, read_runs
from deitfast.report.write import write_report
from deitfast.teacher import Teacher, load_teacher
from pipelines.augment.chain import augment
from pipelines.errors import Failure, Mistake
from pipelines.storage.dataset import Dataset

TWO = ("a", "b")
FILES = ("recipe.toml", "run.json", "environment.json", "metrics.jsonl", "evaluation.json", "checkpoint.pt")


@pytest.fixture(scope="module")
def trained(tiny_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of two epochs and its teacher beside it."""
    folder = tmp_path_factory.mktemp("runs")
    run(tiny_small, folder / "teacher", tiny_recipe("model.arch=vit_ti", "train.epochs=1", "train.ema=0"))
    distilled = tiny_recipe("distill.mode=hard", f"distill.teacher={folder / 'teacher'}")
    run(tiny_small, folder / "student", distilled)
    return folder / "student"


def fake(
    folder: Path, *settings: str, top1: float = 0.5, classes: tuple[str, ...] = ("a", "b"), data: str = "x"
) -> Path:
    """Write a run's folder as training would, without training: two epochs, one head, `top1` at the end."""
    folder.mkdir(parents=True)
    recipe = recipes.override(Recipe(), ["model.arch=vit_ti", "train.epochs=2", *settings])
    (folder / "recipe.toml").write_text(recipes.dump(recipe))
    about = {"data": "nowhere", "dataset": data, "fingerprint": data, "classes": classes, "command": [], "start": {}}
    (folder / "run.json").write_text(json.dumps(about))
    rows = []
    for epoch in (1, 2):
        figures = {"samples": 10, "top1": top1 * epoch / 2, "top5": 1.0, "loss": 1.0}
        row = {"epoch": epoch, "loss": 2.0 / epoch, "images": 100, "seconds": 10.0, "waited_seconds": 1.0}
        rows.append({**row, "lr": 0.1, "images_per_second": 10.0, "val": {"class": figures}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    confusion = (5 * np.eye(len(classes), dtype=int) + np.eye(len(classes), k=1, dtype=int)).tolist()
    evaluation = {"epoch": 2, "classes": classes, "val": {"class": {"top1": top1, "confusion": confusion}}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "environment.json").write_text("{}")
    (folder / "checkpoint.pt").write_bytes(b"")
    return folder


def page_of(*folders: Path) -> str:
    """Return the page of some runs; the Markdown file stands beside it."""
    out = folders[0].parent / "page.html"
    write_report(list(folders), out, out.with_suffix(".md"))
    return out.read_text()


class Outline(HTMLParser):
    """Elements that are open, what is loaded from elsewhere, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("data:", "#")):
                self.outside.append(f"{tag} {name} {value}")
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


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
def test_images_and_teachers_answers_are_those_of_the_runs_first_step(
    tiny_small: Path, trained: Path, tmp_path: Path, monkeypatch, settings: tuple[str, ...]
) -> None:
    recipe = recipes.override(read_recipe(trained), ["train.batch=64", *settings])
    with closing(Dataset.open(tiny_small)) as dataset:
        with closing(open_training(dataset, recipe, CPU)) as loader:
            whole = augment(next(loader.epoch(0)), recipe.augment, dtype=torch.float32, train=True)
        reader, read = dataset.split("train"), []
        original = type(reader).checked_sample
        monkeypatch.setattr(type(reader), "checked_sample", lambda self, n: read.append(n) or original(self, n))
        few, shown = samples.first_inputs(dataset, recipe)
        assert len(shown) == samples.SHOWN
        assert sorted(read) == sorted(set(few.params.sample.tolist()))
        assert len(read) <= 2 * samples.SHOWN
        answers, note = samples._teachers_answers(recipe, dataset.spec.classes, few, shown)
    row = {pair: n for n, pair in enumerate(zip(whole.params.sample, whole.params.view, strict=True))}
    rows = [row[pair] for pair in zip(few.params.sample[shown], few.params.view[shown], strict=True)]
    assert torch.equal(few.pixels[shown], whole.pixels[rows])
    assert torch.equal(few.share[shown], whole.share[rows])
    assert torch.equal(few.partner_labels[shown], whole.partner_labels[rows])
    teacher = Teacher(load_teacher(recipe.distill, tuple("abcdefghij")), recipe, CPU)
    labels = teacher.logits(whole.pixels).argmax(1)[rows]
    assert answers == ["abcdefghij"[label] for label in labels.tolist()]
    assert note == ""
    if recipe.augment.repeats == 1:  # from a cache, of a teacher who is gone
        taught(tiny_small, tmp_path / "cache", recipes.override(recipe, ["train.epochs=1"]))
        alone = recipes.override(recipe, ["distill.teacher=", f"distill.cache={tmp_path / 'cache'}"])
        assert samples._teachers_answers(alone, tuple("abcdefghij"), few, shown) == (answers, "")


def read_recipe(folder: Path) -> Recipe:
    return recipes.load(str(folder / "recipe.toml"))


def test_pictures_are_the_pixels_before_normalisation(tiny_small: Path, trained: Path) -> None:
    recipe = recipes.override(read_recipe(trained), ["augment.mixup=0.0", "augment.cutmix=0.0", "augment.erasing=0.0"])
    spec = replace(recipe.augment, policy="none", colour_jitter=0.0, flip=0.0, padding=0)
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
        assert len(picture.target) == 1 or set(picture.done) & {"MixUp", "CutMix"}


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


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    folder = fake(tmp_path / "run")
    damaged = ("recipe.toml", "run.json", "environment.json", "evaluation.json")
    for file in damaged:
        (folder / file).write_bytes(content)
    text = Outline(page_of(folder)).text
    for file in damaged:
        assert file in text


def test_a_confusion_matrix_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    folder = fake(tmp_path / "run")
    for confusion in ([[1]], [[1, 2], [3]], [[1, -1], [0, 1]], "x", [[1e400, 0], [0, 1]]):
        (folder / "evaluation.json").write_text(json.dumps({"val": {"class": {"confusion": confusion}}}))
        record = read_run(folder)
        assert record.confusion() is None
        assert record.notes == ("evaluation.json has no confusion matrix that fits the class names.",)


def test_a_damaged_line_is_skipped_and_counted(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = fake(tmp_path / "run")
    whole = (folder / "metrics.jsonl").read_text()
    half = whole.splitlines()[1][:40]
    (folder / "metrics.jsonl").write_bytes(
        f'{whole.splitlines()[0]}\n[3]\n"x"\n{{"loss": 1}}\n{half}'.encode() + b"\xff"
    )
    code, out, err = call(capsys, "report", folder)
    assert code == 0
    assert "4 lines of metrics.jsonl could not be read" in err
    assert f"wrote {folder / 'report.html'}" in out
    text = Outline((folder / "report.html").read_text()).text
    assert "4 lines of metrics.jsonl could not be read and are left out." in text
    assert "1 of 2 epochs (not finished)" in text
    assert "25.00 %" in text


def test_what_is_no_run_is_refused_by_name(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    fake(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        code, _, err = call(capsys, "report", "run", folder)
        assert code == 2
        assert f"there is no run in {folder}" in err
    assert call(capsys, "report", "run", "--out", "x.md")[0] == 2
    assert not list(tmp_path.glob("*.html"))


def test_runs_of_different_data_sets_are_compared_with_a_warning(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    fake(tmp_path / "one", top1=0.4)
    fake(tmp_path / "two", top1=0.6, data="y")
    code, out, err = call(capsys, "report", "one", "two")
    assert code == 0
    assert "one and two were trained on different data sets (x and y)" in err
    assert "wrote report.html" in out
    text = Outline(Path("report.html").read_text()).text
    assert "different data sets" in text
    assert "40.00" in text
    assert "60.00" in text


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


@pytest.mark.parametrize(("count", "drawn", "listed"), [(10, 2, False), (100, 2, True), (1000, 1, True)])
def test_reports_suit_the_number_of_classes(tmp_path: Path, count: int, drawn: int, listed: bool) -> None:
    folder = fake(tmp_path / "run", classes=tuple(f"class {n}" for n in range(count)))
    page = page_of(folder)
    outline = Outline(page)
    assert outline.tags.count("svg") == 8 + drawn
    assert ("Recognised worst" in outline.text) == listed
    assert "Taken for each other most often" in outline.text
    assert len(page) < 300_000


def test_accuracy_of_classes_and_confused_pairs_are_counted_right() -> None:
    confusion = np.array([[8, 2, 0], [5, 5, 0], [0, 0, 0]])
    assert summary.recalls(confusion)[:2].tolist() == [0.8, 0.5]
    assert np.isnan(summary.recalls(confusion)[2])
    assert summary.confused(confusion, ("a", "b", "c")).rows == [["b", "a", "5", "50.0"], ["a", "b", "2", "20.0"]]
    assert [row[0] for row in summary.extremes(confusion, ("a", "b", "c"), best=False).rows] == ["b", "a"]


def test_runs_are_told_apart_and_their_recipes_compared(tmp_path: Path) -> None:
    runs = read_runs([fake(tmp_path / "a" / "run"), fake(tmp_path / "b" / "run", "optim.lr=0.25", "augment.mixup=0")])
    assert [each.name for each in runs] == ["a/run", "b/run"]
    found = {each.field: each.values for each in differences(runs)}
    assert found == {"augment.mixup": ("0.8", "0"), "optim.lr": ("0.0005", "0.25")}
    assert distinct([tmp_path, tmp_path]) == [tmp_path.name, tmp_path.name]


def test_fractions_of_the_data_make_a_curve_for_each_recipe(tmp_path: Path) -> None:
    folders = [fake(tmp_path / f"vit-{f}", f"train.fraction={f}", top1=f / 2) for f in (1.0, 0.25, 0.5)]
    folders += [fake(tmp_path / "cnn", "model.arch=resnet18", "train.fraction=0.5", "loader.workers=3", top1=0.1)]
    curves = efficiency(read_runs(folders))
    assert [(each.label, each.points) for each in curves] == [
        ("vit_ti", ((0.25, 0.125), (0.5, 0.25), (1.0, 0.5))),
        ("resnet18", ((0.5, 0.1),)),
    ]
    assert "Data efficiency" in page_of(*folders)
    assert efficiency(read_runs(folders[:1])) == []


def test_teachers_are_held_beside_their_students(tmp_path: Path) -> None:
    strong, lost = fake(tmp_path / "strong", "model.arch=resnet50", top1=0.8), tmp_path / "lost"
    taught = ["distill.mode=hard", "model.arch=deit_ti"]
    folders = [fake(tmp_path / f"by-{t.name}", *taught, f"distill.teacher={t}") for t in (strong, lost)]
    found = lessons(read_runs([*folders, strong]))
    assert [(each.teacher, each.arch, each.top1) for each in found] == [("strong", "resnet50", 0.8), ("lost", "", None)]
    assert "Teachers and students" in page_of(*folders)


def test_fields_of_later_versions_are_listed(tmp_path: Path) -> None:
    folder = fake(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    added = [{"cache": "written", "memory_gb": 1.5}, {"cache": "read", "memory_gb": 2.5, "nested": {"x": 1}}]
    lines = [json.dumps(row | more) + "\n" for row, more in zip(rows, added, strict=True)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    assert read_run(folder).extras() == {"cache": "read", "memory_gb": "1.5 to 2.5"}
    assert "1.5 to 2.5" in Outline(page_of(folder)).text


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
    row = run(tiny_small, tmp_path / "run", tiny_recipe("train.epochs=1", "train.ema=0"))
    assert row["epoch"] == 1
    assert "the report could not be written: RuntimeError: no font" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("error", [Failure("disk gone"), OSError("disk gone")])
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


def test_a_folder_without_any_file_of_a_run_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="there is no run in"):
        read_run(tmp_path)
