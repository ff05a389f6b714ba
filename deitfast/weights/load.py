"""A trained model, read back from its run's folder or from a file of weights: to evaluate, to teach, to export."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deitfast.config import recipe as recipes
from deitfast.config.choices import Arch, WhichCheckpoint
from deitfast.config.recipe import ModelSpec, Recipe
from deitfast.models.class_names import IMAGENET
from deitfast.models.vit import VisionTransformer, build_model
from deitfast.run_folder import RunFolder
from deitfast.weights.adapt import load_weights
from deitfast.weights.read import Weights, read_weights
from deitfast.weights.sidecar import Sidecar
from pipelines.errors import UserError
from pipelines.spec import AugmentSpec

PADDED_SIDE = 32
"""Largest input in pixels for which evaluation does not resize, as in the recipe."""
IMAGENET_SIDE = 224
"""Input in pixels of published CNNs, whose weights do not tell it."""


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, with what is needed to use it."""

    model: nn.Module
    recipe: Recipe
    """Its `augment` says how images are fed to the model."""
    classes: tuple[str, ...]
    """Class names in the order of the outputs; empty where nothing tells them."""
    num_classes: int
    """Outputs of each head."""
    epoch: int = 0
    """Epoch, from 1, in which its weights were saved; 0 for a file of weights."""
    weights: str = "weights"
    """Which weights of a run these are, human-readable."""
    source: Path = Path()
    """The run's folder, or the file or folder of weights."""
    sidecar: Sidecar = field(default_factory=Sidecar)
    """Where class names and preprocessing come from."""


def load_model(
    path: Path,
    device: torch.device,
    *,
    arch: Arch | None = None,
    changes: Mapping[str, Any] | None = None,
    ema: bool = False,
    which: WhichCheckpoint = "auto",
) -> TrainedModel:
    """Return the model of a run, or the one that a file of weights holds.

    A run's recipe says everything. Of a file, size, patches, classes and the distillation token come from the tensors'
    shapes; normalization and crop from what lies next to them, else from the built-in recipe for such a network.

    Args:
        path: what `read_weights` reads.
        device: where the model goes.
        arch: the network; None: as its shapes tell it.
        changes: fields of the recipe by full name, the last word on how images are fed to it (not for runs).
        ema: take the averaged weights.
        which: of a run, the best or the last checkpoint; see `read_weights`.

    Raises:
        UserError: nothing there to read, a file of another network than `arch`, one without a classifier, or a
            change of the network.
        DeitfastError: a run's checkpoint is damaged.
    """
    weights = read_weights(path, ema=ema, which=which)
    run = RunFolder(path)
    recipe = run.recipe() if run.exists() else recipe_of(weights, arch)
    if not weights.num_classes:
        raise UserError(
            f"{weights.path} has no classifier: {weights.classifier} is missing",
            expected="weights with a head",
            remedy="train one on it first: deitfast train --finetune",
        )
    fed = recipes.override(recipe, changes or {})
    if (fed.model, fed.augment.size) != (recipe.model, recipe.augment.size) and weights.transformer:
        raise UserError(
            "--set changes the network that the file holds", expected="settings of augment, train and loader"
        )
    model = build_model(fed.model, size=fed.augment.size, classes=weights.num_classes, distilled=fed.distilled)
    if isinstance(model, VisionTransformer) and "head_dist.weight" not in weights.tensors:
        model.head_dist = None  # a token without a head of its own, as Hugging Face's DeiTForImageClassification has it
    load_weights(model, weights)
    set_norm_eps(model, weights)
    model.to(device).eval().requires_grad_(False)
    return TrainedModel(
        model, fed, weights.classes, weights.num_classes, weights.epoch, weights.described, path, weights.sidecar
    )


def set_norm_eps(model: nn.Module, weights: Weights) -> None:
    """Give the LayerNorms the epsilon that the weights' configuration tells, where it tells one."""
    if weights.sidecar.norm_eps is None:
        return
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = weights.sidecar.norm_eps


def describe_input(trained: TrainedModel) -> str:
    """Return one line: how images are fed to a model, and where that and the class names come from."""
    augment, side = trained.recipe.augment, trained.sidecar
    default = f"as recipe {trained.recipe.name} says (nothing else does)"
    origin = f"as {side.input_from} says" if side.input else default
    if side.input and not {"mean", "std"} <= side.input.keys():
        origin += f", mean and std {default}"
    assumed = "not told, ImageNet's assumed" if trained.num_classes == IMAGENET else "not told"
    names = f"from {side.classes_from}" if side.classes else assumed
    return f"images {origin}: {describe_augment(augment)}; class names {names}"


def describe_augment(augment: AugmentSpec) -> str:
    """Return size, normalization and crop of evaluation in words."""
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (augment.mean, augment.std))
    crop = "whole" if augment.crop == "padded" or augment.eval_crop == 1 else f"center {augment.eval_crop:.4g}"
    shape = ", squashed" if augment.eval_resize == "squash" else ""
    return f"{augment.size} px, mean {mean}, std {std}, {crop}{shape}, {augment.eval_interpolation}"


def recipe_of(weights: Weights, arch: Arch | None) -> Recipe:
    """Return the built-in recipe for the network that `weights` hold, at its size, patches, tokens and preprocessing.

    Raises:
        UserError: it is not `arch`, or cannot be told from the weights and is not given.
    """
    network = arch or weights.arch
    if network is None:
        raise UserError(f"{weights.path} does not tell which network it is", remedy="name it with --arch")
    told = dict(weights.sidecar.input)
    if not weights.transformer:
        size = told.get("size", _cnn_side(weights))
        fields = {"augment.size": size, **_input_settings(told, size)}
        recipe = recipes.choose(network, "", size)
        return recipes.override(recipe, fields)
    shape, standard = weights.shape, ModelSpec(arch=network).shape if network.startswith(("deit_", "vit_")) else None
    if standard is None or network.partition("_")[2] != str(weights.arch).partition("_")[2]:
        raise UserError(f"{weights.path} is not a {network}", found=f"{weights.arch}, width {shape.width}")
    own = {
        "model.width": shape.width,
        "model.depth": shape.depth,
        "model.heads": shape.heads,
        "model.mlp_ratio": shape.hidden / shape.width,
    }
    fields = {
        **(own if shape != standard else {}),
        "model.patch": weights.patch,
        "model.token": "on" if weights.distilled else "auto",
        **_input_settings(told, weights.size),
        "augment.size": weights.size,
    }
    recipe = recipes.choose(network, "", weights.size)
    return recipes.override(recipe, fields)


def normalization_of(weights: Weights) -> dict[str, Any]:
    """Return the recipe's fields for the normalization that is told of weights; empty where none is."""
    told = weights.sidecar.input
    return {f"augment.{name}": told[name] for name in ("mean", "std") if "mean" in told and "std" in told}


def _input_settings(told: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return the recipe's fields for what is told of a network's input; inputs of 32 px and less are not cropped."""
    padded = size <= PADDED_SIDE and told.get("eval_crop", 1.0) == 1
    crop = {"augment.crop": "padded" if padded else "resized"}
    return crop | {f"augment.{name}": value for name, value in told.items()}


def _cnn_side(weights: Weights) -> int:
    """Return the input of a CNN whose file does not tell it: small where its stem keeps the resolution."""
    stem = weights.tensors.get("conv1.weight")
    return PADDED_SIDE if stem is not None and stem.shape[-1] == 3 else IMAGENET_SIDE
