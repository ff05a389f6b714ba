"""From a study's file and a data set to runs: every recipe, folder and command, before anything trains."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from deitfast.config import recipe as recipes
from deitfast.config.fit_to_data import DataFacts, fit_to_data
from deitfast.config.recipe import RESUME_SAFE_FIELDS, Recipe
from deitfast.config.sections import TRANSFORMER_FIELDS, ModelSpec
from deitfast.models.vit import build_model
from deitfast.run_folder import RunFolder
from deitfast.study.spec import Row, Scale, Study, Training, chosen_rows, slug
from pipelines.errors import UserError

SHARED = ("recipe", "teacher", "finetune")
"""What a row has from the base unless it says otherwise."""
CHECKPOINTS = 2
"""Of a run on the disk, the last and the one before; the best weights besides."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What the user chose."""

    data: Path
    out: Path
    scale: str
    seeds: int | None = None
    """None: as many as the scale says."""
    only: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    """Fields of every recipe, each as section.field=value."""
    device: str = "auto"


@dataclass(frozen=True)
class PlannedRun:
    """One training, as `deitfast train` would do it."""

    name: str
    """Of its folder."""
    recipe: Recipe
    data: Path
    needs: tuple[str, ...]
    """Runs that must be finished before: its teacher, and what it starts from."""
    images: int
    """Training images that it uses."""
    fingerprint: str
    """Of its data set; "": not made yet."""
    classes: int


@dataclass(frozen=True)
class PlannedRow:
    """One row of the table, and its runs: one a seed."""

    row: Row
    runs: tuple[str, ...]
    head: str
    """Head whose figures are shown; auto: the one that predicts."""


@dataclass(frozen=True)
class StudyPlan:
    """Everything that a study will do."""

    study: Study
    options: StudyOptions
    seeds: int
    runs: tuple[PlannedRun, ...]
    """In an order in which they can be trained; all of one seed before any of the next."""
    rows: tuple[PlannedRow, ...]
    notes: tuple[str, ...] = ()
    """What was fitted to the data."""

    def folder(self, run: str) -> Path:
        """Return the run folder of that name."""
        return self.options.out / "runs" / run

    def recipe_file(self, run: str) -> Path:
        """Return the file that holds the recipe of that run."""
        return self.options.out / "recipes" / f"{run}.toml"

    def command(self, run: PlannedRun) -> tuple[str, ...]:
        """Return the words of the command that trains a run, or goes on with it."""
        return ("deitfast", "train", "--recipe", str(self.recipe_file(run.name)), "--data", str(run.data),
                "--out", str(self.folder(run.name)), "--resume")  # fmt: skip

    def typed(self) -> str:
        """Return the command that trains all of it, or goes on with it."""
        options = self.options
        more = [f"--scale {options.scale}", f"--seeds {self.seeds}"] if self.study.kind == "training" else []
        more += [f"--data {shlex.quote(str(options.data))}"] if self.study.kind == "training" else []
        more += [f"--only {shlex.quote(name)}" for name in options.only]
        more += [f"--set {shlex.quote(setting)}" for setting in options.settings]
        more += [f"--out {shlex.quote(str(options.out))}"]
        return " ".join(["deitfast study", shlex.quote(self.study.given), *more])

    def commands(self) -> Iterator[str]:
        """Yield every command, as it is to be typed."""
        if self.study.kind == "throughput":
            yield self.typed()
            return
        yield from (shlex.join(self.command(run)) for run in self.runs)


def plan_study(
    study: Study, options: StudyOptions, facts_of: Callable[[Path], DataFacts], demo: Path, ranks: int = 1
) -> StudyPlan:
    """Return what the study will do; nothing is made, and nothing but small files is read.

    Args:
        study: as its file says.
        options: as typed.
        facts_of: tells what planning needs to know of a data set.
        demo: folder of the built-in demo set.
        ranks: processes of each run.

    Raises:
        UserError: no such scale or row, a recipe that does not work, a data set without validation, a row that distills
            from no teacher, a folder with runs of other settings, or too little room on the disk.
    """
    planner = _Planner(study, options, facts_of, demo, ranks)
    rows = [planner.row(row) for row in chosen_rows(study, list(options.only))]
    runs = sorted(planner.runs.values(), key=lambda run: run.recipe.train.seed)  # teachers, of seed 0, stay in front
    plan = StudyPlan(study, options, planner.seeds, tuple(runs), tuple(rows), tuple(planner.notes))
    _check_folders(plan)
    return plan


