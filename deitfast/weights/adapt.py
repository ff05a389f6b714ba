"""Weights into a network: as they are, or adapted to another size and other classes."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deitfast.config.recipe import ModelSpec
from deitfast.models.class_names import ClassMatch, match_classes
from deitfast.weights.read import Weights, file_digest, grid_side, read_weights
from deitfast.weights.state_dict import listed
from pipelines.errors import UserError

log = logging.getLogger(__name__)
HEADS = ("head", "head_dist", "fc")
"""Layers whose width is the number of classes."""


@dataclass(frozen=True)
class AdaptReport:
    """What `adapt_pretrained` did."""

    new: tuple[str, ...]
    """Heads that keep their fresh initialization."""
    positions: tuple[int, int]
    """Patches along a side, in the file and in the model; 0, 0 for a CNN."""
    match: ClassMatch | None = None
    """How the kept heads' outputs were matched to the classes; None where there are none."""

    def __str__(self) -> str:
        resized = f"positions {self.positions[0]}^2 -> {self.positions[1]}^2, " if len(set(self.positions)) > 1 else ""
        return resized + (f"new: {', '.join(self.new)}" if self.new else f"heads kept, {self.match}")


def init_from_pretrained(model: nn.Module, spec: ModelSpec, classes: tuple[str, ...]) -> dict[str, str]:
    """Give a new model the weights that its recipe starts from, if any.

    Returns:
        What `run.json` records: the file, its blake2b, whose names it has, what became of heads and positions.

    Raises:
        UserError: the weights cannot be read, or do not fit the network.
    """
    source = spec.weights or spec.finetune
    if not source:
        return {}
    weights, in_order = read_weights(Path(source), which=spec.start_checkpoint), spec.assume_class_order
    if spec.finetune:
        fitted = str(adapt_pretrained(model, weights, classes, assume_order=in_order))
    else:
        match = match_heads(weights, classes, assume_order=in_order)
        fitted = f"as they are, classes {match}"
        load_weights(model, _with_heads(weights, match))
    log.info("starting from %s (%s weights): %s", source, weights.kind, fitted)
    return {
        "file": str(weights.path),
        "blake2b": file_digest(weights.path),
        "kind": weights.kind,
        "fitted": fitted,
    }


def match_heads(weights: Weights, classes: tuple[str, ...], *, assume_order: bool = False) -> ClassMatch:
    """Match the outputs of weights' heads to a data set's classes, which must be all that they have.

    Raises:
        UserError: they are other classes, or nothing tells which output is which.
    """
    owner = str(weights.path)
    match = match_classes(owner, weights.classes, weights.num_classes, classes, assume_order=assume_order)
    if match.num_outputs != len(classes):
        raise UserError(
            f"{owner} was trained on other classes than this data set has",
            expected=f"{len(classes)} classes",
            found=f"{match.num_outputs}",
            remedy="start from it with --finetune, which draws a new head",
        )
    return match


def _with_heads(weights: Weights, match: ClassMatch) -> Weights:
    """Return the weights with their heads' outputs in the data set's order."""
    if match.is_identity:
        return weights
    names = [f"{head}.{part}" for head in HEADS for part in ("weight", "bias")]
    heads = {name: weights.tensors[name][list(match.index)] for name in names if name in weights.tensors}
    return replace(weights, tensors=weights.tensors | heads)


def load_weights(model: nn.Module, weights: Weights) -> None:
    """Copy weights into a model of the same shape.

    Raises:
        UserError: names or shapes differ; the message says which.
    """
    _require_same(model, weights.tensors, weights, "adapt another size or other classes with --finetune")
    model.load_state_dict(weights.tensors)


def adapt_pretrained(
    model: nn.Module, weights: Weights, classes: tuple[str, ...], *, assume_order: bool = False
) -> AdaptReport:
    """Copy weights into a model of another input size or with other classes.

    Position embeddings are resized to the model's. A head that is there for the same classes is copied, its outputs
    in the order of `classes`; any other keeps the model's own initialization.

    Raises:
        UserError: anything else differs; the message says what.
    """
    try:
        match = match_heads(weights, classes, assume_order=assume_order)
    except UserError:
        match = None
    own, tensors, new = model.state_dict(), dict((_with_heads(weights, match) if match else weights).tensors), []
    for head in HEADS:
        names = [f"{head}.weight", f"{head}.bias"]
        if names[0] not in own:
            continue
        if match is None or any(name not in tensors or tensors[name].shape != own[name].shape for name in names):
            tensors |= {name: own[name] for name in names}
            new.append(head)
    sides = 0, 0
    if "pos_embed" in own and "pos_embed" in tensors and ("dist_token" in own) == weights.distilled:
        prefix = 2 if weights.distilled else 1
        sides = grid_side(tensors["pos_embed"], prefix), grid_side(own["pos_embed"], prefix)
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], prefix, sides[1])
    _require_same(model, tensors, weights, "the network, its patches and its tokens must be the file's")
    model.load_state_dict(tensors)
    return AdaptReport(tuple(new), sides, match)


def resize_positions(positions: Tensor, prefix: int, side: int) -> Tensor:
    """Resize position embeddings [1, prefix + n^2, width] to [1, prefix + side^2, width], float32.

    As the DeiT reference: bicubic between patch centers (align_corners False), without antialiasing; the prefix
    tokens' rows are untouched.
    """
    old = grid_side(positions, prefix)
    if old == side:
        return positions
    grid = positions[:, prefix:].unflatten(1, (old, old)).permute(0, 3, 1, 2).float()
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :prefix].float(), resized.flatten(2).transpose(1, 2)), dim=1)


def _require_same(model: nn.Module, tensors: dict[str, Tensor], weights: Weights, remedy: str) -> None:
    own = model.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - own.keys())
    shaped = [
        f"{name} {_shape(tensors[name])} instead of {_shape(value)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("shapes", shaped))
    if found := "; ".join(f"{what}: {listed(names)}" for what, names in groups if names):
        raise UserError(f"{weights.path} ({weights.kind}) does not fit the network", found=found, remedy=remedy)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
