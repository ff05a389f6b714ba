"""The machine and the versions that figures depend on, recorded with every run and benchmark."""

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines.workers import usable_cores

__version__ = "0.1.0"


def environment() -> dict[str, Any]:
    """Return the machine and the versions that a run's figures depend on."""
    import torch

    cuda = torch.cuda.is_available()
    libraries = ("torch", "torchvision", "numpy", "numba", "pillow", "pydantic", "ffcv")
    libraries += ("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12")
    return {
        "deitfast": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
        "libraries": {name: version(name) for name in libraries},
        "executable": sys.executable,
    }


def version(library: str) -> str | None:
    """Return a library's version, None where it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
