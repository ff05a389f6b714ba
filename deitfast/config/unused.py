"""Settings without effect: what a recipe sets and, as its other fields stand, nothing reads."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from deitfast.config.recipe import Recipe, flatten
from deitfast.config.sections import TRANSFORMER_FIELDS

Reads = Callable[[Recipe], object]

UNREAD: tuple[tuple[tuple[str, ...], Reads, str], ...] = (
    (("augment.color_jitter",), lambda r: r.augment.policy == "none", 'it is used with augment.policy = "none" only'),
    (
        ("augment.magnitude", "augment.magnitude_std", "augment.operation_probability"),
        lambda r: r.augment.policy == "randaugment",
        'it is used with augment.policy = "randaugment" only',
    ),
    (("augment.erasing_area", "augment.erasing_ratio"), lambda r: r.augment.erasing, "augment.erasing is 0"),
    (
        ("augment.mixup_off_epoch",),
        lambda r: r.mixes and r.augment.mixup_off_epoch < r.train.epochs,
        "nothing is mixed, or the run ends before it",
    ),
    (("train.bce_threshold",), lambda r: r.train.loss == "bce", 'it is used with train.loss = "bce" only'),
    (
        ("augment.mix_group", "augment.mix_probability"),
        lambda r: r.mixes,
        "nothing is mixed: augment.mixup and augment.cutmix are 0",
    ),
    (
        ("augment.mix_switch",),
        lambda r: r.augment.mixup and r.augment.cutmix,
        "it chooses between MixUp and CutMix, and they are not both on",
    ),
    (("augment.padding",), lambda r: r.augment.crop == "padded", 'it is used with augment.crop = "padded" only'),
    (
        ("augment.scale", "augment.ratio", "augment.eval_crop"),
        lambda r: r.augment.crop == "resized",
        'it is used with augment.crop = "resized" only',
    ),
    (
        ("optim.betas", "optim.eps"),
        lambda r: r.optim.name != "sgd",
        "SGD has none",
    ),
    (("optim.momentum",), lambda r: r.optim.name == "sgd", "it is SGD's, and optim.name is another"),
    (("optim.decay_dist_token",), lambda r: r.distilled, "the model has no distillation token"),
    (("schedule.min_lr",), lambda r: r.schedule.shape == "cosine", "it is the end of a cosine"),
    (
        ("schedule.step_epochs", "schedule.step_factor"),
        lambda r: r.schedule.shape == "step",
        'it is used with schedule.shape = "step" only',
    ),
    (("schedule.warmup_lr",), lambda r: r.schedule.warmup_epochs, "there is no warm-up"),
    (
        tuple(f"model.{name}" for name in TRANSFORMER_FIELDS),
        lambda r: r.transformer,
        "the network is a CNN",
    ),
    (
        ("distill.alpha", "distill.head", "distill.teacher", "distill.teacher_weights", "distill.teacher_checkpoint",
         "distill.assume_class_order", "distill.cache", "distill.targets", "distill.views"),
        lambda r: r.distill.mode != "none",
        'distill.mode is "none"',
    ),
    (
        ("distill.tau", "distill.normalization", "distill.top_k", "distill.top_dtype"),
        lambda r: r.distill.mode == "soft",
        "it is used in soft distillation only",
    ),
)  # fmt: skip
"""Fields, whether a recipe reads them, and why it does not."""


def unused(recipe: Recipe, typed: Collection[str]) -> list[str]:
    """Return a line on each typed field that has no effect on what a run of this recipe does."""
    return [
        f"{field} has no effect: {reason}"
        for names, reads, reason in UNREAD
        for field in names
        if field in typed and not reads(recipe)
    ]


def unchanged(source: Recipe, typed: Mapping[str, Any]) -> list[str]:
    """Return a line on each typed field that has its value in the recipe already."""
    values = flatten(source)
    return [
        f"{field} = {value} changes nothing: recipe {source.name} has it already"
        for field, value in typed.items()
        if field in values and values[field] == value
    ]
