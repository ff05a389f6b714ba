"""torchvision's published classifiers."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deitfast.models.class_names import IMAGENET
from deitfast.weights.read import read_state, weights_file
from deitfast.weights.zoo_model import OneHead, ZooModel, count_classes
from pipelines.errors import DeitfastError, UserError

log = logging.getLogger(__name__)
OWN_SCALE = ("googlenet", "inception_v3")
"""Networks whose published weights expect another scale than torchvision's transforms give, and change it inside."""


def is_torchvision_model(name: str) -> bool:
    """Whether torchvision has published a classifier of this name."""
    import torchvision.models

    return name in torchvision.models.list_models(module=torchvision.models)


def torchvision_weights(name: str) -> Any:
    """Return torchvision's description of a network's best weights: where they are, how images are fed to it."""
    from torchvision.models import get_model_weights

    return get_model_weights(name).DEFAULT  # pyright: ignore[reportAttributeAccessIssue]


def load_torchvision(name: str, file: Path | None) -> ZooModel:
    """Return network `name`; see `load_zoo_model`.

    Raises:
        UserError: the weights are another network's.
        DeitfastError: they cannot be fetched.
    """
    weights, sidecar = torchvision_weights(name), None
    network = _build(name, IMAGENET)
    if file:
        file = weights_file(file)
        state, sidecar = read_state(file, network.state_dict())
    else:
        state = _fetched(name, weights)
    network = _build(name, count := count_classes(state, network), state, _is_published(file, weights))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{file or name} does not hold a {name}", found=str(error).splitlines()[-1].strip()) from None
    fed, told = weights.transforms(), dict(sidecar.input) if sidecar else {}
    classes = sidecar.named(count, Path(file or name)).classes if sidecar else ()
    if not classes and count == IMAGENET:
        classes = tuple(weights.meta["categories"])
    model = OneHead(network).eval().requires_grad_(False)
    size, mean, std = told.get("size", fed.crop_size[0]), told.get("mean", fed.mean), told.get("std", fed.std)
    return ZooModel(name, model, count, classes, size, tuple(mean), tuple(std))


def _build(name: str, classes: int, state: dict[str, Tensor] | None = None, published: bool = False) -> nn.Module:
    from torchvision.models import get_model

    more: dict[str, Any] = {}
    if name in OWN_SCALE:
        auxiliary = state is None or any(key.lower().startswith("aux") for key in state)
        more = {"aux_logits": auxiliary, "transform_input": published, "init_weights": False}
    return get_model(name, weights=None, num_classes=classes, **more)


def _is_published(file: Path | None, weights: Any) -> bool:
    """Whether a file is torchvision's own, whose name in the zoo ends in the first digits of its SHA-256."""
    if file is None:
        return True
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return digest.startswith(Path(weights.url).stem.rpartition("-")[2])


def _fetched(name: str, weights: Any) -> dict[str, Tensor]:
    """Return torchvision's weights of a network, from its cache or fetched."""
    log.info("%s: torchvision's %s, %s", name, weights.name, weights.url)
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise DeitfastError(
            f"the weights of {name} cannot be fetched",
            expected=f"{weights.url}, or in torchvision's cache, {torch.hub.get_dir()}/checkpoints",
            found=str(error),
            remedy="fetch the file where there is a network and give it with --teacher-weights FILE",
        ) from error