class _Planner:
    """Makes the runs of rows, each once: rows that are trained alike share theirs."""

    def __init__(
        self, study: Study, options: StudyOptions, facts_of: Callable[[Path], DataFacts], demo: Path, ranks: int
    ) -> None:
        self.study, self.options, self.demo, self.ranks = study, options, demo, ranks
        self.facts_of = facts_of
        self.scale = _scale(study, options.scale)
        self.seeds = options.seeds or self.scale.seeds
        self.settings = recipes.parse_settings(options.settings)
        self.runs: dict[str, PlannedRun] = {}
        self.notes: dict[str, None] = {}
        self._by_recipe: dict[str, str] = {}

    def row(self, row: Row) -> PlannedRow:
        """Plan the runs of a row, after those that they need."""
        base = replace(self.study.base, method=None) if row.method else self.study.base
        own = {name: value for name in SHARED if (value := getattr(row, name))}
        training = replace(base, **own)
        changes = base.changes(self.options.scale) | recipes.parse_settings(self.scale.rows)
        changes |= row.changes(self.options.scale)  # what tells the rows apart is no matter of scale
        names, head = [], "auto"
        for seed in range(self.seeds):
            name = slug(row.name) + (f"-seed{seed}" if seed else "")  # more seeds go on from what fewer have left
            run = self._run(name, training, {**changes, "train.seed": seed}, self.options.data)
            head = run[1].model.prediction
            names.append(run[0])
        return PlannedRow(row, tuple(names), head)

    def _run(self, name: str, training: Training, changes: dict[str, Any], data: Path) -> tuple[str, Recipe]:
        """Plan one run, or find the one that is trained alike; return its name, and the recipe that was asked for."""
        needs = []
        if training.teacher:
            needs.append(self._shared(training.teacher, self.study.teachers, self.scale.teachers, self.options.data))
            changes = {"distill.teacher": str(self._folder(needs[-1])), **changes}
            if changes.get("distill.mode") == "soft":  # `auto` keeps hard targets only
                changes = {"distill.cache": str(self.options.out.resolve() / "caches" / slug(name)), **changes}
        if training.finetune:
            start = self.study.pretrained[training.finetune]
            other = self.demo if start.data == "demo" else Path(start.data).expanduser() if start.data else None
            where = other or self.options.data
            needs.append(self._shared(training.finetune, self.study.pretrained, self.scale.pretrained, where))
            changes = {"model.finetune": str(self._folder(needs[-1])), **changes}
        facts = self.facts_of(data)
        if not facts.validated:
            raise UserError(
                f"{data} has no validation split, and a study compares what is validated",
                remedy="convert it again with --val-fraction 0.1",
            )
        recipe = self._recipe(name, training, changes | self.settings, facts)
        if recipe.distill.mode != "none" and not recipe.distill.teacher:
            raise UserError(
                f"row {name} of study {self.study.name} distills and has no teacher",
                expected=f"teacher = one of: {', '.join(self.study.teachers) or 'a [teachers.NAME] of the study'}",
            )
        key = _identity(recipe, data)
        if key not in self._by_recipe:
            if name in self.runs:  # a teacher and a row of one name that are not trained alike
                name += "-row"
            self._by_recipe[key] = name
            images = facts.images(recipe.train.fraction)
            self.runs[name] = PlannedRun(name, recipe, data, tuple(needs), images, facts.fingerprint,
                                         len(facts.counts))  # fmt: skip
        return self._by_recipe[key], recipe

    def _shared(self, name: str, among: Any, scale: tuple[str, ...], data: Path) -> str:
        """Plan the run of a teacher or a pretrained network, once; return its name."""
        training = among[name]
        own = training.changes(self.options.scale)
        changes = {**recipes.parse_settings(scale), **own, "train.seed": 0}
        return self._run(slug(name), training, changes, data)[0]

    def _folder(self, run: str) -> Path:
        return (self.options.out / "runs" / run).resolve()

    def _recipe(self, name: str, training: Training, changes: dict[str, Any], facts: DataFacts) -> Recipe:
        """Return a run's recipe, fitted to the data as `deitfast train` does."""
        arch = recipes.check_arch(str(changes.get("model.arch", "deit_ti")))
        source = recipes.load(training.recipe) if training.recipe else recipes.choose(arch, facts.name, facts.side)
        origin = f"study {self.study.name}, {name}"
        recipe = recipes.override(source, {**changes, "name": f"{self.study.name}-{name}"}, origin)
        images = facts.images(recipe.train.fraction)
        fitted, notes = fit_to_data(recipes.flatten(recipe), set(self.settings), images, self.ranks)
        self.notes |= dict.fromkeys(notes)
        return recipes.override(recipe, fitted, origin)


