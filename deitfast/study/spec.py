"""What a study's TOML file holds: rows, their teachers, scales, columns, published figures and claims."""

import itertools
import re
import tomllib
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from deitfast.config.ablations import overrides
from deitfast.config.builtin import STUDIES, study_names
from deitfast.config.choices import Arch, MethodName
from deitfast.config.methods import method_fields
from deitfast.config.recipe import parse_settings
from pipelines.errors import UserError
from pipelines.spec import STRICT

Column = Literal[
    "top1", "top5", "precision", "recall", "f1", "auc", "loss", "parameters", "minutes", "images_per_second",
    "size", "eager", "compiled",
]  # fmt: skip
ScaleName = Literal["cpu", "gpu", "paper"]
SHARES = ("top1", "top5")
"""Columns that are shown, and published, in per cent."""
MEASURED_ONLY = ("size", "eager", "compiled")
"""Columns of a throughput study."""
MOST_SEEDS = 100


@dataclass(frozen=True, config=STRICT)
class Training:
    """How one network is trained: the options of `deitfast train`."""

    recipe: str = ""
    """Built-in recipe or TOML file; "": the one that suits network and data."""
    arch: Arch | None = None
    """Network; none: the recipe's, without a recipe deit_ti."""
    method: MethodName | None = None
    """Row of the paper's table 3."""
    ablate: tuple[str, ...] = ()
    """Rows of the paper's table 8."""
    teacher: str = ""
    """Name of one of the study's teachers."""
    finetune: str = ""
    """Name of one of the study's pretrained networks, to start from."""
    set: tuple[str, ...] = ()
    """Fields of the recipe, each as section.field=value."""
    at: dict[ScaleName, tuple[str, ...]] = Field(default_factory=dict)
    """The same, for one scale only."""

    def changes(self, scale: str = "") -> dict[str, Any]:
        """Return the fields that differ from the recipe's, by full name; what is set by `set` and `at` counts last.

        Raises:
            UserError: an unknown ablation, or a setting without a value.
        """
        changes = method_fields(self.method) if self.method else {}
        changes |= overrides(self.ablate)
        if self.arch:
            changes["model.arch"] = self.arch
        here = [setting for name, settings in self.at.items() if name == scale for setting in settings]
        return changes | parse_settings((*self.set, *here))


@dataclass(frozen=True, config=STRICT)
class Row(Training):
    """One row of the table."""

    name: str = Field(default="", min_length=1, max_length=60)
    """What the table calls it."""
    weights: Literal["plain", "averaged"] = "plain"
    """Weights whose figures are shown: as they are, or their average."""
    published: dict[Column, float] = Field(default_factory=dict)
    """Figures that somebody published for it; shares in per cent."""


@dataclass(frozen=True, config=STRICT)
class Pretrained(Training):
    """A network that rows start from."""

    data: str = ""
    """Folder of another data set to train it on, or demo; "": the study's."""


@dataclass(frozen=True, config=STRICT)
class Scale:
    """Settings that make a study as large as a machine can train it."""

    about: str = ""
    """What it takes."""
    rows: tuple[str, ...] = ()
    """Fields of the recipes of all rows."""
    teachers: tuple[str, ...] = ()
    """Fields of the recipes of all teachers."""
    pretrained: tuple[str, ...] = ()
    """Fields of the recipes of all pretrained networks."""
    seeds: int = Field(default=1, ge=1, le=MOST_SEEDS)
    """Seeds of each row, unless --seeds says otherwise."""


@dataclass(frozen=True, config=STRICT)
class Claim:
    """One row is better than another: what somebody found, or should find."""

    better: str
    """Name of a row."""
    than: str
    """Name of another."""
    column: Column = "top1"
    """By which figure; of the loss and of minutes the smaller is the better."""
    source: str = ""
    """Who says so."""


@dataclass(frozen=True, config=STRICT)
class Study:
    """A study, as its file says."""

    name: str
    """Name of its folder."""
    title: str
    """What the page is called."""
    given: str
    """As the command names it: a built-in study, or a file."""
    kind: Literal["training", "throughput"] = "training"
    """training: every row is trained; throughput: every row's network is timed, and none is trained."""
    base: Training = Field(default_factory=Training)
    """What all rows have in common."""
    rows: tuple[Row, ...] = Field(default=(), min_length=1)
    teachers: dict[str, Training] = Field(default_factory=dict)
    """Networks that rows learn from, by name: trained once, with seed 0."""
    pretrained: dict[str, Pretrained] = Field(default_factory=dict)
    """Networks that rows start from, by name: trained once, with seed 0."""
    scales: dict[ScaleName, Scale] = Field(default_factory=dict)
    columns: tuple[Column, ...] = ("top1", "minutes")
    claims: tuple[Claim, ...] = ()

    @cached_property
    def row_names(self) -> list[str]:
        """Names of the rows, in order."""
        return [row.name for row in self.rows]


