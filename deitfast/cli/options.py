"""From what the user typed to what runs: one table of flags, pure steps, one validation of the recipe at the end."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from deitfast.cli.data_facts import data_facts, data_folder
from deitfast.cli.demo import DEMO_TEACHER
from deitfast.cli.fitting import fit_recipe
from deitfast.config import recipe as recipes
from deitfast.config.ablations import overrides
from deitfast.config.choices import Arch, MethodName
from deitfast.config.fit_to_data import ADAPTABLE, DataFacts
from deitfast.config.methods import method_fields
from deitfast.config.recipe import RESUME_SAFE_FIELDS, Recipe
from deitfast.config.unused import unchanged, unused
from deitfast.distill.precompute import TeachJob
from deitfast.run_folder import RunFolder
from deitfast.train.job import TrainJob
from deitfast.weights.load import normalization_of, recipe_of
from deitfast.weights.read import read_weights
from deitfast.weights.zoo import is_zoo_model
from pipelines.errors import DeitfastError, UserError
from pipelines.workers import rank

log = logging.getLogger("deitfast")
RUNS = Path("runs")
Job = TypeVar("Job", TrainJob, TeachJob)

FLAGS = {
    "arch": "model.arch",
    "weights": "model.weights",
    "finetune": "model.finetune",
    "distill": "distill.mode",
    "teacher": "distill.teacher",
    "teacher_weights": "distill.teacher_weights",
    "cache": "distill.cache",
    "epochs": "train.epochs",
    "batch": "train.batch",
    "fraction": "train.fraction",
    "skip_bad": "loader.skip_bad",
    "loader": "loader.name",
}
"""Recipe field that each option sets."""
OPTION_OF = {field: f"--{name.replace('_', '-')}" for name, field in FLAGS.items()}
FILES = ("model.weights", "model.finetune", "distill.teacher_weights")
"""Fields that name a file or a folder."""
FILE_OR_NAME = {"distill.teacher": (), "distill.cache": ("none", "auto")}
"""Fields that may, with the names that are no path."""


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What the user typed, as far as it makes the recipe."""

    recipe: str | None = None
    """Name or file."""
    typed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe by full name, from --method, ablations, options and --set; of two the last counts."""
    method: MethodName | None = None
    views: int | None = None
    per_image: bool = False

    @classmethod
    def of(
        cls, *, recipe: str | None = None, method: MethodName | None = None, ablate: Sequence[str] | None = None,
        settings: Sequence[str] | None = None, views: int | None = None, per_image: bool = False,
        which: str | None = None, assume_class_order: bool = False, **flags: object,
    ) -> "RecipeOptions":  # fmt: skip
        """Return the options of a command; `flags` by their names in FLAGS, None or False where they were left out."""
        given = {FLAGS[name]: value for name, value in flags.items() if value is not None and value is not False}
        given |= _of_loaded(given, which, assume_class_order)
        if method and "distill.mode" in given:
            raise UserError("--method and --distill are mutually exclusive", remedy="leave --distill out")
        row = method_fields(method) if method else {}
        typed = row | overrides(ablate or ()) | given | recipes.parse_settings(settings or ())
        typed = {key: _absolute(key, value) for key, value in typed.items()}
        if "model.weights" in given and "model.finetune" in given:
            raise UserError("--weights and --finetune are mutually exclusive")
        if per_image and views:
            raise UserError("--per-image and --views are mutually exclusive")
        return cls(recipe=recipe, typed=typed, method=method, views=views, per_image=per_image)


def _of_loaded(given: Mapping[str, Any], which: str | None, assume_class_order: bool) -> dict[str, Any]:
    """Return the fields that --which and --assume-class-order set: of the weights that are loaded, or the teacher."""
    start, teacher = {"model.weights", "model.finetune"} & set(given), "distill.teacher" in given
    if not (start or teacher) and (which or assume_class_order):
        option = "--which" if which else "--assume-class-order"
        raise UserError(f"{option} requires --weights, --finetune or --teacher")
    fields = {"model.start_checkpoint": which, "model.assume_class_order": assume_class_order} if start else {}
    fields |= {"distill.teacher_checkpoint": which, "distill.assume_class_order": assume_class_order} if teacher else {}
    return {key: value for key, value in fields.items() if value}


def _absolute(key: str, value: Any) -> Any:
    """Return the value of a field as the recipe keeps it: a path from the root where it is one."""
    text = str(value) if isinstance(value, Path) else value
    if key in FILES and text:
        return str(Path(text).expanduser().resolve())
    if key in FILE_OR_NAME and text and text not in FILE_OR_NAME[key]:
        path = Path(text).expanduser()
        return str(path.resolve()) if path.exists() or key == "distill.cache" else text
    return value


@dataclass(frozen=True)
class Plan(Generic[Job]):
    """A job, and what the user should know of how it came about."""

    job: Job
    notes: tuple[str, ...]


def say_recipe(plan: Plan[Any]) -> None:
    """Log the notes of a plan."""
    for note in plan.notes:
        log.info("%s", note)


def plan_training(
    options: RecipeOptions,
    *,
    data: Path | None,
    out: Path | None,
    resume: bool = False,
    tensorboard: bool = False,
    command: tuple[str, ...] = (),
) -> Plan[TrainJob]:
    """Return the training that the options describe. Nothing is made and nothing but small files is read.

    Raises:
        UserError: options that do not fit each other, the data set, or the run that is to be resumed.
    """
    if tensorboard and find_spec("tensorboard") is None:
        raise UserError("--tensorboard: TensorBoard is not installed", remedy="pip install tensorboard")
    existing = RunFolder(out) if out and RunFolder(out).exists() else None
    if existing and not resume:
        raise UserError(
            f"{out} already holds a run", remedy=f"resume it: {existing.resume_command()}, or give another --out"
        )
    folder = Path(existing.info().data) if existing and not data else data_folder(data)
    facts = data_facts(folder)
    notes: list[str] = []
    if resume and not out and rank() == 0:  # the others are told which
        existing = unfinished_run(make_recipe(options, facts, None)[0], facts, options)
        notes.append(f"resuming {existing.path}, the newest unfinished run of this recipe and data")
    elif resume and out and not existing:
        notes.append(f"--resume: there is no run in {out} yet, starting one")
    recipe, said = make_recipe(options, facts, existing)
    path = existing.path if existing else out or _free_folder(recipe, facts.name, options.method)
    return Plan(TrainJob(recipe, folder, path, resume, command, tensorboard), (*notes, *said))


def plan_teaching(options: RecipeOptions, *, views: int | None, data: Path | None) -> Plan[TeachJob]:
    """Return the job that fills a teacher cache for the runs that the options describe.

    Args:
        options: as for training.
        views: views of each image; None: one for every epoch.
        data: folder of the data set.

    Raises:
        UserError: options that do not fit each other or the data set.
    """
    if options.typed.get("distill.mode", "none") == "none":
        raise UserError("teach requires --distill hard or soft")
    if views and options.per_image:
        raise UserError("--per-image and --views are mutually exclusive")
    folder = data_folder(data)
    as_many = {"train.epochs": views} if views else {}
    options = RecipeOptions(recipe=options.recipe, typed={**options.typed, **as_many}, per_image=options.per_image)
    recipe, notes = make_recipe(options, data_facts(folder), None)
    if not recipe.distill.teacher:
        raise UserError("teach requires --teacher", expected="a run folder, weights file or torchvision model")
    if views and views % recipe.augment.repeats:
        raise UserError(f"--views {views} must be a multiple of augment.repeats {recipe.augment.repeats}")
    return Plan(TeachJob(recipe, folder), tuple(notes))


def make_recipe(
    options: RecipeOptions, facts: DataFacts, existing: RunFolder | None, *, largest_batch: int | None = None
) -> tuple[Recipe, list[str]]:
    """Return the recipe that the options describe, and a line on each thing that the user should know of it.

    Args:
        options: as typed.
        facts: of the data set.
        existing: the run that is resumed, whose recipe the options are changes of.
        largest_batch: bound of a batch that was not typed.

    Raises:
        UserError: options that do not fit each other or the data set.
    """
    typed = options.typed
    _require_files(typed, existing)
    source, changes, notes = _source(options, facts, existing)
    changes |= typed
    values = recipes.flatten(source) | changes
    if facts.name == "demo" and values["distill.mode"] != "none" and not values["distill.teacher"]:
        changes["distill.teacher"] = str(DEMO_TEACHER.resolve())
    if existing:  # what was fitted when it started stays, whatever the number of ranks now
        then = recipes.flatten(existing.recipe())
        changes = {key: then[key] for key in ADAPTABLE} | changes
    else:
        kept = {*typed, *recipes.own_fields(options.recipe)} if options.recipe else set(typed)
        if largest_batch and "train.batch" not in kept and values["train.batch"] > largest_batch:
            notes.append(f"batch at most {largest_batch}, for this device, instead of {values['train.batch']:,}")
            changes["train.batch"] = values["train.batch"] = largest_batch
        fitted, said = fit_recipe(values, kept, facts)
        changes, notes = changes | fitted, [*notes, *said]
    changes |= _targets(options, values | changes)
    if _class_head_only(values | changes) and "distill.head" not in typed:
        changes["distill.head"] = "class"
        notes.append(f"{values['model.arch']} has no distillation token: its class head learns from label and teacher")
    recipe = recipes.override(source, changes)
    _check_distillation(recipe, options, facts)
    if recipe.name.endswith("_finetune") and not (recipe.model.weights or recipe.model.finetune):
        raise UserError(f"recipe {recipe.name} starts from trained weights", expected="--finetune FILE_OR_RUN")
    if not existing:
        by_name = {"model.arch", *(method_fields(options.method) if options.method else ())}
        own = {key: value for key, value in typed.items() if key not in by_name}
        notes += unused(recipe, own)
        notes += unchanged(source, own)
    return recipe, notes


def _class_head_only(values: Mapping[str, Any]) -> bool:
    """Whether a network without a distillation token is to learn from a teacher."""
    distills = values["distill.mode"] != "none" and values["distill.head"] == "distillation"
    return distills and values["model.arch"] in get_args(Arch) and not values["model.arch"].startswith("deit_")


def _require_files(typed: Mapping[str, Any], existing: RunFolder | None) -> None:
    """Refuse files that are not there, before anything large is read; a resumed run needs them no more."""
    for key in FILES:
        if key in typed and typed[key] and not existing and not Path(typed[key]).exists():
            path = Path(typed[key])
            shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            raise UserError(f"{OPTION_OF[key]}: weights file not found: {shown}")
    teacher = typed.get("distill.teacher")
    if teacher and not existing and not Path(teacher).exists() and not is_zoo_model(teacher):
        raise UserError(
            f"teacher {teacher!r} not found (not a run folder, weights file, torchvision model or timm/NAME)"
        )


def _source(
    options: RecipeOptions, facts: DataFacts, existing: RunFolder | None
) -> tuple[Recipe, dict[str, Any], list[str]]:
    """Return the recipe to start from, the changes that the weights ask for, and notes.

    It is the named one, the resumed run's, or the one that suits weights, architecture and data.
    """
    typed = options.typed
    named = recipes.load(options.recipe) if options.recipe else None
    path = typed.get("model.weights") or typed.get("model.finetune")
    if existing:
        own = existing.recipe()
        fed = {"model.token": own.model.token, "augment.mean": own.augment.mean, "augment.std": own.augment.std}
        return named or own, fed if path else {}, []
    arch: Arch | None = typed["model.arch"] if typed.get("model.arch") in get_args(Arch) else None
    start = read_weights(Path(path), which=typed.get("model.start_checkpoint", "auto")) if path else None
    told = start if start and start.transformer else None  # its shapes tell size and patches, whatever the data
    source = named or (recipe_of(told, arch) if told else recipes.choose(arch or "deit_ti", facts.name, facts.side))
    distilled = start and start.distilled and (arch or source.model.arch).startswith("deit_")
    notes = [] if named else [f"recipe {source.name} (another: --recipe, see `deitfast recipes`)"]
    changes: dict[str, Any] = {"model.token": "on"} if distilled else {}
    if start and (fed := normalization_of(start)):
        notes.append(
            f"normalization as {start.sidecar.input_from} says: mean {fed['augment.mean']}, std {fed['augment.std']}"
        )
        changes |= fed
    return source, changes, notes


def _targets(options: RecipeOptions, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that --per-image or --views set."""
    if options.per_image:
        return {"distill.targets": "per_image", "distill.views": 0}
    if not options.views:
        return {}
    epochs, repeats = values["train.epochs"], values["augment.repeats"]
    if isinstance(epochs, int) and isinstance(repeats, int) and options.views >= -(-epochs // repeats) * repeats:
        return {"distill.targets": "exact", "distill.views": 0}  # there is a view for every epoch
    return {"distill.targets": "reused", "distill.views": options.views}


def _check_distillation(recipe: Recipe, options: RecipeOptions, facts: DataFacts) -> None:
    distill, typed = recipe.distill, options.typed
    if distill.mode != "none":
        if not distill.teacher and distill.cache in ("none", "auto"):
            suggestion = recipes.choose("resnet18", facts.name, facts.side).name
            raise UserError(
                f"--distill {distill.mode} requires a teacher",
                expected="--teacher with a run folder, weights file or torchvision model, or --cache with a full cache",
                remedy=f"train one first: deitfast train --recipe {suggestion} --data ... --out runs/teacher",
            )
        return
    idle = [OPTION_OF[key] for key in ("distill.teacher", "distill.cache", "distill.teacher_weights") if typed.get(key)]
    idle += ["--views"] * bool(options.views) + ["--per-image"] * options.per_image
    if idle:
        raise UserError(f"{idle[0]} requires --distill hard or soft")


def unfinished_run(recipe: Recipe, facts: DataFacts, options: RecipeOptions) -> RunFolder:
    """Return the newest unfinished run of this recipe and data in runs/.

    Raises:
        UserError: there is none; unfinished runs of other recipes or data are named.
    """
    free = {key for key in ADAPTABLE if key not in options.typed}
    others = []
    for run in sorted(_unfinished(), key=lambda run: -(run.path / "recipe.toml").stat().st_mtime):
        changed = {key for key in recipes.differences(run.recipe(), recipe) if not key.startswith(RESUME_SAFE_FIELDS)}
        if changed <= free and run.info().fingerprint == facts.fingerprint:
            return run
        others.append(run)
    raise UserError(
        f"--resume: no unfinished run of this recipe and data in {RUNS}/",
        found=", ".join(f"{run.path} ({run.recipe().name})" for run in others),
        remedy=others[0].resume_command() if others else "name its folder with --out RUN_DIR, or leave --resume out",
    )


def _unfinished() -> list[RunFolder]:
    found = []
    for path in RUNS.iterdir() if RUNS.is_dir() else ():
        run = RunFolder(path)
        try:
            if run.exists() and not run.finished():
                run.info()
                found.append(run)
        except DeitfastError as error:  # a damaged folder is no reason to refuse the others
            log.warning("%s is left out: %s", path, error.problem)
    return found


def _free_folder(recipe: Recipe, dataset: str, method: MethodName | None) -> Path:
    """Return runs/<data set>-<network>[-<method or kind of distillation>], numbered where there is one already."""
    how = method or recipe.distill.mode
    stem = f"{dataset}-{recipe.model.arch}" + (f"-{how}" if how != "none" else "")
    number, path = 1, RUNS / stem
    while path.exists():
        number += 1
        path = RUNS / f"{stem}-{number}"
    return path
