"""From what the user typed to what runs: data set, recipe, teacher, run folder."""

import logging
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from deitfast.config import recipe as recipes
from deitfast.config.ablations import overrides
from deitfast.config.choices import Arch, WhichCheckpoint
from deitfast.config.recipe import Recipe
from deitfast.data_loaders import typical_side
from deitfast.distill.precompute import TeachJob
from deitfast.run_folder import RunFolder
from deitfast.train.trainer import TrainJob
from deitfast.weights.load import normalization_of, recipe_of
from deitfast.weights.read import read_weights
from pipelines.errors import UserError
from pipelines.storage.dataset import Dataset

log = logging.getLogger("deitfast")
DEMO_DATA = Path("data/demo")
DEMO_TEACHER = Path("runs/demo-teacher")
DEMO_TEACHER_ARCH: Arch = "resnet18"


@dataclass(frozen=True)
class TrainOptions:
    """The options of `deitfast train`, as typed; None or empty where they were left out."""

    data: Path | None = None
    arch: str | None = None
    recipe: str | None = None
    distill: str | None = None
    teacher: str | None = None
    out: Path | None = None
    epochs: int | None = None
    batch: int | None = None
    settings: tuple[str, ...] = ()
    resume: bool = False
    command: tuple[str, ...] = ()
    weights: Path | None = None
    finetune: Path | None = None
    ablate: tuple[str, ...] = ()
    teacher_weights: Path | None = None
    cache: str | None = None
    views: int | None = None
    per_image: bool = False
    skip_bad: bool = False
    fraction: float | None = None
    tensorboard: bool = False
    which: WhichCheckpoint | None = None
    assume_class_order: bool = False

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is opened."""
        if self.weights and self.finetune:
            raise UserError("--weights and --finetune are two ways to start", remedy="give one of them")
        if self.resume and self.out is None:
            raise UserError("--resume does not know which run to continue", remedy="name its folder with --out")
        if self.per_image and self.views:
            raise UserError("--per-image and --views are two kinds of targets", remedy="give one of them")


def data_folder(data: Path | None) -> Path:
    """Return the data set to use: --data, else $DEITFAST_DATA, else the demo set (a line says so)."""
    if data:
        return data
    if named := os.environ.get("DEITFAST_DATA"):
        log.info("no --data: using $DEITFAST_DATA, %s", named)
        return Path(named)
    log.info("no --data and no $DEITFAST_DATA: using the built-in demo set, %s", DEMO_DATA)
    return DEMO_DATA


def training_data(options: TrainOptions) -> Path:
    """Return the data set to train on: --data, else the resumed run's own, else what `data_folder` finds."""
    if not options.data and (begun := _begun(options)):
        return Path(begun.info().data)
    return data_folder(options.data)


def plan_training(options: TrainOptions, data: Path) -> TrainJob:
    """Return the job that `options` ask for on the data set in `data`.

    Raises:
        UserError: options that do not fit each other, the data set, or the run that is to be resumed.
    """
    with closing(Dataset.open(data)) as dataset:
        name, side = dataset.spec.name, typical_side(dataset)
    begun = _begun(options)
    if options.resume and not begun:
        log.info("--resume: there is no run in %s yet, starting one", options.out)
    recipe = _recipe(options, begun.recipe() if begun else None, name, side)
    if recipe.distill.mode != "none" and not recipe.distill.teacher and name == "demo":
        recipe = recipes.override(recipe, {"distill.teacher": str(DEMO_TEACHER.resolve())})
    _check_teacher(recipe, options, name, side)
    out = begun.path if begun else options.out or _free_folder(recipe, name)
    return TrainJob(recipe, data, out, options.resume, options.command, options.tensorboard)


def plan_teaching(options: TrainOptions, views: int | None, data: Path) -> TeachJob:
    """Return the job that fills a teacher cache for the runs that `options` describe.

    Args:
        options: as for training; hard targets unless they say otherwise.
        views: of each image; None: one for every epoch.
        data: the data set.

    Raises:
        UserError: options that do not fit each other or the data set.
    """
    if options.distill == "none":
        raise UserError("--distill none has no targets", expected="hard or soft")
    recipe = plan_training(options, data).recipe
    if not recipe.distill.teacher:
        raise UserError("teach needs a teacher", expected="--teacher RUN, a file of weights, or a torchvision network")
    if views and options.per_image:
        raise UserError("--per-image and --views are two kinds of targets", remedy="give one of them")
    if views:
        if views % recipe.augment.repeats:
            found = f"augment.repeats {recipe.augment.repeats}: that many views of an image in an epoch"
            raise UserError(f"--views {views} does not divide", expected="a multiple of augment.repeats", found=found)
        recipe = recipes.override(recipe, {"distill.targets": "exact", "distill.views": 0, "train.epochs": views})
    return TeachJob(recipe, data)


def uses_demo_teacher(recipe: Recipe) -> bool:
    """Whether the recipe's teacher is the one that deitfast trains itself, on the demo set."""
    return recipe.distill.mode != "none" and Path(recipe.distill.teacher) == DEMO_TEACHER.resolve()


def demo_teacher(data: Path) -> TrainJob | None:
    """Return the job that trains (or finishes) the teacher of the demo set in `data`; None where it is trained."""
    folder = RunFolder(DEMO_TEACHER)
    recipe = recipes.choose(DEMO_TEACHER_ARCH, "demo", 0)
    if not folder.exists():
        log.info("no --teacher: training the demo set's own, %s, into %s", DEMO_TEACHER_ARCH, DEMO_TEACHER)
    elif folder.finished():
        log.info("no --teacher: using the demo set's own, %s", DEMO_TEACHER)
        return None
    else:
        log.info("no --teacher: finishing the demo set's own, %s", DEMO_TEACHER)
        recipe = folder.recipe()
    return TrainJob(recipe, data, DEMO_TEACHER, resume=True, command=())


