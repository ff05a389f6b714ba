"""Training images as the network sees them: a few rows of the run's first batch, made again by the run's own pipeline.

Everything random about a view is a function of (seed, sample, view), so these are the very images of the run's first
step. Only the rows that are shown and their partners in the mixture are read, however large the data set.
"""

import io
from base64 import b64encode
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deitfast.config import recipe as recipes
from deitfast.config.recipe import Recipe
from deitfast.data_loaders import training_sampler
from deitfast.distill.cache import TeacherCache
from deitfast.distill.cache_files import is_present
from deitfast.distill.cache_manifest import is_cache
from deitfast.distill.teacher import Teacher, load_teacher
from deitfast.report.read import RunRecord
from deitfast.runtime import Runtime
from pipelines.augment.chain import AugmentedBatch, augment
from pipelines.errors import DeitfastError
from pipelines.loaders.factory import open_loader, why_not
from pipelines.rng.packed_spec import UNIT
from pipelines.rng.policies import OPERATIONS
from pipelines.rng.sampler import Rows, Sampler, group_size
from pipelines.rng.view_params import ViewParams
from pipelines.spec import AugmentSpec
from pipelines.storage.dataset import Dataset

SHOWN = 12
"""Images of a run that are shown."""
OF_A_GROUP = 3
"""So many of one mixing group, which shares one kind of mixture and one lambda, where the batch has groups enough."""
LOSSLESS_SIDE = 64
"""Largest side in pixels that is embedded as PNG; larger ones are JPEGs."""
HOST = Runtime(torch.device("cpu"), rank=0, world=1, amp=None, compile=False)


@dataclass(frozen=True)
class ShownImage:
    """A training image, its target and what was done to it."""

    image: str
    """A data URI."""
    side: int
    """Its side in pixels."""
    target: tuple[tuple[str, float], ...]
    """(class name, share) of the mixture, before label smoothing."""
    teacher: str
    """Name of the teacher's class, "" where it is not known."""
    operations: tuple[str, ...]
    """What was done to it after cropping, in order."""


def samples_of(run: RunRecord) -> tuple[list[ShownImage], str]:
    """Return some of a run's training images, and a sentence on what is missing ("" where nothing is)."""
    try:
        recipe = recipes.load(str(run.path / "recipe.toml"))
        with closing(Dataset.open(Path(str(run.info.get("data", ""))))) as dataset:
            if dataset.spec.fingerprint != run.info.get("fingerprint"):
                return [], f"No training images are shown: {dataset.folder} holds another data set by now."
            inputs, shown = first_inputs(dataset, recipe)
            names, note = _teacher_classes(recipe, dataset.spec.classes, inputs, shown)
            return _shown_images(inputs, shown, recipe.augment, dataset.spec.classes, names), note
    except (DeitfastError, OSError) as error:
        return [], f"No training images are shown: {_first_line(error)}."


def first_inputs(dataset: Dataset, recipe: Recipe) -> tuple[AugmentedBatch, np.ndarray]:
    """Return the model's input for the shown rows of the first step and their partners, and which rows are shown.

    Raises:
        UserError: data set or recipe do not fit.
        DeitfastError: a sample is damaged.
    """
    sampler = FewRows(training_sampler(dataset, recipe, HOST, recipe.train.batch), recipe)
    decoder = replace(recipe.loader, name="reference" if why_not("cpu") else "cpu", prefetch=1)
    loader = open_loader(dataset.split("train"), recipe.augment, decoder, sampler, train=True, device=HOST.device)
    with closing(loader):
        (batch,) = loader.epoch(0)
    return augment(batch, recipe.augment, dtype=torch.float32, train=True), sampler.shown


