"""Damaged and edited data sets, runs and files of weights: read as they were, or refused by a message with the file.

pytest tests/campaigns/test_file_mutations.py -m slow --cases 5000
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from deitfast.cli.tables import describe_run
from deitfast.config import recipe as recipes
from deitfast.report.markdown import markdown
from deitfast.report.read import read_runs
from deitfast.run_folder import RunFolder
from deitfast.weights.load import load_model
from pipelines.errors import DeitfastError
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.dataset import Dataset
from pipelines.storage.formats.format import shards
from pipelines.storage.verify import verify
from tests.campaigns.damage import BYTES, edited, ends
from tests.helpers.published_weights import timm_model
from tests.helpers.sample_images import MemorySource, drawn, entries, jpeg
from tests.helpers.small_runs import run, tiny_recipe

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Kind:
    """Something on the disk, and what reads it."""

    make: Callable[[Path, Path], object]
    """Makes it in a folder, given `tiny_small`."""
    read: Callable[[Path], object]
    """What everything that reads it says."""
    checked: bool
    """Whether every byte is protected, so that what is read is what was written."""


def make_data(folder: Path, _: Path, form: object = None) -> None:
    files = [jpeg(20 + 3 * n, 30 + n, n) for n in range(5)] + [drawn(16, 16, n) for n in range(3)]
    source = MemorySource(classes=("a", "b"), splits={"train": entries(files, classes=2), "val": entries(files[:2])})
    convert(source, folder, ConvertOptions(workers=1, **({"form": form} if form else {})))


def read_data(folder: Path) -> list[object]:
    """All images, labels and names; and `verify` goes through."""
    found: list[object] = []
    with closing(Dataset.open(folder)) as dataset:
        for name in sorted(dataset.spec.splits):
            reader = dataset.split(name)
            found.append([bytes(reader.read_verified(index).data) for index in range(reader.num_samples)])
            found += [reader.labels.tolist(), reader.heights.tolist(), reader.widths.tolist(), dataset.spec.classes]
    assert verify(folder, workers=1) is not None
    return found


def make_run(folder: Path, data: Path) -> None:
    tiny = ("model.arch=vit_ti", "model.depth=2", "model.width=24", "model.heads=3")
    run(data, folder, tiny_recipe("train.epochs=1", *tiny))


def read_run(folder: Path) -> None:
    """What `info`, `report`, `eval` and `--resume` read; each is judged by itself."""
    told = []
    for reads in (
        lambda: describe_run(RunFolder(folder)),
        lambda: markdown(read_runs([folder])),
        lambda: load_model(folder, torch.device("cpu"), which="last"),
        lambda: load_model(folder, torch.device("cpu"), ema=True),
        lambda: (RunFolder(folder).recipe(), RunFolder(folder).info(), RunFolder(folder).resume_command()),
    ):
        try:
            reads()
        except DeitfastError as error:
            told.append(error)
    if told:
        raise told[0]


def make_weights(folder: Path, _: Path, kind: str = "pth") -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    state = timm_model(classes=2, patch=16, depth=2).state_dict()
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors", {"deitfast": json.dumps({"classes": ["a", "b"]})})
    else:
        torch.save({"model": state, "epoch": 3}, folder / "x.pth", _use_new_zipfile_serialization=kind == "pth")


def read_weights(folder: Path) -> None:
    file = next((path for path in folder.iterdir() if path.suffix in (".pth", ".safetensors")), folder / "x.pth")
    load_model(file, torch.device("cpu"))


def make_recipe(folder: Path, _: Path) -> None:
    folder.mkdir()
    (folder / "mine.toml").write_text(recipes.dump(tiny_recipe()))


KINDS = {
    "beton": Kind(make_data, read_data, True),
    "shards": Kind(lambda folder, data: make_data(folder, data, shards(20_000)), read_data, True),
    "run": Kind(make_run, read_run, False),
    "pth": Kind(make_weights, read_weights, False),
    "legacy pth": Kind(lambda folder, data: make_weights(folder, data, "legacy"), read_weights, False),
    "safetensors": Kind(lambda folder, data: make_weights(folder, data, "safetensors"), read_weights, False),
    "recipe": Kind(make_recipe, lambda folder: recipes.load(str(folder / "mine.toml")), False),
}


@contextmanager
def damaged(draw: random.Random, whole: Path, trial: Path) -> Iterator[str]:
    """Yield what was done to one file of a copy of `whole`, whose other files are links."""
    shutil.copytree(whole, trial, copy_function=lambda source, to: Path(to).hardlink_to(source))
    path = draw.choice(sorted(file for file in trial.rglob("*") if file.is_file()))
    content = path.read_bytes()
    path.unlink()
    match draw.randrange(14):
        case 0:
            what = "removed"
        case 1:
            path.mkdir()
            what = "a folder"
        case 2:
            path.write_bytes(b"")
            what = "empty"
        case 3 | 4 | 5 if path.suffix in (".json", ".jsonl"):
            lines = content.splitlines() if path.suffix == ".jsonl" else [content]
            path.write_text("\n".join(json.dumps(edited(draw, json.loads(line))) for line in lines))
            what = "edited"
        case _:
            change = draw.choice((*BYTES, ends, ends))
            path.write_bytes(change(draw, bytearray(content or b"\0")))
            what = change.__name__
    yield f"{path.relative_to(trial)} {what}"
    shutil.rmtree(trial)


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_named_or_changes_nothing(
    tiny_small: Path, tmp_path: Path, cases: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deitfast.weights.read.STANDARD_DEPTH", 2)
    kind, whole, outcomes = KINDS[name], tmp_path / "whole", Counter[str]()
    kind.make(whole, tiny_small)
    expected = kind.read(whole)
    for seed in range(cases):
        with damaged(random.Random(f"{name}{seed}"), whole, tmp_path / "trial") as what:
            refusal, found = None, None
            try:
                found = kind.read(tmp_path / "trial")
            except DeitfastError as error:
                refusal = str(error)
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {what}: {type(error).__name__}: {error}") from error
            outcomes["refused" if refusal else "read"] += 1
            if refusal:
                assert str(tmp_path) in refusal, f"seed {seed}: {what}: the message names no file: {refusal}"
            else:
                assert found == expected or not kind.checked, f"seed {seed}: {what}"
    print(name, dict(outcomes))  # noqa: T201
    assert outcomes["refused"] > cases // 10
