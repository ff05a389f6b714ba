"""Names of what comes with deitfast, found without heavy imports."""

from importlib import resources

RECIPES = resources.files("deitfast") / "config" / "recipes"
"""Folder of the built-in recipes, NAME.toml."""


def names() -> list[str]:
    """Return the names of the built-in recipes."""
    return sorted(path.name.removesuffix(".toml") for path in RECIPES.iterdir() if path.name.endswith(".toml"))