class FewRows:
    """A sampler of one step: SHOWN rows of another sampler's first step, and the rows that they are mixed with."""

    steps_per_epoch = 1

    def __init__(self, whole: Sampler, recipe: Recipe) -> None:
        rows = whole.rows(0, 0)
        group = group_size(recipe.augment, len(rows.samples))
        groups = len(rows.samples) // group
        each = min(group, max(OF_A_GROUP, SHOWN // groups))
        starts = group * np.arange(min(groups, SHOWN // each))
        wanted = (starts[:, None] + np.arange(each)).ravel()
        kept = np.unique(np.concatenate([wanted, rows.partners[wanted]]))
        self._rows = Rows(
            samples=rows.samples[kept],
            views=rows.views[kept],
            groups=rows.groups[kept],
            passes=rows.passes[kept],
            partners=np.searchsorted(kept, rows.partners[kept]),
            valid=rows.valid[kept],
        )
        self.shown = np.searchsorted(kept, wanted)
        """Rows to show, of the step's own."""

    def rows(self, epoch: int, step: int) -> Rows:
        """Return the step's rows; there is only one."""
        return self._rows


def _teacher_classes(
    recipe: Recipe, classes: tuple[str, ...], inputs: AugmentedBatch, shown: np.ndarray
) -> tuple[list[str], str]:
    """Return the teacher's class for each shown row, from its cache or itself, and a sentence where it is not known."""
    distill, unknown = recipe.distill, [""] * len(shown)
    if distill.mode == "none":
        return unknown, ""
    try:
        if distill.targets != "per_image" and is_cache(Path(distill.cache)):
            return _cached_classes(Path(distill.cache), classes, inputs, shown), ""
        if not Path(distill.teacher_weights or distill.teacher or "/nowhere").exists():
            return unknown, "The teacher's labels are not shown: it is not here, and a report fetches nothing."
        teacher = Teacher(load_teacher(distill, classes), recipe, HOST)
        labels = teacher.logits(inputs.pixels[torch.from_numpy(shown)]).argmax(1)
    except (DeitfastError, OSError, KeyError, RuntimeError) as error:
        return unknown, f"The teacher's labels are not shown: {_first_line(error)}."
    return [classes[label] for label in labels.tolist()], ""


def _cached_classes(folder: Path, classes: tuple[str, ...], inputs: AugmentedBatch, shown: np.ndarray) -> list[str]:
    """Return what a teacher cache has for the shown rows, "" where it has nothing."""
    cache = TeacherCache.open(folder)
    targets = cache.read_pass(0)[inputs.params.view[shown], inputs.params.sample[shown]]
    labels = targets if targets.dtype.names is None else targets["label"][:, 0]
    known = zip(labels.tolist(), is_present(targets).tolist(), strict=True)
    return [classes[label] if there else "" for label, there in known]


def _shown_images(
    inputs: AugmentedBatch, shown: np.ndarray, spec: AugmentSpec, classes: tuple[str, ...], teachers: list[str]
) -> list[ShownImage]:
    pictures = pixels_of(inputs.pixels[torch.from_numpy(shown)], spec)
    found = []
    for row, picture, teacher in zip(shown.tolist(), pictures, teachers, strict=True):
        lam = float(inputs.lam[row])
        own, other = (classes[int(labels[row])] for labels in (inputs.labels, inputs.mix_labels))
        target = ((own, lam), (other, 1 - lam)) if lam < 1 and own != other else ((own, 1.0),)
        found.append(ShownImage(_data_uri(picture), spec.size, target, teacher, operations_of(inputs.params, row)))
    return found


def pixels_of(normalized: Tensor, spec: AugmentSpec) -> np.ndarray:
    """Return the pictures, uint8 [B, S, S, 3], that normalized pixels [B, 3, S, S] were made of."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return ((normalized * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def operations_of(params: ViewParams, row: int) -> tuple[str, ...]:
    """Return what happens to a row after cropping, in order, in words."""
    operations = [*params.operation[row].tolist(), *params.jitter[row].tolist()]
    steps = ["flipped"] if params.flip[row] else []
    steps += [_operation_name(OPERATIONS[index]) for index in operations if index]
    if params.erase[row, 2]:
        steps.append("erased")
    if params.cutmix_bbox[row, 2]:
        steps.append("CutMix")
    elif params.lam[row] < UNIT:
        steps.append("MixUp")
    return tuple(steps)


def _operation_name(operation: str) -> str:
    """AutoContrast as auto contrast: an operation's name in words, without the flavor of its magnitude."""
    name = operation.removesuffix("Original").removeprefix("Jitter")
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()


def _data_uri(picture: np.ndarray) -> str:
    file, form = io.BytesIO(), "png" if max(picture.shape) <= LOSSLESS_SIDE else "jpeg"
    Image.fromarray(picture).save(file, form, **({"quality": 85} if form == "jpeg" else {"optimize": True}))
    return f"data:image/{form};base64,{b64encode(file.getvalue()).decode()}"


def _first_line(error: Exception) -> str:
    text = error.problem if isinstance(error, DeitfastError) else str(error)
    return (text.splitlines() or [type(error).__name__])[0].rstrip(".")
