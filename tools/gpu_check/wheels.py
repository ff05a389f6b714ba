"""What this Python lacks, and wheels out of a folder in its place. The standard library only: it runs before all else.

A wheel is a zip whose content lies as it is imported: it is unpacked and put first on sys.path. That needs no pip, no
network, and writes nothing into the Python that it helps out.
"""

import platform
import re
import sys
import sysconfig
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

REQUIRED = ("torch", "torchvision", "numpy", "PIL", "pydantic", "tomli_w", "safetensors", "rich")
"""Modules without which nothing here runs."""
OPTIONAL = ("triton", "nvidia.dali", "nvidia.nvimgcodec", "timm", "pytest", "hypothesis")
"""Modules that some sections need."""
ANYWAY = ("nvidia_", "typing_extensions")
"""Unpacked even if installed: NVIDIA's libraries find each other by where they lie, and pydantic needs a new
typing_extensions, of which torch brings along any."""


def missing(modules: tuple[str, ...]) -> tuple[str, ...]:
    """Return those modules that cannot be found."""
    return tuple(name for name in modules if not _found(name))


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


def unpack(folder: Path, target: Path) -> list[str]:
    """Unpack what suits this Python and is not installed, and make it importable.

    Args:
        folder: with wheels; others than those that fit are passed over.
        target: new folder for their content; goes first on sys.path.

    Returns:
        The wheels' file names.

    Raises:
        OSError: there is no such folder, or no room.
        ValueError: a wheel is damaged.
    """
    target.mkdir(parents=True, exist_ok=True)
    taken = [wheel for wheel in sorted(folder.iterdir()) if wheel.suffix == ".whl" and wanted(wheel.name)]
    for wheel in taken:
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{wheel} is no whole wheel: {error}") from error
        for data in target.glob("*.data"):
            for kind in ("purelib", "platlib"):
                _merge(data / kind, target)
    if taken and str(target) not in sys.path:
        sys.path.insert(0, str(target))
        _join_nvidia(target)
    return [wheel.name for wheel in taken]


def wanted(name: str) -> bool:
    """Whether a wheel of that file name fits this Python and machine, and does not stand in the way of another."""
    parts = name.removesuffix(".whl").split("-")
    if len(parts) not in (5, 6):
        return False
    python, abi, place = (set(part.split(".")) for part in parts[-3:])
    return _fits(python, abi, place) and (parts[0].lower().startswith(ANYWAY) or not installed(parts[0]))


def installed(distribution: str) -> bool:
    """Whether a distribution is installed, however its name is written."""
    wanted_name = _plain(distribution)
    return any(_plain(found.name or "") == wanted_name for found in metadata.distributions())


def _fits(python: set[str], abi: set[str], place: set[str]) -> bool:
    """Compare a wheel's tags; see the packaging specification on platform compatibility tags."""
    minor, own = sys.version_info.minor, f"cp3{sys.version_info.minor}"
    older = {f"cp3{each}" for each in range(2, minor + 1)}
    interpreted = bool(python & {"py3", own, f"py3{minor}"}) and bool(abi & {"none", own})
    stable = "abi3" in abi and bool(python & older)
    system = sysconfig.get_platform().split("-")[0]
    systems = (system, f"many{system}")  # macOS' and musl's tags are others
    here = any(tag == "any" or (tag.startswith(systems) and tag.endswith(platform.machine())) for tag in place)
    return (interpreted or stable) and here


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def _merge(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)


def _join_nvidia(target: Path) -> None:
    """Let `nvidia` be found in both places, also where it was imported already, and by processes still to come."""
    package = target / "nvidia"
    if not package.is_dir():
        return
    init = package / "__init__.py"
    if not init.exists():
        init.write_text('__path__ = __import__("pkgutil").extend_path(__path__, __name__)\n')
    if (known := sys.modules.get("nvidia")) is not None:
        known.__path__ = [str(package), *known.__path__]
