"""torchvision's published classifiers, as teachers."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deitfast.models.class_names import IMAGENET
from deitfast.weights.read import read_state
from pipelines.errors import DeitfastError, UserError

log = logging.getLogger("deitfast")


def is_torchvision_model(name: str) -> bool:
    """Whether torchvision has published a classifier of this name."""
    return name in _names()


def torchvision_weights(name: str) -> Any:
    """Return torchvision's description of the best weights of a network: where they are, how images are fed to it."""
    from torchvision.models import get_model_weights

    return get_model_weights(name).DEFAULT  # pyright: ignore[reportAttributeAccessIssue]


def torchvision_state(name: str, file: Path | None) -> dict[str, Tensor]:
    """Return the weights of a network: those in `file`, or torchvision's, from its cache or fetched.

    Raises:
        UserError: the file cannot be read as weights.
        DeitfastError: the weights cannot be fetched.
    """
    if file:
        return read_state(file)
    weights = torchvision_weights(name)
    log.info("teacher %s: torchvision's %s, %s", name, weights.name, weights.url)
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise DeitfastError(
            f"the weights of teacher {name} cannot be fetched",
            expected=f"{weights.url}, or in torchvision's cache, {torch.hub.get_dir()}/checkpoints",
            found=str(error),
            remedy="fetch the file where there is a network and give it with --teacher-weights FILE",
        ) from error


def load_torchvision(name: str, state: dict[str, Tensor], owner: str) -> tuple[nn.Module, int]:
    """Return network `name` with the weights of `state`, giving (logits [B, outputs],), and its number of outputs.

    Raises:
        UserError: the weights are another network's.
    """
    from torchvision.models import get_model

    network = get_model(name, weights=None, num_classes=IMAGENET)
    outputs = _outputs(state, network)
    if outputs != IMAGENET:
        network = get_model(name, weights=None, num_classes=outputs)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{owner} holds no {name}", found=str(error).splitlines()[-1].strip()) from None
    return OneHead(network), outputs


class OneHead(nn.Module):
    """A network of one output, under the contract of ours: a tuple of heads."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map pixels [B, 3, S, S] to (logits [B, classes],)."""
        return (self.network(pixels),)


def _names() -> set[str]:
    import torchvision.models

    # these two change their input's scale themselves, where torchvision and not a file gives the weights
    return set(torchvision.models.list_models(module=torchvision.models)) - {"googlenet", "inception_v3"}


def _outputs(state: dict[str, Tensor], network: nn.Module) -> int:
    """Return the classes of weights for `network`, which has ImageNet's: what differs in shape is the classifier."""
    own = network.state_dict()
    differing = [key for key in state if key in own and state[key].shape != own[key].shape and state[key].ndim > 0]
    return len(state[differing[0]]) if differing else IMAGENET
