"""Every number of the recipes against what was published, written down by hand from the papers and their code."""

from typing import Any

import pytest

from deitfast.config import recipe as recipes
from deitfast.config.recipe import Recipe

DEIT: dict[str, Any] = {
    # table 9 of "Training data-efficient image transformers", column "DeiT-B", and main.py's defaults
    "model.arch": "deit_ti", "model.width": 0, "model.depth": 12, "model.heads": 0, "model.mlp_ratio": 4.0,
    "train.loss": "cross_entropy", "model.patch": 16, "model.drop_path": 0.1, "model.dropout": 0.0,
    "train.epochs": 300, "train.batch": 1024, "train.smoothing": 0.1, "train.ema": 0.99996, "train.accumulate": 1,
    "optim.name": "adamw", "optim.lr": 0.0005, "optim.lr_batch": 512, "optim.weight_decay": 0.05,
    "optim.betas": (0.9, 0.999), "optim.eps": 1e-8, "optim.clip": 0.0, "optim.momentum": 0.9,
    "schedule.shape": "cosine", "schedule.warmup_epochs": 5.0, "schedule.warmup_lr": 0.000001,
    "schedule.min_lr": 0.00001, "schedule.step_epochs": 30.0, "schedule.step_factor": 0.1,
    # --input-size 224, --aa rand-m9-mstd0.5-inc1, --color-jitter 0.3, --reprob 0.25, timm's create_transform
    "augment.size": 224, "augment.crop": "resized", "augment.scale": (0.08, 1.0), "augment.ratio": (3 / 4, 4 / 3),
    "augment.flip": 0.5, "augment.policy": "randaugment", "augment.magnitude": 9.0, "augment.magnitude_std": 0.5,
    "augment.operation_probability": 0.5, "augment.color_jitter": 0.3, "augment.padding": 4,
    "augment.erasing": 0.25, "augment.erasing_area": (0.02, 1 / 3), "augment.erasing_ratio": (0.3, 1 / 0.3),
    # --mixup 0.8 --cutmix 1.0 --mixup-prob 1.0 --mixup-switch-prob 0.5, RASampler's three repeats
    "augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.mix_probability": 1.0, "augment.mix_switch": 0.5,
    "augment.repeats": 3, "augment.mix_group": 64,
    "augment.mean": (0.485, 0.456, 0.406), "augment.std": (0.229, 0.224, 0.225),
    "augment.eval_crop": 0.875, "augment.eval_resize": "shorter", "augment.eval_interpolation": "bicubic",
    # section 4: lambda of both terms 1/2, tau 3, the KL divergence over the batch
    "distill.mode": "none", "distill.alpha": 0.5, "distill.tau": 3.0, "distill.head": "distillation",
    "distill.normalization": "batch", "distill.targets": "exact",
}  # fmt: skip
OURS = {
    "optim.layer_decay": 1.0, "train.seed": 0, "train.fraction": 1.0, "train.evaluate_every": 1,
    "train.checkpoint_minutes": 10.0, "augment.seed": 0, "distill.views": 0, "distill.top_k": 10, "loader.workers": 0,
    "loader.prefetch": 2, "loader.step_rate": 28_000,
}  # fmt: skip
"""Numbers that DeiT has nothing to say of."""

