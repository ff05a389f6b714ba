"""HTML pages from templates: one base, one style sheet, everything escaped. Used by `report` and `bench`."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deitfast.environment import __version__

TEMPLATES = Path(__file__).parent / "templates"
"""base.html, which every page extends, and style.css, which it embeds."""


def render(template: Path, **values: Any) -> str:
    """Return a page: a template filled with values, which are escaped unless they are `markupsafe.Markup`.

    Args:
        template: file of the template; it may extend base.html and import macros.html.
        values: the template's variables; one that it uses and that is not given is an error.
    """
    environment = _environment(template.parent)
    return environment.get_template(template.name).render(version=__version__, **values)


@cache
def _environment(folder: Path) -> Environment:
    return Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
