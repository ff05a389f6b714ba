"""Every figure a reader sees, compared with scikit-learn and plain arithmetic on planted predictions and times.

The predictions are such that no two figures are alike: precision and recall differ, the confusion matrix is not
symmetric, heads and averaged weights have figures of their own. A figure in another's place is found on any surface.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from torch import Tensor

from deitfast.eval import evaluate
from tests.helpers.command_line import call
from tests.helpers.report_runs import Outline, page_of
from tests.helpers.small_runs import run, tiny_recipe

CLASSES = tuple("abcdefghij")
IMAGES = 500
FIGURES = ("top1", "top5", "loss", "precision", "recall", "f1", "auc")
HEADS = ("class", "distillation", "joint")
ROWS = [
    {"epoch": 1, "loss": 2.75, "lr": 0.0125, "images": 1000, "seconds": 7.0, "waited_seconds": 0.5, "skipped": 3},
    {"epoch": 2, "loss": 1.25, "lr": 0.0075, "images": 3000, "seconds": 3593.0, "waited_seconds": 431.5, "skipped": 4},
]
"""Planted: 4,000 images in 3,600 s, 432 s of which were waited for data."""


@dataclass(frozen=True)
class Planted:
    """What the network is made to say of `IMAGES` images."""

    labels: Tensor
    logits: dict[str, tuple[Tensor, Tensor]]
    """By weights (val, val_ema): both heads' logits, float32 [N, C]."""

    def predictions(self, weights: str) -> evaluate.Predictions:
        """Return what a pass over the validation split gives."""
        return evaluate.Predictions(self.logits[weights], self.labels, torch.arange(len(self.labels)))

    def expected(self, weights: str, head: str) -> dict[str, float]:
        """Return every figure as scikit-learn and numpy compute it."""
        logits, labels = self.head(weights, head), self.labels.numpy()
        predicted = logits.argmax(1)
        exp = np.exp(logits - logits.max(1, keepdims=True))
        probability = exp / exp.sum(1, keepdims=True)
        macro = {"average": "macro", "zero_division": 0}
        best = np.argsort(-logits, axis=1)[:, :5]
        return {
            "top1": float((predicted == labels).mean()),
            "top5": float((best == labels[:, None]).any(1).mean()),
            "loss": float(-np.log(probability[np.arange(len(labels)), labels]).mean()),
            "precision": float(sklearn.precision_score(labels, predicted, **macro)),
            "recall": float(sklearn.recall_score(labels, predicted, **macro)),
            "f1": float(sklearn.f1_score(labels, predicted, **macro)),
            "auc": float(sklearn.roc_auc_score(labels, probability, multi_class="ovr", average="macro")),
        }

    def confusion(self, weights: str, head: str) -> np.ndarray:
        """Return the matrix [true, predicted]."""
        return sklearn.confusion_matrix(self.labels.numpy(), self.head(weights, head).argmax(1))

    def head(self, weights: str, head: str) -> np.ndarray:
        """Return a head's logits, float64 [N, C]; joint is the mean of both heads."""
        one, other = (each.double().numpy() for each in self.logits[weights])
        return {"class": one, "distillation": other, "joint": (one + other) / 2}[head]


def planted() -> Planted:
    """Draw labels of uneven classes, and logits that favor some classes, more so for some heads and weights."""
    rng = np.random.default_rng(4)
    labels = rng.choice(10, IMAGES, p=np.arange(1, 11) / 55)
    logits = {}
    for weights, strength in (("val", 1.1), ("val_ema", 1.9)):
        heads = []
        for skill, skew in ((strength, 0.35), (1.4 * strength, 0.15)):
            values = rng.normal(size=(IMAGES, 10)) + skew * np.arange(10)[::-1]
            values[np.arange(IMAGES), labels] += skill
            heads.append(torch.tensor(values, dtype=torch.float32))
        logits[weights] = (heads[0], heads[1])
    return Planted(torch.tensor(labels), logits)


PLANTED = planted()