_ADAPTER = TypeAdapter(Study)


def load_study(name: str) -> tuple[Study, str]:
    """Return the built-in study of that name, or the one in the TOML file of that path; and the comment at its head.

    Raises:
        UserError: no such study or file, unreadable TOML, or unknown keys, values, rows or teachers: all of them named.
    """
    if name in study_names():
        file, origin = STUDIES / f"{name}.toml", f"study {name}"
    elif Path(name).is_file():
        file, origin = Path(name), f"study {name}"
    else:
        raise UserError(
            f"study not found: {name}{_did_you_mean(name, study_names())}",
            expected=f"a TOML file or one of: {', '.join(study_names())}",
        )
    try:
        text = file.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except (ValueError, OSError) as error:
        raise UserError(f"{origin} is not TOML", found=str(error)) from None
    try:
        study = _ADAPTER.validate_python({"name": Path(name).stem, **tree, "given": name})
    except ValidationError as error:
        _refuse(origin, [_explain(each) for each in error.errors()])
    _refuse(origin, [*_problems(study)])
    head = itertools.takewhile(lambda line: line.startswith("#") or not line.strip(), text.splitlines())
    return study, " ".join(" ".join(line.removeprefix("#") for line in head).split())


def slug(name: str) -> str:
    """Return a name as a folder is called: letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("+", " plus ")).strip("-")


def _refuse(origin: str, problems: list[str]) -> None:
    if problems:
        listed = problems[0] if len(problems) == 1 else "".join(f"\n  {line}" for line in problems)
        raise UserError(f"invalid {origin}: {listed}")


def _explain(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "unexpected_keyword_argument":
        return f"unknown key {place}"
    return f"{place}: {error['msg'].replace('Input should be', 'must be')}, found {error['input']!r}"


def _problems(study: Study) -> list[str]:
    """Return what no schema sees: names that stand for nothing, and names that stand for two things."""
    found: list[str] = []

    def known(what: str, name: str, names: Any) -> None:
        if name not in names:
            found.append(f"{what} {name!r}{_did_you_mean(name, list(names))}")

    folders = [slug(name) for name in (*study.teachers, *study.pretrained, *study.row_names)]
    rows = [slug(name) for name in study.row_names]
    found += [f"two rows are called {row!r}" for row in sorted({row for row in rows if rows.count(row) > 1})]
    found += ["a name without letters or digits"] * folders.count("")
    found += [f"{name!r} is a teacher and a pretrained network" for name in set(study.teachers) & set(study.pretrained)]
    for where, training in (("base", study.base), *((f"row {row.name}", row) for row in study.rows),
                            *study.teachers.items(), *study.pretrained.items()):  # fmt: skip
        if training.teacher:
            known(f"{where}: unknown teacher", training.teacher, study.teachers)
        if training.finetune:
            known(f"{where}: unknown pretrained network", training.finetune, study.pretrained)
        try:
            for scale in ("", *training.at):
                training.changes(scale)
        except UserError as error:
            found.append(f"{where}: {error.problem}")
    for claim in study.claims:
        for name in (claim.better, claim.than):
            known("claim: unknown row", name, study.row_names)
        known(f"claim {claim.better} > {claim.than}: column is not shown:", claim.column, study.columns)
    measured = [column for column in study.columns if column in MEASURED_ONLY]
    if measured and study.kind == "training":
        found.append(f"column {measured[0]} is a throughput study's")
    return found


def _did_you_mean(name: str, names: list[str]) -> str:
    close = get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def chosen_rows(study: Study, only: list[str]) -> list[Row]:
    """Return the rows of those names (as the table or as folders are called), in the study's order; all without names.

    Raises:
        UserError: there is no row of a name.
    """
    wanted = {slug(name) for name in only}
    for name in only:
        if slug(name) not in map(slug, study.row_names):
            raise UserError(
                f"study {study.name} has no row {name!r}{_did_you_mean(name, study.row_names)}",
                expected=f"one of: {', '.join(study.row_names)}",
            )
    return [row for row in study.rows if not only or slug(row.name) in wanted]
