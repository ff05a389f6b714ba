"""Model zoos: every classifier of torchvision, and of timm where that is installed, by name, to be a teacher."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from deitfast.models.class_names import IMAGENET


@dataclass(frozen=True)
class ZooModel:
    """A published network with weights, and how images are fed to it."""

    name: str
    """Its name, for timm's with timm/ before it."""
    model: nn.Module
    """In evaluation mode, on the CPU; gives (logits [B, classes],)."""
    num_classes: int
    classes: tuple[str, ...]
    """Class names in the order of the outputs; empty where nothing tells them."""
    size: int
    """Side of the input in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


TIMM = "timm/"
"""What stands before the names of timm's networks."""


def is_zoo_model(name: str) -> bool:
    """Whether a name means a network of a model zoo: one of torchvision's, or timm/NAME."""
    from deitfast.weights.torchvision import is_torchvision_model

    return name.startswith(TIMM) or is_torchvision_model(name)


def load_zoo_model(name: str, file: Path | None) -> ZooModel:
    """Return a network with the weights in `file`, or (None) with its published ones, from the zoo's cache or fetched.

    Raises:
        UserError: there is no such network, timm is not installed, or the file holds another network.
        DeitfastError: the weights cannot be fetched.
    """
    if name.startswith(TIMM):
        from deitfast.weights.timm import load_timm

        return load_timm(name, file)
    from deitfast.weights.torchvision import load_torchvision

    return load_torchvision(name, file)


class OneHead(nn.Module):
    """A network with one output, under the contract of deitfast's models: a tuple of heads."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map pixels [B, 3, S, S] to (logits [B, classes],)."""
        return (self.network(pixels),)


def count_classes(state: dict[str, Tensor], network: nn.Module) -> int:
    """Return the classes of weights for `network`, which has ImageNet's: what differs in shape is the classifier."""
    own = network.state_dict()
    differing = [key for key in state if key in own and state[key].shape != own[key].shape and state[key].ndim > 0]
    return len(state[differing[0]]) if differing else IMAGENET
