"""What the commands train, eval and bench do once their options are read."""

import json
import os
import time
from contextlib import closing
from pathlib import Path

from rich.console import Console

from deitfast import recipe as recipes
from deitfast.bench import PARTS, bench_table, measure
from deitfast.data import open_split, typical_side
from deitfast.datasets import convert_dataset
from deitfast.display import Display
from deitfast.evaluate import evaluate, final_head
from deitfast.plan import (
    DEMO_DATA,
    TrainOptions,
    data_folder,
    demo_teacher,
    plan_training,
    training_data,
    uses_demo_teacher,
)
from deitfast.runlog import RunFolder, write_text
from deitfast.runtime import start
from deitfast.tables import CONFUSION_CLASSES, confusion_table, describe_run, metrics_table
from deitfast.teacher import require_classes
from deitfast.train import train
from deitfast.trained import load_run
from pipelines.errors import Mistake
from pipelines.storage.dataset import SPEC_FILE, Dataset


def run_training(options: TrainOptions, device: str, display: Display, out: Console) -> None:
    """Plan and train; make the demo set and its teacher first where they are wanted and missing."""
    data = training_data(options)
    _make_demo_set(data, display)
    job = plan_training(options, data)
    if uses_demo_teacher(job.recipe) and (lesson := demo_teacher(data)):
        with start(lesson.recipe.train, device) as runtime:
            train(lesson, runtime, display)
    with start(job.recipe.train, device) as runtime:
        train(job, runtime, display)
        if runtime.main:
            out.print(describe_run(RunFolder(job.out)))


def run_evaluation(
    run: Path,
    data: Path | None,
    *,
    split: str,
    ema: bool,
    loader: str,
    json_file: Path | None,
    device: str,
    display: Display,
    out: Console,
) -> None:
    """Evaluate a run's network and print its metrics; write them to `json_file` as well."""
    folder = RunFolder(run)
    recipe = recipes.override(folder.recipe(), [f"loader.name={loader}"])
    with start(recipe.train, device) as runtime:
        trained = load_run(run, runtime.device, ema=ema)
        with closing(Dataset.open(data or Path(trained.info.data))) as dataset:
            classes = dataset.spec.classes
            require_classes(f"run {run}", trained.info.classes, classes)
            batches = open_split(dataset, split, recipe, runtime)
            with closing(batches), display.bar(f"evaluating {split}", batches.steps_per_epoch) as bar:
                heads = evaluate(
                    trained.model,
                    batches,
                    recipe.augment,
                    runtime.device,
                    runtime.amp,
                    len(classes),
                    lambda done, _: bar.reach(done),
                )
        if not runtime.main:
            return
    weights = "averaged weights" if ema else "weights"
    title = (
        f"{run}, {weights} of epoch {trained.epoch}, on {data or trained.info.data}, {split} ({batches.name} loader)"
    )
    out.print(metrics_table(title, {head: metrics.summary() for head, metrics in heads.items()}))
    if len(classes) <= CONFUSION_CLASSES:
        out.print(confusion_table(heads[final_head(heads)], classes))
    if json_file:
        tree = {"run": str(run), "split": split, "classes": classes, "weights": weights, "epoch": trained.epoch}
        figures = {head: metrics.everything() for head, metrics in heads.items()}
        write_text(json_file, json.dumps({**tree, "heads": figures}))


def run_bench(
    part: str,
    data: Path | None,
    arch: str,
    batch: int | None,
    seconds: float,
    settings: tuple[str, ...],
    device: str,
    display: Display,
    out: Console,
) -> None:
    """Measure loader, augmentation and step on a data set, alone and together, and print a table."""
    if part not in PARTS:
        raise Mistake(f"bench has no part called {part}", expected=", ".join(PARTS))
    folder = data_folder(data)
    _make_demo_set(folder, display)
    with closing(Dataset.open(folder)) as dataset:
        recipe = recipes.choose(recipes.known_arch(arch), dataset.spec.name, typical_side(dataset))
        given = [f"train.batch={batch}"] if batch else []
        recipe = recipes.override(recipe, [*given, *settings])
        with start(recipe.train, device) as runtime:
            measured = measure(dataset, recipe, runtime, part, seconds, display)
            if runtime.main:
                out.print(bench_table(measured, recipe, folder, runtime))


def _make_demo_set(data: Path, display: Display) -> None:
    """Draw the demo set, on rank 0, where it is wanted and not there yet."""
    if data != DEMO_DATA:
        return
    written = data / SPEC_FILE
    if os.environ.get("RANK", "0") == "0" and not written.exists():
        convert_dataset("demo", None, data, display=display)
    while not written.exists():
        time.sleep(0.1)
