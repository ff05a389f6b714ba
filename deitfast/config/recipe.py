"""One frozen Recipe: everything that decides what a run learns. Load, override, dump, digest."""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, cast, get_args

import tomli_w
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from deitfast.config.builtin import RECIPES, names
from deitfast.config.choices import Arch
from deitfast.config.sections import DistillSpec, ModelSpec, OptimSpec, ScheduleSpec, TrainSpec
from pipelines.errors import UserError
from pipelines.spec import STRICT, AugmentSpec, LoaderSpec, digest

RESUME_SAFE_FIELDS = ("loader.", "distill.cache", "train.kernels", "train.checkpoint_minutes", "train.evaluate_every")
"""Fields that decide how fast, not what, a run learns: a resumed run may change them."""


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """One tree of settings; nothing else decides what a run learns."""

    name: str = "custom"
    """Name of the recipe, shown in reports and tables."""
    model: ModelSpec = Field(default_factory=ModelSpec)
    augment: AugmentSpec = Field(default_factory=AugmentSpec)
    distill: DistillSpec = Field(default_factory=DistillSpec)
    optim: OptimSpec = Field(default_factory=OptimSpec)
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    train: TrainSpec = Field(default_factory=TrainSpec)
    loader: LoaderSpec = Field(default_factory=LoaderSpec)

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> "Recipe":
        if broken := [message.format(r=self) for holds, message in RULES if not holds(self)]:
            raise ValueError("\n".join(broken))
        return self

    @property
    def transformer(self) -> bool:
        """Whether the network is a deit_* or vit_*, not a CNN."""
        return self.model.arch.startswith(("deit_", "vit_"))

    @property
    def mixes(self) -> bool:
        """Whether MixUp or CutMix is on."""
        return bool(self.augment.mixup or self.augment.cutmix)

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


RULES: tuple[tuple[Callable[[Recipe], object], str], ...] = (
    (
        lambda r: not r.transformer or r.augment.size % r.model.patch == 0,
        "augment.size {r.augment.size} must be a multiple of model.patch {r.model.patch}",
    ),
    (
        lambda r: not r.transformer or r.model.shape.width % r.model.shape.heads == 0,
        "model.width {r.model.shape.width} must be a multiple of model.heads {r.model.shape.heads}",
    ),
    (
        lambda r: not r.mixes or r.train.batch % r.augment.mix_group == 0,
        "train.batch {r.train.batch} must be a multiple of augment.mix_group {r.augment.mix_group}",
    ),
    (
        lambda r: r.train.batch % r.train.accumulate == 0,
        "train.batch {r.train.batch} must be a multiple of train.accumulate {r.train.accumulate}",
    ),
    (
        lambda r: r.train.compile != "graphs" or r.train.accumulate == 1,
        'train.compile = "graphs" requires train.accumulate = 1, found {r.train.accumulate}',
    ),
    (
        lambda r: not (r.model.weights and r.model.finetune),
        "model.weights and model.finetune are mutually exclusive",
    ),
    (
        lambda r: r.model.prediction in ("auto", "class") or r.distilled,
        'model.prediction = "{r.model.prediction}" requires a distillation token: distill.mode "soft" or "hard" with '
        'distill.head = "distillation", or model.token = "on"',
    ),
    (
        lambda r: r.distill.mode == "none" or r.distill.head == "class" or r.model.arch.startswith("deit_"),
        'model.arch = "{r.model.arch}" has no distillation token: set distill.head = "class" or use a deit_* model',
    ),
    (
        lambda r: (r.distill.targets == "reused") == bool(r.distill.views),
        'distill.views {r.distill.views} and distill.targets = "{r.distill.targets}" do not go together: '
        '"reused" requires a number of views, the other kinds take none',
    ),
    (
        lambda r: r.distill.targets != "reused" or not r.augment.mixup_off_epoch,
        "augment.mixup_off_epoch {r.augment.mixup_off_epoch} requires views that do not come round again: "
        'distill.targets must not be "reused"',
    ),
    (
        lambda r: r.distill.targets != "per_image" or r.distill.cache != "none",
        'distill.targets = "per_image" requires a teacher cache: distill.cache must not be "none"',
    ),
    (
        lambda r: r.distill.views % r.augment.repeats == 0,
        "distill.views {r.distill.views} must be a multiple of augment.repeats {r.augment.repeats}",
    ),
)
"""What must hold between fields of different sections, with the message where it does not. A message gives the full
name of every field that its rule reads."""

