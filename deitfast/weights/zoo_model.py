"""What a model zoo's network is to deitfast: a model with one head, its classes, and how images are fed to it."""

from dataclasses import dataclass

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
