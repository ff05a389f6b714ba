"""Model zoos: every classifier of torchvision, and of timm where that is installed, by name, to be a teacher."""

from pathlib import Path

from deitfast.weights.zoo_model import TIMM, ZooModel


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
