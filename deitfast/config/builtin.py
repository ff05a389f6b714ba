"""Names of what comes with deitfast, found without heavy imports."""

from importlib import resources

RECIPES = resources.files("deitfast") / "config" / "recipes"
"""Folder of the built-in recipes, NAME.toml."""
STUDIES = resources.files("deitfast") / "config" / "studies"
"""Folder of the built-in studies, NAME.toml."""


def names() -> list[str]:
    """Return the names of the built-in recipes."""
    return sorted(path.name.removesuffix(".toml") for path in RECIPES.iterdir() if path.name.endswith(".toml"))


def study_names() -> list[str]:
    """Return the names of the built-in studies."""
    return sorted(path.name.removesuffix(".toml") for path in STUDIES.iterdir() if path.name.endswith(".toml"))