def _begun(options: TrainOptions) -> RunFolder | None:
    """Return the run that --resume continues; None without one."""
    if not options.resume or options.out is None:
        return None
    folder = RunFolder(options.out)
    return folder if folder.exists() else None


def _recipe(options: TrainOptions, begun: Recipe | None, dataset: str, side: int) -> Recipe:
    """Return the recipe: the named one, the resumed run's, or what suits network, weights and data; then overrides."""
    arch = recipes.check_arch(options.arch) if options.arch else None
    source = options.weights or options.finetune
    # a run that has begun does not need them again
    start = read_weights(source, which=options.which or "auto") if source and not begun else None
    if options.recipe:
        recipe = recipes.load(options.recipe)
    elif begun:
        recipe = begun
    else:
        told = start if start and start.transformer else None  # its shapes tell size and patches, whatever the data
        recipe = recipe_of(told, arch) if told else recipes.choose(arch or "deit_ti", dataset, side)
        log.info("recipe %s (another: --recipe, see `deitfast recipes`)", recipe.name)
    if begun and source:
        fed = {"augment.mean": begun.augment.mean, "augment.std": begun.augment.std}
        recipe = recipes.override(recipe, {"model.token": begun.model.token} | fed)
    elif start and start.distilled and recipe.model.arch.startswith("deit_"):
        recipe = recipes.override(recipe, {"model.token": "on"})
    if start and (fed := normalization_of(start)):
        log.info("normalization as %s says: mean %s, std %s", start.sidecar.input_from, *fed.values())
        recipe = recipes.override(recipe, fed)
    named = {
        "model.arch": options.arch,
        "distill.mode": options.distill,
        "distill.teacher": _teacher_name(options.teacher) if options.teacher else None,
        "distill.teacher_weights": str(options.teacher_weights.resolve()) if options.teacher_weights else None,
        "distill.cache": _cache_name(options.cache) if options.cache else None,
        "model.weights": str(options.weights.resolve()) if options.weights else None,
        "model.finetune": str(options.finetune.resolve()) if options.finetune else None,
        "train.epochs": options.epochs,
        "train.batch": options.batch,
        "loader.skip_bad": True if options.skip_bad else None,
        "train.fraction": options.fraction,
        "model.start_checkpoint": options.which if source else None,
        "model.assume_class_order": True if options.assume_class_order and source else None,
        "distill.teacher_checkpoint": options.which if options.teacher else None,
        "distill.assume_class_order": True if options.assume_class_order and options.teacher else None,
    }
    given = {key: value for key, value in named.items() if value is not None}
    recipe = recipes.override(recipe, overrides(options.ablate) | given | recipes.parse_settings(options.settings))
    recipe = _with_targets(recipe, options)
    if recipe.name.endswith("_finetune") and not (recipe.model.weights or recipe.model.finetune):
        raise UserError(f"recipe {recipe.name} starts from trained weights", expected="--finetune FILE_OR_RUN")
    return recipe


def _teacher_name(teacher: str) -> str:
    """Return a teacher as the recipe keeps it: a path from the root where it is one, else its name."""
    return str(Path(teacher).resolve()) if Path(teacher).exists() else teacher


def _cache_name(cache: str) -> str:
    """Return a cache as the recipe keeps it: a path from the root, unless it is none or auto."""
    return cache if cache in ("none", "auto") else str(Path(cache).resolve())


def _with_targets(recipe: Recipe, options: TrainOptions) -> Recipe:
    """Return the recipe with the targets that --per-image or --views ask for."""
    if options.per_image:
        return recipes.override(recipe, {"distill.targets": "per_image", "distill.views": 0})
    if not options.views:
        return recipe
    exact = recipes.override(recipe, {"distill.targets": "exact", "distill.views": 0})
    if options.views >= exact.views:  # there is a view for every epoch
        return exact
    return recipes.override(recipe, {"distill.targets": "reused", "distill.views": options.views})


def _check_teacher(recipe: Recipe, options: TrainOptions, dataset: str, side: int) -> None:
    distill = recipe.distill
    kept = distill.cache not in ("none", "auto")
    if distill.mode != "none" and not distill.teacher and not kept:
        suggestion = recipes.choose("resnet18", dataset, side).name
        raise UserError(
            f"--distill {distill.mode} needs a teacher",
            expected="--teacher RUN, the folder of a finished run on the same classes",
            remedy=f"train one first: deitfast train --recipe {suggestion} --data ... --out runs/teacher",
        )
    idle = {
        "--teacher": distill.teacher,
        "--cache": kept,
        "--teacher-weights": options.teacher_weights,
        "--views": options.views,
        "--per-image": options.per_image,
    }
    if distill.mode == "none" and (named := [name for name, given in idle.items() if given]):
        raise UserError(f"{named[0]} without --distill", expected="--distill hard or --distill soft beside it")


def _free_folder(recipe: Recipe, dataset: str) -> Path:
    """Return runs/<data set>-<network>[-<distillation>], numbered where there is such a run already."""
    mode = recipe.distill.mode
    stem = f"{dataset}-{recipe.model.arch}" + (f"-{mode}" if mode != "none" else "")
    number, path = 1, Path("runs") / stem
    while path.exists():
        number += 1
        path = Path("runs") / f"{stem}-{number}"
    return path