PLAIN = {
    "augment.policy": "none", "augment.color_jitter": 0.0, "augment.erasing": 0.0, "augment.mixup": 0.0,
    "augment.cutmix": 0.0, "augment.repeats": 1, "train.ema": 0.0, "schedule.min_lr": 0.0,
}  # fmt: skip
"""Crop and flip alone, a rate that falls to zero."""
SGD_256 = {"optim.name": "sgd", "optim.lr": 0.1, "optim.lr_batch": 256, "optim.weight_decay": 0.0001}
"""He et al., 2016: SGD, a rate of .1 for 256 images."""
SMALL = {"augment.size": 32, "augment.crop": "padded", "augment.repeats": 1}
CIFAR10 = {"augment.mean": (0.4914, 0.4822, 0.4465), "augment.std": (0.247, 0.2435, 0.2616)}
CIFAR100 = {"augment.mean": (0.5071, 0.4865, 0.4409), "augment.std": (0.2673, 0.2564, 0.2762)}
DEIT_CIFAR = SMALL | {
    "model.patch": 4, "optim.lr": 0.001, "train.epochs": 250, "train.batch": 512, "train.ema": 0.9998,
}  # fmt: skip
RESNET_CIFAR = (
    PLAIN | SMALL | SGD_256 | {"model.arch": "resnet18", "optim.lr_batch": 128, "optim.weight_decay": 0.0005}
    | {"schedule.warmup_epochs": 1.0, "schedule.warmup_lr": 0.01, "train.epochs": 30, "train.batch": 128}
)  # fmt: skip
RESNET_IMAGENET = PLAIN | SGD_256 | {"schedule.warmup_lr": 0.01, "train.epochs": 90}
SHIPPED: dict[str, dict[str, Any]] = {
    "deit_ti_imagenet": {},
    "deit_s_imagenet": {"model.arch": "deit_s"},
    "deit_b_imagenet": {"model.arch": "deit_b"},
    "vit_ti_imagenet": {"model.arch": "vit_ti"},
    "vit_s_imagenet": {"model.arch": "vit_s"},
    "vit_b_imagenet": {"model.arch": "vit_b"},
    # the reference's command: --input-size 384 --batch-size 32 (x 16 = 512) --lr 5e-6 --min-lr 5e-6 --weight-decay 1e-8
    # --epochs 30; its main.py scales the rate from 512
    "deit_b_384_finetune": {
        "model.arch": "deit_b", "augment.size": 384, "optim.lr": 0.000005, "optim.weight_decay": 0.00000001,
        "schedule.shape": "constant", "train.epochs": 30, "train.batch": 512,
    },
    "deit_ti_cifar10": DEIT_CIFAR | CIFAR10,
    "deit_ti_cifar100": DEIT_CIFAR | CIFAR100,
    "vit_ti_cifar10": DEIT_CIFAR | CIFAR10 | {"model.arch": "vit_ti"},
    "resnet18_cifar10": RESNET_CIFAR | CIFAR10,
    "resnet18_cifar100": RESNET_CIFAR | CIFAR100,
    "resnet18_imagenet": RESNET_IMAGENET | {"model.arch": "resnet18"},
    "resnet50_imagenet": RESNET_IMAGENET | {"model.arch": "resnet50"},
    # torchvision's references/classification for RegNets: --lr 0.8 for 1024, --wd 5e-5, 100 epochs, linear warm-up of
    # five epochs from a tenth of the rate, cosine
    "regnet_y_16gf_imagenet": RESNET_IMAGENET | {
        "model.arch": "regnet_y_16gf", "optim.lr": 0.2, "optim.weight_decay": 0.00005, "schedule.warmup_lr": 0.08,
        "train.epochs": 100, "train.smoothing": 0.0,
    },
}  # fmt: skip
"""Fields in which a shipped recipe departs from DeiT's."""


def numbers(values: dict[str, Any]) -> set[str]:
    """Names of the fields that hold numbers."""
    kinds = (int, float, tuple)
    return {key for key, value in values.items() if isinstance(value, kinds) and type(value) is not bool and value}


def test_every_default_is_the_papers() -> None:
    found = recipes.flatten(Recipe())
    table = DEIT | OURS
    assert {key: found[key] for key in table} == table
    assert numbers(found) <= set(table), "a new number: write down what was published, or that it is ours"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_departs_as_its_source_does(name: str) -> None:
    changed = recipes.differences(Recipe(), recipes.load(name))
    assert {key: value for key, (_, value) in changed.items() if key != "name"} == SHIPPED[name]


def test_no_shipped_recipe_is_left_out() -> None:
    assert {name for name in recipes.names() if not name.endswith("_demo")} == set(SHIPPED)
