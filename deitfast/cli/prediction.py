"""What the command predict does once its options are read."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from deitfast.config import recipe as recipes
from deitfast.config.choices import WhichCheckpoint
from deitfast.config.recipe import Recipe
from deitfast.data_loaders import open_split
from deitfast.eval.attention import LARGEST_BATCH, attention_rollout, overlay
from deitfast.eval.evaluate import predict
from deitfast.eval.predict import (
    ImagePrediction,
    as_csv,
    as_json,
    list_images,
    open_images,
    read_images,
    top_predictions,
)
from deitfast.models.class_names import IMAGENET, imagenet_synsets, imagenet_word
from deitfast.models.vit import reads_patches
from deitfast.progress import Display
from deitfast.report.predictions import PredictionRow, predictions_page
from deitfast.run_folder import RunFolder
from deitfast.runtime import Runtime, start
from deitfast.weights.load import TrainedModel, describe_input, load_model
from pipelines.augment.chain import augment
from pipelines.batch import Loader
from pipelines.errors import UserError, pluralize
from pipelines.files import write_text
from pipelines.storage.dataset import SPEC_FILE, Dataset

log = logging.getLogger(__name__)
MOST_PICTURES = 1000
"""Images on an HTML page, at most."""
SHOWN_SKIPPED = 20
"""Bad files that are named on the terminal, at most."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """The options of `deitfast predict`, as typed; None or empty where they were left out."""

    source: Path
    """Run or weights."""
    images: tuple[str, ...]
    split: str = "val"
    arch: str | None = None
    which: WhichCheckpoint = "auto"
    ema: bool = False
    top: int = 5
    loader: str = "auto"
    settings: tuple[str, ...] = ()
    csv_file: Path | None = None
    json_file: Path | None = None
    html_file: Path | None = None
    attention: bool = False

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is opened."""
        if RunFolder(self.source).exists() and (self.arch or self.settings):
            raise UserError("--arch and --set go with a file of weights", expected="a run predicts as its recipe says")
        if self.dataset and len(self.images) > 1:
            raise UserError(f"{self.dataset} is a data set", expected="one data set, or any number of images")

    @property
    def dataset(self) -> Path | None:
        """The converted data set whose split is meant; None for images."""
        return next((Path(name) for name in self.images if (Path(name) / SPEC_FILE).is_file()), None)

    @property
    def page(self) -> Path | None:
        """Where the HTML page goes."""
        return self.html_file or (Path("predictions.html") if self.attention else None)

    def recipe(self) -> Recipe:
        """Return the recipe that says in which precision the network computes."""
        run = RunFolder(self.source)
        return run.recipe() if run.exists() else recipes.override(Recipe(), recipes.parse_settings(self.settings))

    def load(self, device: torch.device) -> TrainedModel:
        """Return the network."""
        arch = recipes.check_arch(self.arch) if self.arch else None
        changes = recipes.parse_settings(self.settings)
        return load_model(self.source, device, arch=arch, changes=changes, ema=self.ema, which=self.which)


def run_predict(options: PredictOptions, device: str, display: Display, out: Console) -> None:
    """Predict images with a run's network, or one in a file; print the best classes and write them where asked."""
    files = [] if options.dataset else list_images(options.images, sys.stdin)
    with start(options.recipe().train, device) as runtime:
        trained = options.load(runtime.device)
        recipe = recipes.override(trained.recipe, {"loader.name": options.loader, "loader.skip_bad": True})
        log.info("%s", describe_input(trained))
        work = _Predicting(trained, recipe, runtime, class_labels(trained), options)
        with display.bar("predicting", 1 if options.dataset else len(files)) as bar:
            for done in work.dataset(options.dataset) if options.dataset else work.files(files):
                bar.reach(done)
    if not work.found:
        raise UserError("none of the images can be read", found="; ".join(map(": ".join, work.skipped[:3])))
    if runtime.is_main_process:
        _show(work, options, out)


def class_labels(trained: TrainedModel) -> list[str]:
    """Return how a model's classes are shown: ImageNet's by a word and their synset, unknown ones by number."""
    names = trained.classes or (imagenet_synsets() if trained.num_classes == IMAGENET else ())
    if not names:
        return [str(number) for number in range(trained.num_classes)]
    return [name if (word := imagenet_word(name)) == name else f"{word} ({name})" for name in names]


