"""One frozen Recipe: everything that decides what a run learns. Load, override, dump, digest."""

import tomllib
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast, get_args

import tomli_w
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from pipelines.errors import Mistake
from pipelines.spec import STRICT, AugmentSpec, Kernels, LoaderSpec, digest

Arch = Literal[
    "deit_ti", "deit_s", "deit_b", "vit_ti", "vit_s", "vit_b",
    "resnet18", "resnet50", "regnet_y_4gf", "regnet_y_8gf", "regnet_y_16gf",
]  # fmt: skip


@dataclass(frozen=True, config=STRICT)
class ModelSpec:
    """The network; its input size is `augment.size`."""

    arch: Arch = "deit_ti"
    """deit_* may carry a distillation token, vit_* have a class token only; the rest are torchvision's CNNs."""
    token: Literal["auto", "on", "off"] = "auto"
    """Distillation token beside the class token; auto: on where `distill` uses one (deit_* only)."""
    patch: int = Field(default=16, ge=1)
    """Side of a patch in pixels (transformers only)."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth of the last block, rising linearly from 0 at the first (transformers only)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after the positions, the attention's projection and both layers of the MLP (transformers only)."""
    weights: str = ""
    """Run or file whose weights a run starts from, of the same shape and classes; "": drawn from `train.seed`."""
    finetune: str = ""
    """Run or file to fine-tune: positions are resized to `augment.size`, heads of other classes drawn anew."""


@dataclass(frozen=True, config=STRICT)
class DistillSpec:
    """What the teacher has to say, and which head listens."""

    mode: Literal["none", "soft", "hard"] = "none"
    """hard: cross-entropy with the teacher's argmax; soft: KL divergence at temperature tau."""
    teacher: str = ""
    """Folder of the teacher's run, a file of weights, or a network that torchvision has published."""
    teacher_weights: str = ""
    """File with the weights of torchvision's network; "": its published ones, fetched where they are not there."""
    cache: str = "auto"
    """Folder of a teacher cache: what is in it is not asked again, and what is not is added. auto: for hard targets one
    in caches/, named by all that they depend on; none: the teacher answers in the loop, and nothing is kept."""
    targets: Literal["exact", "reused", "per_image"] = "exact"
    """exact: the teacher sees each view (DeiT); reused: `views` views, again and again; per_image: the teacher sees
    each image once, whole and unmixed, and its answers are mixed like labels (not DeiT)."""
    views: int = Field(default=0, ge=0)
    """Views of each image that `targets = "reused"` goes round; a multiple of `augment.repeats`."""
    top_k: int = Field(default=10, ge=1)
    """Logits that a cache keeps of each soft target (at most all classes); of the others it knows their total."""
    top_dtype: Literal["float16", "float32"] = "float16"
    """How it keeps them."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Weight of the distillation term; the base loss has 1 - alpha."""
    tau: float = Field(default=3.0, gt=0)
    """Temperature of soft distillation."""
    head: Literal["distillation", "class"] = "distillation"
    """Head that the distillation term is applied to; class: the class token learns from label and teacher alike."""
    normalisation: Literal["batch", "batch_classes"] = "batch"
    """Divisor of the soft term: batch (the paper's formula) or batch x classes (the reference code)."""


@dataclass(frozen=True, config=STRICT)
class OptimSpec:
    """The update."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw (fused where the device has it) or sgd with Nesterov momentum."""
    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate for a global batch of `lr_batch`; scaled linearly to the run's own."""
    lr_batch: int = Field(default=512, ge=0)
    """Global batch that `lr` is meant for; 0: `lr` is not scaled."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Not applied to 1-D parameters, biases, positions and tokens."""
    decay_dist_token: bool = False
    """Decay the distillation token as the reference does; today's timm does not."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD's momentum."""
    clip: float = Field(default=0.0, ge=0)
    """Largest norm of the gradient; 0: no clipping."""