_ADAPTER = TypeAdapter(Recipe)
_PLAIN = Recipe()


def head(name: str) -> str:
    """Return the comment at the head of a built-in recipe: its command, duration and expected accuracy."""
    lines = (RECIPES / f"{name}.toml").read_text().splitlines()
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


def own_fields(name: str) -> set[str]:
    """Return the full names of the fields that a recipe's file sets itself; none for a built-in recipe."""
    return set() if name in names() else set(_flat(_tree(name)[0])) - {"extends", "name"}


def _tree(name: str) -> tuple[dict[str, Any], str]:
    """Return what a recipe's file says, and how errors call it."""
    if name in names():
        file, origin = RECIPES / f"{name}.toml", f"recipe {name}"
    elif (path := Path(name)).is_file():
        file, origin = path, f"recipe {path}"
    else:
        close = get_close_matches(name, names(), n=1)
        raise UserError(
            f"recipe not found: {name}" + (f" (did you mean {close[0]}?)" if close else ""),
            expected=f"a TOML file or one of: {', '.join(names())}",
        )
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")), origin
    except ValueError as error:  # TOML's and UTF-8's errors
        raise UserError(f"{origin} is not TOML", found=str(error)) from None


def build(tree: dict[str, Any], origin: str = "recipe", problems: Mapping[str, str] | None = None) -> Recipe:
    """Return the recipe of a tree of plain values.

    Args:
        tree: values by section and field; a field that is left out has its default.
        origin: what errors call the recipe.
        problems: what is wrong already, by full name of the field, to be told with the rest.

    Raises:
        UserError: unknown fields, bad values, fields that do not fit each other: all of them, each by its full name.
    """
    tree = deepcopy(tree)
    problems = {**(problems or {}), **_take_out_bools(tree)}
    while True:
        try:
            recipe = _ADAPTER.validate_python(tree)
        except ValidationError as error:
            found = error.errors()
            if found[0]["loc"]:  # bad fields: take them out, and look at the rules between the others
                for each in found:
                    key, message = _explain(each)
                    problems[key] = f"{problems[key]}, or{message.removeprefix(key)}" if key in problems else message
                    _take_out(tree, each["loc"][:2])
                continue
            broken = found[0]["msg"].removeprefix("Value error, ").splitlines()
            unsure = {key.partition("[")[0] for key in problems}
            problems |= {line: line for line in broken if not unsure & set(re.findall(r"[a-z]+\.[a-z_]+", line))}
        else:
            if not problems:
                return recipe
        lines = list(problems.values())
        raise UserError(
            f"invalid {origin}:" + (f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  {x}" for x in lines))
        )


def _take_out_bools(tree: dict[str, Any]) -> dict[str, str]:
    """Take true and false out where a number or a text belongs, which pydantic would read as 1 and 0; say where."""
    problems = {}
    for key, value in _flat(tree).items():
        if isinstance(value, bool) and not isinstance(_defaults().get(key, True), bool):
            problems[key] = f"{key} must not be {str(value).lower()}"
            _take_out(tree, key.split("."))
    return problems


def _take_out(tree: dict[str, Any], path: Iterable[Any]) -> None:
    *section, name = path
    (tree.get(section[0], {}) if section else tree).pop(name, None)


def _explain(error: Any) -> tuple[str, str]:
    """Return the full name of the field that pydantic found wrong, as section.field or section.field[i], and why."""
    section_field, index = error["loc"][:2], [part for part in error["loc"][2:] if isinstance(part, int)]
    key = ".".join(map(str, section_field)) + "".join(f"[{number}]" for number in index)
    match error["type"]:
        case "unexpected_keyword_argument":
            names = [f"{key}.{name}" for name in error["input"]] if isinstance(error["input"], dict) else [key]
            close = get_close_matches(names[0], _defaults(), n=1)
            return key, f"unknown field {', '.join(names)}" + (f" (did you mean {close[0]}?)" if close else "")
        case "dataclass_type":
            return key, f"{key} is a section{_example(key)}"
        case "missing":
            return key, f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ").partition(", unable")[0].replace("Input should be", "must be")
    message = (
        message.replace("a valid tuple", "a list in [brackets]")
        .replace("a valid integer", "an integer")
        .replace("a valid", "a")
    )
    return key, f"{key} {message}" + ("" if error["type"] == "value_error" else f", found {error['input']!r}")


def _example(section: str) -> str:
    field = next((name for name in _defaults() if name.startswith(f"{section}.")), "")
    return f"; set one of its fields, such as {field}" if field else ""


def with_defaults_for_bad(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields by full name with the default in place of each value that its field does not take."""
    good = {**_defaults(), **{key: value for key, value in values.items() if key in _defaults()}}
    for section in fields(Recipe):
        own = {key.rpartition(".")[2]: value for key, value in good.items() if key.startswith(f"{section.name}.")}
        try:
            if own:
                type(getattr(_PLAIN, section.name))(**own)
        except ValidationError as error:
            good |= {key: _defaults()[key] for each in error.errors() if (key := f"{section.name}.{each['loc'][0]}")}
    return good


def override(recipe: Recipe, changes: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """Return the recipe with other values of some fields.

    Args:
        recipe: the recipe to start from.
        changes: value by full name, {"train.epochs": 100, ...}.
        origin: what errors call the result.

    Raises:
        UserError: unknown fields, bad values, fields that do not fit each other: all of them, each by its full name.
    """
    tree, problems = asdict(recipe), {}
    for key, value in changes.items():
        section, _, field = key.rpartition(".")
        branch = tree.setdefault(section, {}) if section else tree
        if isinstance(branch.get(field), dict):
            problems[key] = f"{key} is a section{_example(key)}"
        else:
            branch[field] = value
    return build(tree, origin, problems)


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Return the fields that `--set section.field=value` set, by full name.

    A value is what TOML reads in it, or else plain text; a field that holds text takes it as it stands.

    Raises:
        UserError: no `=` in a setting.
    """
    found = {}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not key:
            raise UserError(f"--set {setting} has no value", expected="--set section.field=value")
        value = _value(text)
        found[key] = value if isinstance(value, str) or not isinstance(_defaults().get(key), str) else text
    return found


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
    return _flat({field.name: getattr(recipe, field.name) for field in fields(recipe)})


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if is_dataclass(value):
            value = {field.name: getattr(value, field.name) for field in fields(value)}
        flat |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return flat


@lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    return flatten(_PLAIN)


def differences(one: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two recipes differ, with both values."""
    left, right = flatten(one), flatten(other)
    return {key: (left[key], right[key]) for key in left if left[key] != right[key]}


def check_arch(name: str) -> Arch:
    """Return `name`.

    Raises:
        UserError: it is not the name of an architecture.
    """
    if name not in get_args(Arch):
        close = get_close_matches(name, get_args(Arch), n=1)
        raise UserError(
            f"unknown architecture {name}" + (f" (did you mean {close[0]}?)" if close else ""),
            expected=f"one of: {', '.join(get_args(Arch))}",
        )
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
    cnn = "resnet20" if kind == "demo" else "resnet18"
    family = "deit_ti" if arch.startswith(("deit_", "vit_")) else cnn
    recipe = load(exact if exact in names() else f"{family}_{kind}")
    return override(recipe, {"model.arch": arch})
