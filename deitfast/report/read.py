"""Run folders as plain data, read as far as they go: what is missing or damaged becomes a note, never an error."""

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deitfast.eval.evaluate import HEADS, final_head
from deitfast.run_folder import RunFolder, read_rows
from pipelines.errors import UserError

WEIGHTS = {"val": "plain", "val_ema": "averaged"}
"""Keys of an evaluation in metrics.jsonl and evaluation.json, and how people call those weights."""
ORDER = (*HEADS, "joint")
"""Heads in the order in which they are shown."""
KNOWN = ("epoch", "loss", "base", "distill", "lr", "images", "seconds", "images_per_second", "waited_seconds", *WEIGHTS)
"""Fields of a row that have a place of their own in a report; others are listed as they are."""

TYPES: dict[str, type] = {"classes": list, "command": list, "start": dict, "devices": list, "libraries": dict}
"""What fields of run.json, environment.json and evaluation.json hold; one that holds something else is left out."""

Heads = dict[str, dict[str, float]]
"""Figures of every head, in ORDER."""


@dataclass(frozen=True)
class RunRecord:
    """One run, as far as its folder tells it."""

    path: Path
    name: str
    """What tells it from the runs that it is compared with: the end of its path."""
    settings: dict[str, Any]
    """The recipe's fields under their full names, as recipe.toml has them; empty where it is missing."""
    info: dict[str, Any]
    """run.json, or nothing."""
    environment: dict[str, Any]
    """environment.json, or nothing."""
    rows: tuple[dict[str, Any], ...]
    """A row an epoch, in rising order."""
    evaluation: dict[str, Any]
    """evaluation.json, or nothing."""
    notes: tuple[str, ...]
    """What is missing or damaged, a sentence each."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order; empty where no file tells them."""
        return tuple(map(str, self.info.get("classes") or self.evaluation.get("classes") or ()))

    @property
    def dataset(self) -> str:
        """Kind of the data set, "" where unknown."""
        return str(self.info.get("dataset", ""))

    def final_head(self, heads: Mapping[str, object]) -> str:
        """Return the name of the head whose prediction is the model's, of those that were evaluated."""
        name = final_head(heads, str(self.settings.get("model.prediction", "auto")))
        return name if name in heads else next(iter(heads), name)  # of an edited file

    @property
    def epochs(self) -> tuple[int, int | None]:
        """Epochs done, and epochs of the recipe where it is known."""
        planned = self.settings.get("train.epochs")
        return (self.rows[-1]["epoch"] if self.rows else 0), planned if isinstance(planned, int) else None

    @property
    def finished(self) -> bool:
        """Whether the last epoch of the recipe is done."""
        done, planned = self.epochs
        return planned is not None and done >= planned

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the epochs that have a finite number called `name`, and those numbers."""
        found = [(row["epoch"], value) for row in self.rows if (value := number(row.get(name))) is not None]
        return [epoch for epoch, _ in found], [value for _, value in found]

    def evaluated(self, weights: str, head: str, name: str) -> tuple[list[int], list[float]]:
        """Return the same of a figure of one head; `weights` is a key of WEIGHTS, `head` "" the published one."""
        epochs, values = [], []
        for row in self.rows:
            heads = heads_of(row.get(weights))
            value = heads.get(head or self.final_head(heads), {}).get(name)
            if value is not None:
                epochs.append(row["epoch"])
                values.append(value)
        return epochs, values

    def hours(self) -> dict[int, float]:
        """Return the hours of training up to the end of each epoch; evaluation is not counted."""
        total, hours = 0.0, {}
        for row in self.rows:
            total += number(row.get("seconds")) or 0.0
            hours[row["epoch"]] = total / 3600
        return hours

    def final(self) -> tuple[int, dict[str, Heads]]:
        """Return the last evaluated epoch and its figures: {"val": {head: {name: figure}}, ...}; 0 and {} without."""
        for tree in (*reversed(self.rows), self.evaluation):
            found = {key: heads for key in WEIGHTS if (heads := heads_of(tree.get(key)))}
            if found:
                return int(number(tree.get("epoch")) or 0), found
        return 0, {}

    def top1(self) -> float | None:
        """Return the last top-1 of the published head, plain weights."""
        heads = self.final()[1].get("val", {})
        return heads.get(self.final_head(heads), {}).get("top1")

    def rate(self) -> float | None:
        """Return images/s over all epochs."""
        seconds = sum(self.series("seconds")[1])
        return sum(self.series("images")[1]) / seconds if seconds > 0 else None

    def waiting(self) -> float | None:
        """Return the share of the training time that was spent waiting for data."""
        seconds, waited = sum(self.series("seconds")[1]), self.series("waited_seconds")[1]
        return sum(waited) / seconds if seconds > 0 and waited else None

    def rate_by_epoch(self) -> tuple[list[int], list[float]]:
        """Return the epochs that took a measurable time, and the images/s of each one."""
        images, seconds = (dict(zip(*self.series(name), strict=True)) for name in ("images", "seconds"))
        rates = {epoch: images[epoch] / seconds[epoch] for epoch in images if seconds.get(epoch, 0) > 0}
        return list(rates), list(rates.values())

    def waiting_by_epoch(self) -> tuple[list[int], list[float]]:
        """Return the epochs, and the share of each one's training time that was spent waiting for data."""
        seconds, waited = (dict(zip(*self.series(name), strict=True)) for name in ("seconds", "waited_seconds"))
        shares = {epoch: waited[epoch] / seconds[epoch] for epoch in waited if seconds.get(epoch, 0) > 0}
        return list(shares), list(shares.values())

    def confusion(self) -> tuple[str, np.ndarray] | None:
        """Return the published head and its confusion matrix, int64 [C, C], of the plain weights; None without."""
        heads = self.evaluation.get("val")
        if not isinstance(heads, dict) or not heads:
            return None
        head = self.final_head(heads)
        return (head, found) if (found := _matrix(heads.get(head), len(self.classes))) is not None else None

    def extras(self) -> dict[str, str]:
        """Return the rows' other plain fields: the last value, or the range of a number that changes."""
        names = {key: None for row in self.rows for key in row if key not in KNOWN}
        found = {}
        for name in names:
            values = [row[name] for row in self.rows if isinstance(row.get(name), str | bool | int | float)]
            if values:
                found[name] = _range(values)
        return found


