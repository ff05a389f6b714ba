"""What the commands eval and export do once their options are read."""

import csv
import io
import json
import logging
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from deitfast.cli.tables import CONFUSION_CLASSES, agreement_table, confusion_table, metrics_table
from deitfast.config import recipe as recipes
from deitfast.config.choices import WhichCheckpoint
from deitfast.config.recipe import Recipe, TrainSpec
from deitfast.data_loaders import open_split
from deitfast.eval.evaluate import Predictions, agreement, final_head, measured, predict
from deitfast.eval.predict import top_predictions
from deitfast.models.class_names import ClassMatch, match_classes
from deitfast.progress import Display
from deitfast.run_folder import RunFolder
from deitfast.runtime import Runtime, start
from deitfast.weights.export import check_format, export
from deitfast.weights.load import TrainedModel, describe_input, load_model
from pipelines.errors import UserError
from pipelines.files import write_text
from pipelines.storage.dataset import Dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """The options of `deitfast eval`, as typed; None or empty where they were left out."""

    run: Path | None = None
    weights: Path | None = None
    arch: str | None = None
    data: Path | None = None
    split: str = "val"
    which: WhichCheckpoint = "auto"
    ema: bool = False
    assume_class_order: bool = False
    loader: str = "auto"
    check: bool = False
    settings: tuple[str, ...] = ()
    json_file: Path | None = None
    predictions_file: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is opened."""
        if (self.run is None) == (self.weights is None):
            got = "both" if self.run else "neither"
            raise UserError(f"eval: give a run folder or --weights FILE (got {got})")
        if self.run and (self.arch or self.settings):
            raise UserError("--arch and --set require --weights", expected="a run is evaluated as its recipe says")
        if self.weights and self.data is None:
            raise UserError("--weights requires --data", expected="--data FOLDER, a converted data set")

    @property
    def owner(self) -> str:
        """How messages call the network."""
        return str(self.run or self.weights)

    def precision(self) -> TrainSpec:
        """Return the recipe's section that says in which precision the network computes."""
        if self.run:
            return RunFolder(self.run).recipe().train
        return recipes.override(Recipe(), recipes.parse_settings(self.settings)).train

    def load(self, device: torch.device) -> TrainedModel:
        """Return the network to evaluate."""
        arch = recipes.check_arch(self.arch) if self.arch else None
        path, changes = self.run or self.weights or Path(), recipes.parse_settings(self.settings)
        return load_model(path, device, arch=arch, changes=changes, ema=self.ema, which=self.which)

    def data_folder(self) -> Path:
        """Return the data set: the one named, else the run's own."""
        return self.data or Path(RunFolder(self.run or Path()).info().data)


def run_evaluation(options: EvalOptions, device: str, display: Display, out: Console) -> None:
    """Evaluate a run's network, or one in a file, and print its metrics; write them to `json_file` as well."""
    with start(options.precision(), device) as runtime:
        trained, folder = options.load(runtime.device), options.data_folder()
        recipe = recipes.override(trained.recipe, {"loader.name": options.loader})
        with closing(Dataset.open(folder)) as dataset:
            classes = dataset.spec.classes
            match = match_outputs(trained, options.owner, classes, assume_order=options.assume_class_order)
            log.info("%s; %s", describe_input(trained), match)
            name, found = _predict(trained, match, dataset, options.split, recipe, runtime, display)
            checked = None
            if options.check:
                slow = recipes.override(recipe, {"loader.name": "reference"})
                _, others = _predict(trained, match, dataset, options.split, slow, runtime, display)
                checked = agreement(found.heads, others.heads, found.labels)
    if not runtime.is_main_process:
        return
    of = f"{trained.weights} of epoch {trained.epoch}" if trained.epoch else trained.weights
    results, predicts = measured(found.heads, found.labels), recipe.model.prediction
    title = f"{options.owner}, {of}, on {folder}, {options.split} ({name} loader)"
    out.print(metrics_table(title, {head: metrics.summary() for head, metrics in results.items()}))
    if checked:
        out.print(agreement_table(name, checked))
    if len(classes) <= CONFUSION_CLASSES:
        out.print(confusion_table(results[final_head(results, predicts)], classes))
    if options.predictions_file:
        write_text(options.predictions_file, predictions_csv(found, options.split, classes, predicts))
    if options.json_file:
        tree = {
            "run": options.owner,
            "split": options.split,
            "classes": classes,
            "weights": trained.weights,
            "epoch": trained.epoch,
            "input": describe_input(trained),
            "class_match": str(match),
            "heads": {head: metrics.everything() for head, metrics in results.items()},
        }
        write_text(options.json_file, json.dumps(tree | ({"check": asdict(checked)} if checked else {})))


def predictions_csv(found: Predictions, split: str, classes: tuple[str, ...], prediction: str = "auto") -> str:
    """Return a line for every image: its name (split/place), truth, the model's prediction, and its probability."""
    names = [f"{split}/{sample}" for sample in found.samples.tolist()]
    truths = [classes[label] for label in found.labels.tolist()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "truth", "prediction", "probability"])
    for image in top_predictions(names, found.heads, classes, 1, truths, prediction):
        best, probability = image.best
        writer.writerow([image.name, image.truth, best, f"{probability:.6g}"])
    return text.getvalue()


def match_outputs(trained: TrainedModel, owner: str, classes: tuple[str, ...], *, assume_order: bool) -> ClassMatch:
    """Return which of a model's outputs stands for each class of a data set."""
    return match_classes(owner, trained.classes, trained.num_classes, classes, assume_order=assume_order)


def _predict(
    trained: TrainedModel,
    match: ClassMatch,
    dataset: Dataset,
    split: str,
    recipe: Recipe,
    runtime: Runtime,
    display: Display,
) -> tuple[str, Predictions]:
    """Return the loader's name and the predictions of one pass over a split."""
    loader, outputs = open_split(dataset, split, recipe, runtime), None if match.is_identity else match.index
    label = f"evaluating {split} ({loader.name} loader)"
    with closing(loader), display.bar(label, loader.steps_per_epoch) as bar:
        found = predict(
            trained.model, loader, recipe, runtime, outputs=outputs, progress=lambda done, _: bar.reach(done)
        )
    return loader.name, found


def run_export(run: Path, out_path: Path, form: str, *, which: WhichCheckpoint, ema: bool, out: Console) -> None:
    """Write a run's network for other programs and say where."""
    check_format(out_path, form)
    trained = load_model(run, torch.device("cpu"), ema=ema, which=which)
    log.info("exporting the %s%s", trained.weights, f" of epoch {trained.epoch}" if trained.epoch else "")
    for file in export(trained, out_path, form):
        out.print(f"wrote {file}", highlight=False, soft_wrap=True)
