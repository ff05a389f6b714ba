"""A trained model, read back from its run's folder or from a file of weights: to evaluate, to teach, to export."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deitfast.config import recipe as recipes
from deitfast.config.choices import Arch
from deitfast.config.recipe import Recipe
from deitfast.models.vit import VisionTransformer, build_model
from deitfast.run_folder import RunFolder
from deitfast.weights import checkpoint
from deitfast.weights.adapt import load_weights
from deitfast.weights.read import Weights, read_weights
from pipelines.errors import UserError

PADDED_SIDE = 32
"""Largest input in pixels for which evaluation does not resize, as in the recipe."""
IMAGENET_SIDE = 224
"""Input in pixels of published CNNs, whose weights do not tell it."""


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, with what is needed to use it."""

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]
    """Class names in label order; empty where a file of weights does not say."""
    outputs: int
    """Number of classes."""
    epoch: int
    """Epoch, from 1, in which its weights were saved; 0 for a file of weights."""


def load_run(folder: Path, device: torch.device, *, ema: bool = False) -> TrainedModel:
    """Return the model of a run as its last checkpoint has it.

    Args:
        folder: a run's folder.
        device: where the model goes.
        ema: take the averaged weights.

    Raises:
        UserError: no run or no checkpoint there, or no averaged weights in it.
        DeitfastError: the checkpoint is damaged.
    """
    run = RunFolder(folder)
    recipe, classes = run.recipe(), run.info().classes
    state = checkpoint.load(run.checkpoint, device)
    model = build_model(recipe.model, size=recipe.augment.size, classes=len(classes), distilled=recipe.distilled).to(
        device
    )
    checkpoint.restore_model(model, state, run.checkpoint, ema=ema)
    model.eval().requires_grad_(False)
    return TrainedModel(model, recipe, classes, len(classes), state["epoch"] + 1)


def load_file(
    path: Path, arch: Arch | None, changes: Mapping[str, Any], device: torch.device, *, ema: bool = False
) -> TrainedModel:
    """Return the model that a file of weights holds.

    Size, patches, classes and the distillation token come from the tensors' shapes; normalization and crop from the
    file where it is ours, else from the built-in recipe for such a network and size.

    Args:
        path: what `read_weights` reads.
        arch: the network; None: as its width tells it (transformers only).
        changes: fields of the recipe by full name, the last word on how images are fed to it.
        device: where the model goes.
        ema: take the averaged weights.

    Raises:
        UserError: the file cannot be read, is of another network than `arch`, or a change is one of the network.
    """
    weights = read_weights(path, ema=ema)
    recipe = recipe_of(weights, arch)
    fed = recipes.override(recipe, changes)
    if (fed.model, fed.augment.size) != (recipe.model, recipe.augment.size) and weights.transformer:
        raise UserError(
            "--set changes the network that the file holds", expected="settings of augment, train and loader"
        )
    model = build_model(fed.model, size=fed.augment.size, classes=weights.outputs, distilled=fed.distilled)
    if isinstance(model, VisionTransformer) and "head_dist.weight" not in weights.tensors:
        model.head_dist = None  # a token without a head of its own, as Hugging Face's DeiTForImageClassification has it
    load_weights(model, weights)
    model.to(device).eval().requires_grad_(False)
    return TrainedModel(model, fed, weights.classes, weights.outputs, 0)


def recipe_of(weights: Weights, arch: Arch | None) -> Recipe:
    """Return the built-in recipe for the network that `weights` hold, at its size, patches and tokens.

    Raises:
        UserError: it is not `arch`, or cannot be told from the weights and is not given.
    """
    network = arch or weights.arch
    if network is None:
        raise UserError(f"{weights.path} does not tell which network it is", remedy="name it with --arch")
    told = {f"augment.{name}": value for name, value in weights.input.items()}
    if not weights.transformer:
        recipe = recipes.choose(network, "", weights.input.get("size", IMAGENET_SIDE))
        return recipes.override(recipe, told)
    if weights.arch is None or network.partition("_")[2] != weights.arch.partition("_")[2]:
        width = weights.tensors["pos_embed"].shape[-1]
        raise UserError(f"{weights.path} is no {network}", found=f"{weights.arch or 'a transformer'}, of width {width}")
    fields = {
        "model.patch": weights.patch,
        "model.token": "on" if weights.distilled else "auto",
        "augment.crop": "padded" if weights.size <= PADDED_SIDE else "resized",
        **told,
        "augment.size": weights.size,
    }
    recipe = recipes.choose(network, "", weights.size)
    return recipes.override(recipe, fields)