def read_runs(folders: list[Path]) -> list[RunRecord]:
    """Read every run.

    Raises:
        UserError: one of the folders holds nothing of a run.
    """
    return [read_run(folder, name) for folder, name in zip(folders, distinct(folders), strict=True)]


def read_run(folder: Path, name: str = "") -> RunRecord:
    """Read what there is of one run; arguments and errors as `read_runs`."""
    run = RunFolder(folder)
    files = [folder / file for file in ("recipe.toml", "run.json", "environment.json", "metrics.jsonl")]
    recipe, info, environment, metrics = files
    if not any(file.is_file() for file in (recipe, info, metrics)):
        raise UserError(f"there is no run in {folder}", expected="a folder that `deitfast train` wrote")
    notes: list[str] = []
    settings = _flat(_tree(recipe, tomllib.loads, "the recipe is not known", notes))
    known = _tree(info, json.loads, "data set and class names are not known", notes)
    machine = _tree(environment, json.loads, "machine and versions are not known", notes)
    rows = tuple(_rows(metrics, notes))
    evaluation = {}
    if run.evaluation.is_file() or any(key in row for row in rows for key in WEIGHTS):
        evaluation = _tree(run.evaluation, json.loads, "no confusion matrix, no accuracy of each class", notes)
    elif rows:
        notes.append("No epoch has been evaluated.")
    if not run.checkpoint.is_file():
        notes.append("There is no checkpoint: this run cannot be resumed, evaluated or exported.")
    record = RunRecord(folder, name or folder.name, settings, known, machine, rows, evaluation, tuple(notes))
    if evaluation and record.confusion() is None:
        notes.append("evaluation.json has no confusion matrix that fits the class names.")
    return replace(record, notes=tuple(notes))


def distinct(folders: list[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart: a/run and b/run, but teacher and student."""
    whole = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            return names
    return [str(folder) for folder in folders]


def heads_of(tree: Any) -> Heads:
    """Return every head's finite figures, in ORDER, of whatever stands where an evaluation should."""
    if not isinstance(tree, Mapping):
        return {}
    known = [head for head in tree if isinstance(tree[head], Mapping)]
    heads = sorted(known, key=lambda head: (*ORDER, head).index(head))
    return {head: {name: x for name, value in tree[head].items() if (x := number(value)) is not None} for head in heads}


def number(value: Any) -> float | None:
    """Return a finite number as it is, anything else as None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _rows(file: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics.jsonl; where an epoch occurs twice, the later line counts."""
    if not file.is_file():
        notes.append("There is no metrics.jsonl: no epoch was finished, or the file is lost.")
        return
    rows, damage = read_rows(file)
    if damage:
        notes.append(damage)
    by_epoch = {row["epoch"]: row for row in rows}
    yield from (by_epoch[epoch] for epoch in sorted(by_epoch))


def _tree(file: Path, parse: Any, without: str, notes: list[str]) -> dict[str, Any]:
    """Return what a file holds; nothing, and a note, where it is missing or damaged."""
    try:
        tree = parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{file.name} is missing: {without}.")
        return {}
    except (ValueError, OSError) as error:
        notes.append(f"{file.name} cannot be read ({str(error).splitlines()[0]}): {without}.")
        return {}
    if not isinstance(tree, dict):
        notes.append(f"{file.name} is not what `deitfast train` writes: {without}.")
        return {}
    if wrong := [name for name, value in tree.items() if not isinstance(value, TYPES.get(name, object))]:
        notes.append(f"{file.name} is not what `deitfast train` writes: {', '.join(wrong)} left out.")
    return {name: value for name, value in tree.items() if name not in wrong}


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= {f"{key}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _matrix(head: Any, classes: int) -> np.ndarray | None:
    try:
        matrix = np.array(head["confusion"], dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return matrix if matrix.shape == (classes, classes) and classes and (matrix >= 0).all() else None


def _range(values: list[Any]) -> str:
    numbers = [value for each in values if (value := number(each)) is not None]
    if len(numbers) == len(values) and min(numbers) != max(numbers):
        return f"{min(numbers):g} to {max(numbers):g}"
    last = values[-1]
    return f"{last:g}" if isinstance(last, float) else str(last)