def _identity(recipe: Recipe, data: Path) -> str:
    """Return what two runs that learn the same have in common: not names, nor the head shown, nor what is unused."""
    model = replace(recipe.model, prediction="auto")
    if not recipe.transformer:
        model = replace(model, **{field: getattr(ModelSpec(), field) for field in TRANSFORMER_FIELDS})
    cache = "none" if recipe.distill.cache == "none" else "auto"
    free = replace(recipe, name="", model=model, distill=replace(recipe.distill, cache=cache))
    return f"{free.digest} {data.resolve()}"


def _scale(study: Study, name: str) -> Scale:
    found = dict(study.scales)
    if name in found:
        return found[name]  # pyright: ignore
    if not found:
        return Scale()
    raise UserError(f"study {study.name} has no scale {name}", expected=f"one of: {', '.join(found) or 'cpu'}")


def _check_folders(plan: StudyPlan) -> None:
    """Refuse a folder that holds the runs of another study, or of this one with other settings."""
    for run in plan.runs:
        folder = RunFolder(plan.folder(run.name))
        if not folder.exists():
            continue
        changed = recipes.differences(folder.recipe(), run.recipe)
        free = ("name", *RESUME_SAFE_FIELDS)
        if changed := {key: both for key, both in changed.items() if not key.startswith(free)}:
            raise UserError(
                f"{plan.options.out} holds this study with other settings",
                found=f"run {run.name}: " + ", ".join(f"{key} {a!r} -> {b!r}" for key, (a, b) in changed.items()),
                remedy="give the settings of then, or another --out",
            )
        if run.fingerprint and folder.info().fingerprint != run.fingerprint:
            raise UserError(
                f"{plan.options.out} holds this study on another data set",
                found=folder.info().data,
                remedy="give another --out",
            )


def parameters(recipe: Recipe, classes: int) -> int:
    """Return the parameters of a recipe's network."""
    return _parameters(recipe.model, recipe.augment.size, classes, recipe.distilled)


@cache
def _parameters(model: ModelSpec, size: int, classes: int, distilled: bool) -> int:
    with torch.device("meta"):
        built = build_model(model, size=size, classes=classes, distilled=distilled)
    return sum(parameter.numel() for parameter in built.parameters())


def disk_bytes(runs: Sequence[PlannedRun]) -> int:
    """Return the bytes that runs will leave behind, roughly: checkpoints with moments and averages, caches."""
    total = 0
    for run in runs:
        numbers_a_weight = CHECKPOINTS * (3 + bool(run.recipe.train.ema)) + 1  # two moments, and the average
        total += 4 * parameters(run.recipe, run.classes) * numbers_a_weight
        if run.recipe.distill.mode != "none":
            bytes_a_view = 2 if run.recipe.distill.mode == "hard" else 4 * run.recipe.distill.top_k + 4
            total += bytes_a_view * run.images * run.recipe.views
    return total
