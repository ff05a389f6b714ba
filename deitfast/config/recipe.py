"""One frozen Recipe: everything that decides what a run learns. Load, override, dump, digest."""

import tomllib
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, cast, get_args

import tomli_w
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from deitfast.config.sections import Arch, DistillSpec, ModelSpec, OptimSpec, ScheduleSpec, TrainSpec
from pipelines.errors import UserError
from pipelines.spec import STRICT, AugmentSpec, LoaderSpec, digest

RESUME_SAFE_FIELDS = ("loader.", "distill.cache", "train.kernels", "train.checkpoint_minutes", "train.evaluate_every")
"""Fields that decide how fast, not what, a run learns: a resumed run may change them."""


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """One tree of settings; nothing else decides what a run learns."""

    name: str = "custom"
    """Name of the recipe, for people."""
    model: ModelSpec = Field(default_factory=ModelSpec)
    augment: AugmentSpec = Field(default_factory=AugmentSpec)
    distill: DistillSpec = Field(default_factory=DistillSpec)
    optim: OptimSpec = Field(default_factory=OptimSpec)
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    train: TrainSpec = Field(default_factory=TrainSpec)
    loader: LoaderSpec = Field(default_factory=LoaderSpec)

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> "Recipe":
        transformer = self.model.arch.startswith(("deit_", "vit_"))
        if transformer and self.augment.size % self.model.patch:
            raise ValueError(f"augment.size {self.augment.size} is no multiple of model.patch {self.model.patch}")
        mixed = self.augment.mixup or self.augment.cutmix
        if mixed and self.train.batch % self.augment.mix_group:
            raise ValueError(
                f"train.batch {self.train.batch} is no multiple of augment.mix_group {self.augment.mix_group}; "
                f"set augment.mix_group to an even divisor of the batch of one rank"
            )
        if self.train.batch % self.train.accumulate:
            raise ValueError(
                f"train.batch {self.train.batch} is no multiple of train.accumulate {self.train.accumulate}"
            )
        if self.train.compile == "graphs" and self.train.accumulate > 1:
            raise ValueError("train.compile graphs keeps one gradient at a time; set train.accumulate to 1")
        if self.model.weights and self.model.finetune:
            raise ValueError("model.weights and model.finetune are two ways to start; set one of them")
        if self.distill.mode != "none" and not transformer:
            raise ValueError(f"distill.mode {self.distill.mode} needs a deit_* or vit_* model, found {self.model.arch}")
        if self.distill.mode != "none" and self.distill.head == "distillation" and self.model.arch.startswith("vit_"):
            raise ValueError(f"{self.model.arch} has no distillation token; set distill.head to class or take a deit_*")
        if (self.distill.targets == "reused") != bool(self.distill.views):
            raise ValueError('distill.views goes with distill.targets = "reused", and that with distill.views')
        if self.distill.targets == "per_image" and self.distill.cache == "none":
            raise ValueError('distill.targets = "per_image" needs a distill.cache')
        if self.distill.views % self.augment.repeats:
            raise ValueError(
                f"distill.views {self.distill.views} is no multiple of augment.repeats {self.augment.repeats}"
            )
        return self

    @property
    def views(self) -> int:
        """Views of each image that the run looks at: those that are reused, or as many as its passes have."""
        passes = -(-self.train.epochs // self.augment.repeats)
        return self.distill.views or passes * self.augment.repeats

    @property
    def distilled(self) -> bool:
        """Whether the model has a distillation token and so two heads."""
        if self.model.token != "auto":
            return self.model.token == "on"
        return self.distill.mode != "none" and self.distill.head == "distillation"

    @property
    def digest(self) -> str:
        """16 hex digits that name every value of the recipe."""
        return digest(self)


_ADAPTER = TypeAdapter(Recipe)
_BUILT_IN = resources.files("deitfast") / "config" / "recipes"


def names() -> list[str]:
    """Return the names of the recipes that come with deitfast."""
    return sorted(path.name.removesuffix(".toml") for path in _BUILT_IN.iterdir() if path.name.endswith(".toml"))


def head(name: str) -> str:
    """Return the comment at the head of a built-in recipe: its command, duration and expected accuracy."""
    lines = (_BUILT_IN / f"{name}.toml").read_text().splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def load(name: str) -> Recipe:
    """Return the recipe of that name, or the one in the TOML file of that path.

    A file may begin with `extends = "NAME"` and hold only what differs from that built-in recipe. One level: what is
    extended extends nothing itself.

    Raises:
        UserError: no such recipe or file, unreadable TOML, an unknown key or a bad value (all of them named).
    """
    tree, origin = _tree(name)
    if base := tree.pop("extends", None):
        if base not in names() or "extends" in (below := _tree(base)[0]):
            plain = [each for each in names() if "extends" not in _tree(each)[0]]
            raise UserError(f"{origin} cannot extend {base}", expected=f"extends to be one of: {', '.join(plain)}")
        merged = {
            key: {**below[key], **value} if isinstance(value, dict) and isinstance(below.get(key), dict) else value
            for key, value in tree.items()
        }
        tree = below | merged
    return build(tree, origin)


def _tree(name: str) -> tuple[dict[str, Any], str]:
    """Return what a recipe's file says, and how errors call it."""
    if name in names():
        file, origin = _BUILT_IN / f"{name}.toml", f"recipe {name}"
    elif (path := Path(name)).is_file():
        file, origin = path, f"recipe {path}"
    else:
        raise UserError(f"there is no recipe {name}", expected=f"a TOML file or one of: {', '.join(names())}")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")), origin
    except ValueError as error:  # TOML's and UTF-8's errors
        raise UserError(f"{origin} is not TOML", found=str(error)) from None


def build(tree: dict[str, Any], origin: str) -> Recipe:
    """Return the recipe of a tree of plain values; `origin` names it in errors.

    Raises:
        UserError: an unknown key or a bad value, each with its full name.
    """
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise UserError(f"{origin} does not hold together:\n" + "\n".join(map(_explain, error.errors()))) from None


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("unexpected_keyword_argument", "dataclass_exact_type"):
        return f"  {key}: unknown key{_did_you_mean(key)}"
    found = f", found {error['input']!r}" if key and error["type"] != "value_error" else ""
    return f"  {key or 'recipe'}: {error['msg'].removeprefix('Value error, ')}{found}"


def _did_you_mean(key: str) -> str:
    close = get_close_matches(key, flatten(Recipe()), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def override(recipe: Recipe, settings: list[str]) -> Recipe:
    """Return the recipe with `settings` of the form `a.b=value` in place; values are TOML, or else plain text.

    Raises:
        UserError: no `=` in a setting, an unknown key, a bad value, or fields that do not fit each other.
    """
    tree = asdict(recipe)
    for setting in settings:
        key, equals, value = setting.partition("=")
        path = key.strip().split(".")
        if not equals:
            raise UserError(f"--set {setting} has no value", expected="--set section.field=value")
        branch = tree
        for part in path[:-1]:
            branch = branch.get(part)
            if not isinstance(branch, dict):
                raise UserError(f"--set {setting}: unknown key {key}{_did_you_mean(key)}")
        if isinstance(branch.get(path[-1]), dict):
            raise UserError(f"--set {setting}: {key} is a section", expected=f"one of its fields, as {key}.field=value")
        branch[path[-1]] = _value(value.strip())
    return build(tree, f"--set {' --set '.join(settings)}")


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def dump(recipe: Recipe) -> str:
    """Return the whole recipe as TOML; `load` reads it back to an equal recipe."""
    return tomli_w.dumps(asdict(recipe))


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Return every field of the recipe under its full name: {"augment.size": 224, ...}."""
    flat: dict[str, Any] = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if is_dataclass(value):
            flat |= {f"{field.name}.{inner.name}": getattr(value, inner.name) for inner in fields(value)}
        else:
            flat[field.name] = value
    return flat


def differences(one: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two recipes differ, with both values."""
    left, right = flatten(one), flatten(other)
    return {key: (left[key], right[key]) for key in left if left[key] != right[key]}


def check_arch(name: str) -> Arch:
    """Return `name` if a network is called so.

    Raises:
        UserError: none is.
    """
    if name not in get_args(Arch):
        raise UserError(f"there is no network called {name}", expected=f"one of: {', '.join(get_args(Arch))}")
    return cast(Arch, name)


def choose(arch: Arch, dataset: str, side: int) -> Recipe:
    """Return the built-in recipe for a network on a data set, with that `arch`.

    The one of exactly that name; else that of the same family (transformer or CNN) for the same kind of data: the
    demo set, images of at most 64 pixels (CIFAR's recipe), or larger ones (ImageNet's).

    Args:
        arch: the network.
        dataset: `DatasetSpec.name`.
        side: median of the shorter sides of the images, in pixels.
    """
    exact = f"{arch}_{dataset}"
    kind = "demo" if dataset == "demo" else "cifar10" if side <= 64 else "imagenet"
    family = "deit_ti" if arch.startswith(("deit_", "vit_")) else "resnet18"
    recipe = load(exact if exact in names() else f"{family}_{kind}")
    return override(recipe, [f"model.arch={arch}"])