@pytest.fixture(scope="module")
def reported(tiny_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose evaluations are planted, all else as `train` does it; then its epochs' rows are planted, too."""
    folder = tmp_path_factory.mktemp("planted") / "run"
    recipe = tiny_recipe("train.epochs=2", "model.token=on", "train.evaluate_every=2")
    with pytest.MonkeyPatch.context() as patch:
        calls = iter(("val", "val_ema"))
        patch.setattr(evaluate, "_predict", lambda *arguments: PLANTED.predictions(next(calls)))
        run(tiny_small, folder, recipe)
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    rows = [ROWS[0], {**ROWS[1], "val": row["val"], "val_ema": row["val_ema"]}]
    for each in rows:
        each["images_per_second"] = each["images"] / each["seconds"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder


def test_no_two_planted_figures_are_alike() -> None:
    shown = [
        f"{value:.4f}"
        for weights in PLANTED.logits
        for head in HEADS
        for value in PLANTED.expected(weights, head).values()
    ]
    assert len(set(shown)) == len(shown)
    confusion = PLANTED.confusion("val", "joint")
    assert (confusion != confusion.T).sum() > 50
    values = PLANTED.expected("val", "joint")
    assert abs(values["precision"] - values["recall"]) > 0.02


def written(values: dict[str, float], names: tuple[str, ...]) -> list[str]:
    """A row as report and tables write it: shares of images in per cent, the rest with three decimals."""
    return [f"{100 * values[n]:.2f}" if n.startswith("top") else f"{values[n]:.3f}" for n in names]


@pytest.mark.parametrize("weights", ["val", "val_ema"])
@pytest.mark.parametrize("head", HEADS)
def test_json_has_every_figure_under_its_name(reported: Path, weights: str, head: str) -> None:
    expected = PLANTED.expected(weights, head)
    row = json.loads((reported / "metrics.jsonl").read_text().splitlines()[-1])[weights][head]
    whole = json.loads((reported / "evaluation.json").read_text())[weights][head]
    for found in (row, whole):
        assert found["samples"] == IMAGES
        assert {name: found[name] for name in FIGURES} == pytest.approx(expected, abs=1e-6)
    assert whole["confusion"] == PLANTED.confusion(weights, head).tolist()


def cells_of(page: str) -> list[list[str]]:
    """Every table row of a page as its cells' text."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.sub(r"<[^>]+>", "\0", row).replace("\0\0", "\0").strip("\0").split("\0") for row in rows]


def rows_of(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]


def headed(rows: list[list[str]], *first: str) -> list[dict[str, str]]:
    """The tables whose header begins so, as dicts from heading to cell."""
    found, head = [], None
    for row in rows:
        if row[: len(first)] == list(first):
            head = row
        elif head and len(row) == len(head) and not set("".join(row)) <= set("-: "):
            found.append(dict(zip(head, row, strict=True)))
        elif head and len(row) != len(head):
            head = None
    return found


HEADINGS = {"top-1 (%)": "top1", "top-5 (%)": "top5", "F1": "f1", "precision": "precision", "recall": "recall"}
HEADINGS |= {"AUC": "auc", "loss": "loss"}


@pytest.mark.parametrize("surface", ["page", "markdown"])
def test_page_and_markdown_have_every_figure_under_its_heading(reported: Path, surface: str) -> None:
    page = page_of(reported)
    rows = cells_of(page) if surface == "page" else rows_of((reported.parent / "page.md").read_text())
    found = {(each["weights"], each["head"]): each for each in headed(rows, "head", "weights")}
    assert len(found) == 6
    for weights, name in (("val", "plain"), ("val_ema", "averaged")):
        for head in HEADS:
            expected = written(PLANTED.expected(weights, head), tuple(HEADINGS.values()))
            assert [found[name, head][heading] for heading in HEADINGS] == expected


@pytest.mark.parametrize("surface", ["page", "markdown"])
def test_the_table_of_runs_has_counts_times_and_rates(reported: Path, tmp_path: Path, surface: str) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        shutil.copytree(reported, folder)
    rows = (folders[1] / "metrics.jsonl").read_text().splitlines()
    (folders[1] / "metrics.jsonl").write_text(rows[0] + "\n")
    page = page_of(*folders)
    rows = cells_of(page) if surface == "page" else rows_of((tmp_path / "page.md").read_text())
    one, two = headed(rows, "run")[:2]
    expected = PLANTED.expected("val", "joint")
    assert [one[name] for name in ("top-1 (%)", "top-5 (%)", "F1", "AUC")] == written(
        expected, ("top1", "top5", "f1", "auc")
    )
    assert (one["epochs"], one["training time"], one["images/s"], one["waiting (%)"]) == (
        "2/2",
        "1 h 0 min",
        "1",
        "12.0",
    )
    assert (two["epochs"], two["training time"], two["images/s"], two["waiting (%)"]) == ("1/2", "7 s", "143", "7.1")
    assert one["images used (%)"] == "100"


def test_key_figures_name_the_split_the_head_and_the_epoch(reported: Path) -> None:
    page = page_of(reported)
    pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)
    expected = PLANTED.expected("val", "joint")
    assert dict(pairs) == {
        "top-1": f"{100 * expected['top1']:.2f} %",
        "top-5": f"{100 * expected['top5']:.2f} %",
        "macro F1": f"{expected['f1']:.3f}",
        "training time": "1 h 0 min",
        "images/s": "1",
        "of the time waiting for data": "12.0 %",
    }
    text = Outline(page).text
    assert "Figures are of epoch 2, head “joint”, over 500 validation images." in text
    assert "Every head, on the validation split" in text
    assert "validation top-1 (%)" in text


def test_the_drawn_matrix_has_truth_in_rows_and_predictions_in_columns(reported: Path) -> None:
    page = page_of(reported)
    svg = next(part for part in page.split("<svg ") if "confusion matrix of 10 classes" in part[:300])
    texts = re.findall(r'<text [^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', svg)
    cells = [(float(x), float(y), int(text)) for x, y, text in texts if text.isdigit()]
    columns, rows = (sorted({round(cell[axis]) for cell in cells}) for axis in (0, 1))
    assert (len(columns), len(rows)) == (10, 10)
    drawn = np.zeros((10, 10), int)
    for x, y, count in cells:
        drawn[rows.index(round(y)), columns.index(round(x))] = count
    assert drawn.tolist() == PLANTED.confusion("val", "joint").tolist()
    assert "Rows: true class; columns: prediction of head “joint”" in page


def test_accuracies_of_classes_and_confusions_are_those_of_the_rows(reported: Path) -> None:
    page = page_of(reported)
    confusion = PLANTED.confusion("val", "joint")
    recalls = sklearn.recall_score(PLANTED.labels.numpy(), PLANTED.head("val", "joint").argmax(1), average=None)
    svg = next(part for part in page.split("<svg ") if "accuracy of each class" in part[:300])
    texts = re.findall(r'<text [^>]*?y="([\d.]+)"[^>]*>([^<]*)</text>', svg.split("</svg>")[0])
    places = {text: float(y) for y, text in texts if text in CLASSES}
    values = [(float(y), text) for y, text in texts if text.isdigit()]
    for name, recall in zip(CLASSES, recalls, strict=True):
        nearest = min(values, key=lambda value: abs(value[0] - places[name]))
        assert nearest[1] == f"{100 * recall:.0f}"
    table = headed(cells_of(page), "true class")
    wrong = confusion - np.diag(confusion.diagonal())
    assert int(table[0]["images"]) == wrong.max()
    for row in table:
        true, taken = CLASSES.index(row["true class"]), CLASSES.index(row["taken for"])
        assert row["images"] == str(wrong[true, taken])
        assert row["of the class (%)"] == f"{100 * wrong[true, taken] / confusion[true].sum():.1f}"


def test_info_and_the_log_say_the_same(capsys: pytest.CaptureFixture[str], reported: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = call(capsys, "info", reported)[1]
    for weights in PLANTED.logits:
        assert_table(out, weights)
    assert re.search(r"training time\W+1 h 0 min", out)
    assert re.search(r"loss\W+1\.2500", out)
    log = (reported / "log.txt").read_text()
    plain, averaged = (PLANTED.expected(weights, "joint")["top1"] for weights in ("val", "val_ema"))
    assert f"top-1 {plain:.2%}, averaged weights {averaged:.2%}" in log


@pytest.mark.parametrize("weights", ["val", "val_ema"])
def test_eval_prints_and_writes_what_was_predicted(
    capsys: pytest.CaptureFixture[str], reported: Path, tmp_path: Path, monkeypatch, weights: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(evaluate, "_predict", lambda *arguments: PLANTED.predictions(weights))
    chosen = ["--ema"] if weights == "val_ema" else ["--which", "last"]
    code, out, err = call(capsys, "eval", reported, *chosen, "--json", tmp_path / "eval.json")
    assert code == 0, err
    assert_table(out, weights)
    tree = json.loads((tmp_path / "eval.json").read_text())
    assert tree["split"] == "val"
    assert tree["epoch"] == 2
    assert ("averaged" in tree["weights"]) == (weights == "val_ema")
    for head in HEADS:
        found = tree["heads"][head]
        assert {name: found[name] for name in FIGURES} == pytest.approx(PLANTED.expected(weights, head), abs=1e-6)
        assert found["confusion"] == PLANTED.confusion(weights, head).tolist()
    assert ", val" in out.splitlines()[0] + out.splitlines()[1]  # the split stands over the table
    printed = [re.findall(r"(?<=│)[^│]+(?=│)", line) for line in out.splitlines()]
    matrix = [[0 if cell.strip() == "." else int(cell) for cell in row[1:]] for row in printed if len(row) == 11]
    assert matrix[-10:] == PLANTED.confusion(weights, "joint").tolist()


def assert_table(text: str, weights: str) -> None:
    """The terminal's table has every head's figures in the columns of their names."""
    names = re.search(r"head +[┃│] +(top1.*)", text)
    assert names is not None
    columns = re.findall(r"\w+", names[1])
    assert set(columns) == set(FIGURES)
    for head in HEADS:
        values = PLANTED.expected(weights, head)
        cells = [f"{values[n]:.2%}" if n.startswith("top") else f"{values[n]:.3f}" for n in columns]
        assert re.search(rf"{head} +│ +" + r" +│ +".join(map(re.escape, cells)), text), (head, cells)


def test_figures_of_a_tiny_epoch_are_sane(reported: Path, tmp_path: Path) -> None:
    """An epoch that took no measurable time has no rate; one that only waited has waited all of it."""
    folder = tmp_path / "run"
    shutil.copytree(reported, folder)
    row = {**ROWS[0], "images": 2, "seconds": 0.0, "waited_seconds": 0.0, "images_per_second": 2 / 1e-9}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    text = Outline(page_of(folder)).text
    assert "images/s" in text
    assert not re.search(r"\d{2},\d{3},\d{3}|e\+\d\d", text)
    row |= {"seconds": 0.25, "waited_seconds": 0.25, "images_per_second": 8.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    pairs = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page_of(folder)))
    assert pairs["images/s"] == "8"
    assert pairs["of the time waiting for data"] == "100.0 %"
