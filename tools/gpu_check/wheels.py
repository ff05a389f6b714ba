"""What this Python lacks, installed from a folder of wheels into a folder of its own. The standard library only."""

import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

REQUIRED = ("torch", "torchvision", "numpy", "PIL", "pydantic", "tomli_w", "safetensors", "rich", "jinja2", "filelock")
"""Modules without which nothing here runs."""
OPTIONAL = ("triton", "nvidia.dali", "nvidia.nvimgcodec", "timm", "pytest", "hypothesis")
"""Modules that some sections need."""
ALWAYS = ("nvidia_", "typing_extensions")
"""Installed from the folder even if they are here: NVIDIA's libraries find each other by where they lie, and pydantic
needs a newer typing_extensions than other packages bring along."""


def missing(modules: tuple[str, ...]) -> tuple[str, ...]:
    """Return those modules that cannot be found."""
    return tuple(name for name in modules if not _is_found(name))


def install(folder: Path, target: Path) -> list[str]:
    """Install from a folder of wheels what is not installed, by pip and without a network, and make it importable.

    Args:
        folder: with wheels for this Python and this machine.
        target: new folder, which goes first on sys.path; the Python itself stays as it is.

    Returns:
        Names of the distributions.

    Raises:
        OSError: there is no such folder.
        ValueError: pip failed; its message.
    """
    here = {_normalized(found.name or "") for found in metadata.distributions()}
    names = sorted({_normalized(path.name.split("-")[0]) for path in folder.iterdir() if path.suffix == ".whl"})
    chosen = [name for name in names if name not in here or name.startswith(ALWAYS)]
    if not chosen:
        return []
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
    command = [*pip, "--no-index", "--no-deps", "--find-links", str(folder), "--target", str(target), *chosen]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"pip failed with {done.returncode}: {done.stderr.strip()}")
    nvidia = target / "nvidia"  # a package here that has an __init__.py would hide the one in the other folder
    if nvidia.is_dir():
        (nvidia / "__init__.py").write_text('__path__ = __import__("pkgutil").extend_path(__path__, __name__)\n')
    sys.path.insert(0, str(target))
    return chosen


def _is_found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


def _normalized(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")