class _Predicting:
    """Predictions as they come."""

    def __init__(
        self, trained: TrainedModel, recipe: Recipe, runtime: Runtime, labels: list[str], options: PredictOptions
    ) -> None:
        self.trained, self.recipe, self.runtime, self.labels, self.options = trained, recipe, runtime, labels, options
        self.found: list[ImagePrediction] = []
        self.rows: list[PredictionRow] = []
        self.skipped: list[tuple[str, str]] = []

    def files(self, files: Sequence[Path]) -> Iterator[int]:
        """Predict image files; yield how many are done."""

        def skip(file: Path, reason: str) -> None:
            if len(self.skipped) < SHOWN_SKIPPED:
                log.warning("skipped: %s: %s", file, reason)
            self.skipped.append((str(file), reason))

        for names, images in read_images(files, self.recipe, skip):
            with closing(open_images(images, self.recipe, self.runtime.device)) as loader:
                self._one_pass(loader, [str(name) for name in names], None)
            yield len(self.found) + len(self.skipped)
        yield len(files)

    def dataset(self, folder: Path) -> Iterator[int]:
        """Predict a split of a converted data set; yield 1 when it is done."""
        split = self.options.split
        with closing(Dataset.open(folder)) as dataset:
            reader, classes = dataset.split(split), dataset.spec.classes
            names = [f"{split}/{number}" for number in range(reader.num_samples)]
            truths = [classes[label] for label in reader.labels.tolist()]
            with closing(open_split(dataset, split, self.recipe, self.runtime)) as loader:
                self._one_pass(loader, names, truths)
        yield 1

    def _one_pass(self, loader: Loader, names: list[str], truths: list[str] | None) -> None:
        """Predict what a loader gives; keep pictures for the page."""
        logits = predict(self.trained.model, loader, self.recipe, self.runtime)
        samples = logits.samples.tolist()
        heads = tuple(head.cpu() for head in logits.heads)
        known = [truths[sample] for sample in samples] if truths else None
        shown, predicts = [names[sample] for sample in samples], self.recipe.model.prediction
        new = top_predictions(shown, heads, self.labels, self.options.top, known, predicts)
        missing = sorted(set(range(len(names))) - set(samples))
        self.skipped += [(names[sample], "damaged") for sample in missing]
        self.found += new
        if self.options.page and len(self.rows) < MOST_PICTURES:
            self._pictures(loader, dict(zip(samples, new, strict=True)))

    def _pictures(self, loader: Loader, predictions: dict[int, ImagePrediction]) -> None:
        """Keep the images as the network sees them, and what its tokens look at."""
        model, dtype = self.trained.model, self.runtime.input_dtype
        for batch in loader.epoch(0):
            tokens = {}
            if self.options.attention:
                patch, kernels = reads_patches(model), self.recipe.train.kernels
                inputs = augment(batch, self.recipe.augment, dtype=dtype, train=False, patch=patch, kernels=kernels)
                parts = [attention_rollout(model, part.float()) for part in inputs.pixels.split(LARGEST_BATCH)]
                tokens = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            images = batch.images.cpu().numpy()
            for row, sample in enumerate(batch.params.sample.tolist()):
                if not bool(batch.valid[row]) or sample not in predictions:
                    continue
                drawn = {name: overlay(images[row], maps[row]) for name, maps in tokens.items()}
                self.rows.append(PredictionRow(predictions[sample], Image.fromarray(images[row]), drawn))
                if len(self.rows) == MOST_PICTURES:
                    return


def _show(work: _Predicting, options: PredictOptions, out: Console) -> None:
    """Print a line for every image, and write the files that were asked for."""
    written = {options.csv_file: as_csv, options.json_file: as_json}
    for image in work.found:
        best = ", ".join(f"{name} {probability:.1%}" for name, probability in image.heads[image.final])
        out.print(f"{image.name}: {best}", highlight=False, soft_wrap=True)
    for file, text in written.items():
        if file:
            write_text(file, text(work.found))
            out.print(f"wrote {file}", highlight=False, soft_wrap=True)
    if options.page:
        title = f"{options.source}: {pluralize(len(work.found), 'image')}"
        more = f"; the first {MOST_PICTURES:,} images" if len(work.found) > MOST_PICTURES else ""
        page = predictions_page(title, describe_input(work.trained) + more, work.rows, work.skipped)
        write_text(options.page, page)
        out.print(f"wrote {options.page}", highlight=False, soft_wrap=True)
    if work.skipped:
        out.print(f"{pluralize(len(work.skipped), 'image')} could not be read and left out", highlight=False)