@dataclass(frozen=True, config=STRICT)
class ScheduleSpec:
    """Learning rate against time: linear warm-up, then half a cosine over all epochs, or the peak to the end."""

    shape: Literal["cosine", "constant"] = "cosine"
    """What follows warm-up: half a cosine from the peak to `min_lr`, or the peak (the paper's fine-tuning)."""
    warmup_epochs: float = Field(default=5.0, ge=0)
    """Epochs of warm-up, inside the run's epochs."""
    warmup_lr: float = Field(default=1e-6, ge=0)
    """Learning rate at the first step; not scaled by the batch."""
    min_lr: float = Field(default=1e-5, ge=0)
    """Learning rate at the end of a cosine; not scaled by the batch."""
    per: Literal["step", "epoch"] = "step"
    """step: a new rate every step; epoch: the reference's, which runs epochs 0 and 1 at warmup_lr."""


@dataclass(frozen=True, config=STRICT)
class TrainSpec:
    """How long, how much at once, and in which precision."""

    epochs: int = Field(default=300, ge=1)
    """Epochs of the run."""
    batch: int = Field(default=1024, ge=1)
    """Global batch in views, over all ranks and accumulation steps."""
    accumulate: int = Field(default=1, ge=1)
    """Parts that each rank's batch is cut into; gradients are summed over them."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing of the base loss."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initialisation, stochastic depth and dropout."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Autocast dtype; auto: bf16 where the device computes in it, else fp16 on CUDA, else off."""
    compile: Literal["auto", "on", "graphs", "off"] = "auto"
    """torch.compile; graphs: with CUDA graphs, for steps that end sooner than their kernels can be started; auto: on
    CUDA only, with graphs up to 64 px on one GPU."""
    kernels: Kernels = "auto"
    """Augmentation in Triton's kernels or in batched torch, to the same bits; auto: the kernels on CUDA."""
    ema: float = Field(default=0.99996, ge=0, lt=1)
    """Decay of the averaged weights, evaluated beside the plain ones; 0: none."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the training images used, the same share of every class."""
    evaluate_every: int = Field(default=1, ge=1)
    """Epochs between evaluations; the last epoch is always evaluated."""
    checkpoint_minutes: float = Field(default=10.0, ge=0)
    """Minutes between checkpoints inside an epoch; every epoch ends with one. 0: a checkpoint every step."""


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
_BUILT_IN = resources.files("deitfast") / "recipes"


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
        Mistake: no such recipe or file, unreadable TOML, an unknown key or a bad value (all of them named).
    """
    tree, origin = _tree(name)
    if base := tree.pop("extends", None):
        if base not in names() or "extends" in (below := _tree(base)[0]):
            plain = [each for each in names() if "extends" not in _tree(each)[0]]
            raise Mistake(f"{origin} cannot extend {base}", expected=f"extends to be one of: {', '.join(plain)}")
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
        raise Mistake(f"there is no recipe {name}", expected=f"a TOML file or one of: {', '.join(names())}")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")), origin
    except ValueError as error:  # TOML's and UTF-8's errors
        raise Mistake(f"{origin} is not TOML", found=str(error)) from None


def build(tree: dict[str, Any], origin: str) -> Recipe:
    """Return the recipe of a tree of plain values; `origin` names it in errors.

    Raises:
        Mistake: an unknown key or a bad value, each with its full name.
    """
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise Mistake(f"{origin} does not hold together:\n" + "\n".join(map(_explain, error.errors()))) from None


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
        Mistake: no `=` in a setting, an unknown key, a bad value, or fields that do not fit each other.
    """
    tree = asdict(recipe)
    for setting in settings:
        key, equals, value = setting.partition("=")
        path = key.strip().split(".")
        if not equals:
            raise Mistake(f"--set {setting} has no value", expected="--set section.field=value")
        branch = tree
        for part in path[:-1]:
            branch = branch.get(part)
            if not isinstance(branch, dict):
                raise Mistake(f"--set {setting}: unknown key {key}{_did_you_mean(key)}")
        if isinstance(branch.get(path[-1]), dict):
            raise Mistake(f"--set {setting}: {key} is a section", expected=f"one of its fields, as {key}.field=value")
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


def known_arch(name: str) -> Arch:
    """Return `name` if a network is called so.

    Raises:
        Mistake: none is.
    """
    if name not in get_args(Arch):
        raise Mistake(f"there is no network called {name}", expected=f"one of: {', '.join(get_args(Arch))}")
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
