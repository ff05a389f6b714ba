"""The report of several runs: what they are compared by, and what it makes of damage and of what is no run."""

import copy
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from markupsafe import Markup

from deitfast.report import figures, summary
from deitfast.report.compare import differences, distillation_pairs, efficiency
from deitfast.report.curves import panels
from deitfast.report.markdown import markdown, markdown_table
from deitfast.report.page import page
from deitfast.report.read import distinct, read_run, read_runs
from pipelines.errors import UserError
from tests.helpers.command_line import call
from tests.helpers.report_runs import Outline, fake, page_of

TWO = ("a", "b")


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    folder = fake(tmp_path / "run")
    damaged = ("recipe.toml", "run.json", "environment.json", "evaluation.json")
    for file in damaged:
        (folder / file).write_bytes(content)
    text = Outline(page_of(folder)).text
    for file in damaged:
        assert file in text


JUNK = (None, 1e308, "x", True, [[1]], {"class": 3})


@pytest.mark.parametrize("file", ["run.json", "environment.json", "evaluation.json", "metrics.jsonl", "recipe.toml"])
def test_a_field_of_another_type_ends_no_report(tmp_path: Path, monkeypatch, file: str) -> None:
    for drawing in ("panel", "matrix", "bars", "ranked", "data_efficiency"):
        monkeypatch.setattr(figures, drawing, lambda *arguments, **more: Markup(""))
    folder = fake(tmp_path / "run", "distill.mode=hard", "model.arch=deit_ti")
    path = folder / file
    if file == "recipe.toml":
        tree, dump = tomllib.loads(path.read_text()), tomli_w.dumps
    else:
        tree, dump = json.loads(path.read_text().splitlines()[-1]), json.dumps
    tree |= {"libraries": {}, "devices": []} if file == "environment.json" else {}
    for place in [(key,) for key in tree] + [
        (key, k) for key, value in tree.items() if isinstance(value, dict) for k in value
    ]:
        for junk in JUNK:
            changed = copy.deepcopy(tree)
            branch = changed if len(place) == 1 else changed[place[0]]
            branch[place[-1]] = junk
            if file == "recipe.toml" and (junk is None or place[0] in ("optim", "schedule", "loader")):
                continue  # TOML has no null; these sections are only listed
            path.write_text(dump(changed))
            runs = read_runs([folder])
            markdown(runs)
            page(runs, [([], "")])
            page(runs * 2, [([], "")] * 2)


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
    assert "4 lines of metrics.jsonl could not be read and are left out." in call(capsys, "info", folder)[1]


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


@pytest.mark.parametrize(("count", "drawn", "listed"), [(10, 2, False), (100, 2, True), (1000, 1, True)])
def test_reports_suit_the_number_of_classes(tmp_path: Path, count: int, drawn: int, listed: bool) -> None:
    folder = fake(tmp_path / "run", classes=tuple(f"class {n}" for n in range(count)))
    page = page_of(folder)
    outline = Outline(page)
    assert outline.tags.count("svg") == 8 + drawn
    assert ("Recognized worst" in outline.text) == listed
    assert "Most frequent confusions" in outline.text
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


def test_cells_of_a_matrix_are_shaded_by_their_share_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {}
    monkeypatch.setattr(figures, "_cell", lambda axes, row, column, count, share: cells.update({(row, column): share}))
    figures.matrix(np.array([[8, 2], [5, 15]]), TWO, named=True)
    assert cells == {(0, 0): 0.8, (0, 1): 0.2, (1, 0): 0.25, (1, 1): 0.75}


def test_nothing_in_a_cell_of_a_markdown_table_is_markup() -> None:
    table = summary.TextTable(["run", "top-1"], [["a|b *c* `d` <e> [f]\\\ng", "7.0"]])
    row = r"| a\|b \*c\* \`d\` \<e\> \[f\]\\ g | 7.0 |"
    assert markdown_table(table).splitlines() == ["| run | top-1 |", "| --- | ---: |", row]


@pytest.mark.parametrize(("seconds", "unit", "x"), [(600, "minutes", [10, 20]), (7200, "hours", [2, 4])])
def test_curves_against_time_have_the_unit_that_their_axis_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, unit: str, x: list[int]
) -> None:
    metrics, drawn = fake(tmp_path / "run") / "metrics.jsonl", {}
    metrics.write_text(metrics.read_text().replace('"seconds": 10.0', f'"seconds": {seconds}'))

    def panel(title: str, axis: str, lines: list, **more: object) -> str:
        drawn[title, axis] = [list(line.x) for line in lines]
        return ""

    monkeypatch.setattr(figures, "panel", panel)
    panels(read_runs([tmp_path / "run"]))
    for title in ("loss", "validation top-1 (%)", "learning rate"):
        assert drawn[title, "epoch"][0] == [1, 2]
        assert drawn[title, f"{unit} of training"][0] == pytest.approx(x)


def test_of_two_lines_of_an_epoch_the_later_counts(tmp_path: Path) -> None:
    """Versions that only appended left both where a run went back."""
    metrics = fake(tmp_path / "run") / "metrics.jsonl"
    again = {**json.loads(metrics.read_text().splitlines()[0]), "loss": 7.0}
    metrics.write_text(metrics.read_text() + json.dumps(again) + "\n")
    (found,) = read_runs([tmp_path / "run"])
    assert [(row["epoch"], row["loss"]) for row in found.rows] == [(1, 7.0), (2, 1.0)]


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


def test_teachers_are_shown_next_to_their_students(tmp_path: Path) -> None:
    strong, lost = fake(tmp_path / "strong", "model.arch=resnet50", top1=0.8), tmp_path / "lost"
    taught = ["distill.mode=hard", "model.arch=deit_ti"]
    folders = [fake(tmp_path / f"by-{t.name}", *taught, f"distill.teacher={t}") for t in (strong, lost)]
    found = distillation_pairs(read_runs([*folders, strong]))
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


def test_a_folder_without_any_file_of_a_run_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run in"):
        read_run(tmp_path)
