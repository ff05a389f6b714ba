"""From a batch on the device to a trained, evaluated DeiT. Built on `pipelines`.

What other programs may use is in `__all__`; `deitfast/docs/library.md` shows how. Each name is imported when it is
first used, so that `import deitfast` and `deitfast --help` cost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from deitfast.environment import __version__

if TYPE_CHECKING:
    from deitfast.config.recipe import Recipe
    from deitfast.config.recipe import load as load_recipe
    from deitfast.models.vit import build_model, joint
    from deitfast.weights.load import TrainedModel, load_model

__all__ = [
    "Recipe", "TrainedModel", "__version__", "build_model", "joint", "load_model", "load_recipe",
]  # fmt: skip
_HOMES = {
    "Recipe": "config.recipe", "TrainedModel": "weights.load",
    "build_model": "models.vit", "joint": "models.vit", "load_model": "weights.load",
    "load_recipe": "config.recipe:load",
}  # fmt: skip
"""Module of each public name, and the name it has there if it is another."""


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'deitfast' has no attribute {name!r}")
    module, _, own = _HOMES[name].partition(":")
    return getattr(import_module(f"deitfast.{module}"), own or name)


def __dir__() -> list[str]:
    return __all__
