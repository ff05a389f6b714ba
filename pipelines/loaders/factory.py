"""Opens a loader by name, and says which of them this machine can run."""

import logging
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from pipelines.batch import Loader
from pipelines.errors import DeitfastError, UserError
from pipelines.loaders.bad_samples import BadSamples
from pipelines.loaders.batch_plan import BatchPlan
from pipelines.loaders.codecs import turbo
from pipelines.loaders.host import Codec, HostLoader, TurboLoader
from pipelines.rng.sampler import Sampler
from pipelines.spec import AugmentSpec, LoaderSpec
from pipelines.storage.reader import Reader

log = logging.getLogger(__name__)
NAMES = ("resident", "dali", "cpu", "ffcv", "reference")
NEEDS = {
    "dali": ("nvidia.dali", "pipelines.loaders.dali.loader"),
    "cpu": ("nvidia.nvimgcodec", "pipelines.loaders.codecs.nvimgcodec"),
    "ffcv": ("ffcv", "pipelines.loaders.ffcv"),
}
"""The package that a loader needs, and the module of ours that imports it."""
_NVIDIA = "pip install 'deitfast[cuda13]' (driver 580 or later, or no GPU) or 'deitfast[cuda12]'"
INSTALL = {"dali": _NVIDIA, "cpu": _NVIDIA, "ffcv": "pip install 'deitfast[ffcv]'"}
"""What brings a loader's package."""
RESIDENT_SIDE = 64
"""Largest side that `auto` keeps resident, in pixels."""
RESIDENT_SHARE = 4
"""`auto` keeps a split resident if that takes at most 1 / RESIDENT_SHARE of the free memory."""


def open_loader(
    reader: Reader,
    augment: AugmentSpec,
    spec: LoaderSpec,
    sampler: Sampler,
    *,
    train: bool,
    device: torch.device,
) -> Loader:
    """Open the loader that `spec.name` names.

    Args:
        reader: the split.
        augment: size and draws of the crops.
        spec: name, workers, prefetch, check.
        sampler: which rows, in which order, for this rank.
        train: draw windows at random; else the recipe's center crop.
        device: where batches go.

    Raises:
        UserError: the loader does not work on this machine or with this split; the message says why.
        DeitfastError: a sample is damaged (resident only; the others raise it from `epoch`).
    """
    plan = BatchPlan(reader, augment, spec, sampler, train, device, BadSamples(spec.skip_bad))
    name = spec.name
    if name == "auto":
        name = choose(reader, device)
        if slower := slower_for_want_of(name, device):
            _warn_once(slower)
    match name:
        case "resident":
            from pipelines.loaders.resident import ResidentLoader

            return ResidentLoader(plan, _fastest_codec(plan))
        case "dali":
            _require("dali")
            from pipelines.loaders.dali.loader import DaliLoader

            return DaliLoader(plan)
        case "cpu":
            _require("cpu")
            return _cpu_loader(plan)
        case "ffcv":
            _require("ffcv")
            from pipelines.loaders.ffcv import FfcvLoader

            return FfcvLoader(plan)
        case "reference":
            return HostLoader("reference", plan, _pillow_codec(plan))
        case _:
            raise UserError(f"no loader is called {name}", expected=", ".join(NAMES), remedy="--loader auto")


def choose(reader: Reader, device: torch.device) -> str:
    """Return the loader that `auto` stands for.

    Resident for small images of one size that fit; else dali on CUDA, and cpu elsewhere; reference without either.
    """
    from pipelines.loaders.resident import common_size

    size = common_size(reader)
    if size is not None and max(size) <= RESIDENT_SIDE:
        needed = reader.num_samples * size[0] * size[1] * 3
        if needed * RESIDENT_SHARE <= min(free_memory(device), free_memory(torch.device("cpu"))):
            return "resident"
    if device.type == "cuda" and not why_not("dali"):
        return "dali"
    return "reference" if why_not("cpu") else "cpu"


def slower_for_want_of(name: str, device: torch.device) -> str:
    """Return in one line what `auto` would rather have taken than `name`, and what that lacks; "": nothing."""
    lacking = []
    if device.type == "cuda" and name in ("cpu", "reference") and (reason := why_not("dali")):
        lacking.append(f"dali ({reason}; {INSTALL['dali']})")
    if name == "reference" and (reason := why_not("cpu")):
        lacking.append(f"cpu ({turbo.unavailable()}, and {reason}; apt install gcc, or {INSTALL['cpu']})")
    if not lacking:
        return ""
    return f"loader auto: {name} reads the images, more slowly than {' or '.join(lacking)} would"


@cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)  # of a run's training and validation split alike


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device; on the host those that the kernel reports as available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):  # counts what the page cache would release
            return int(line.split()[1]) * 1024
    raise DeitfastError("/proc/meminfo does not say how much memory is available")


def available() -> dict[str, str]:
    """Return every loader's name with the reason why it does not work on this machine, "" where it does."""
    return {name: why_not(name) for name in NAMES}


def exact(name: str) -> bool:
    """Return whether a loader's pixels are those of `reference`, Pillow's, to the bit on this machine."""
    return name in ("reference", "resident") or (name == "cpu" and not turbo.unavailable())


def cpu_codec() -> str:
    """Return in a few words what the cpu loader decodes with on this machine."""
    return f"nvImageCodec, as {turbo.unavailable()}" if turbo.unavailable() else "compiled code, with Pillow's pixels"


def why_not(name: str) -> str:
    """Return the reason why a loader does not work on this machine, "" where it does."""
    if name not in NEEDS or exact(name):
        return ""
    package, module = NEEDS[name]
    try:
        if find_spec(package) is None:
            return f"{package} is not installed"
        import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except (ImportError, OSError, AttributeError) as error:
        return f"{package} cannot be imported: {error}"
    return ""


def _require(name: str) -> None:
    reason = why_not(name)
    if reason:
        raise UserError(
            f"the {name} loader does not work here",
            found=reason,
            remedy=f"{INSTALL[name]}; or --loader auto: deitfast doctor says which loaders work",
        )


def _cpu_loader(plan: BatchPlan) -> Loader:
    if exact("cpu"):
        return TurboLoader("cpu", plan, partial(turbo.TurboCodec, plan.interpolation))
    log.info("the cpu loader decodes with nvImageCodec, as the faster codec cannot be used: %s", turbo.unavailable())
    return HostLoader("cpu", plan, _region_codec(plan))


def _fastest_codec(plan: BatchPlan) -> Callable[[], Codec]:
    if exact("cpu"):
        return partial(turbo.TurboCodec, plan.interpolation)
    return _pillow_codec(plan) if why_not("cpu") else _region_codec(plan)


def _region_codec(plan: BatchPlan) -> Callable[[], Codec]:
    from pipelines.loaders.codecs.nvimgcodec import RegionCodec

    return partial(RegionCodec, plan.interpolation)


def _pillow_codec(plan: BatchPlan) -> Callable[[], Codec]:
    from pipelines.loaders.codecs.pillow import PillowCodec

    return partial(PillowCodec, plan.interpolation)
