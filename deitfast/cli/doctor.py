"""`deitfast doctor`: what this machine has, and what will work on it."""

import os
import shutil
from pathlib import Path

import torch
from rich.table import Table

from deitfast.environment import environment
from deitfast.runtime import choose_amp, choose_compile
from pipelines.augment.chain import kernels_run
from pipelines.loaders.factory import available, free_memory


def examine() -> Table:
    """Return a table of devices, loaders, libraries and room, each with what it means for a run."""
    table = Table(title="deitfast doctor", title_justify="left", show_header=False)
    found = environment()
    table.add_row("deitfast", f"{found['deitfast']}, Python {found['python']}, {found['system']}")
    table.add_row("processor", f"{found['processor']}, {found['cores']} cores for this process")
    table.add_row("memory", f"{free_memory(torch.device('cpu')) / 1e9:.1f} GB free")
    table.add_row("disk", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free here, {os.getcwd()}")
    for index, name in enumerate(found["devices"]):
        device = torch.device("cuda", index)
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9
        table.add_row(f"cuda:{index}", f"{name}, {memory:.0f} GB, {_precision(device)}")
    if not found["devices"]:
        built = (
            f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch is built without CUDA"
        )
        table.add_row("cuda", f"no device ({built})")
    table.add_row("cpu", _precision(torch.device("cpu")))
    for name, reason in available().items():
        table.add_row(f"loader {name}", f"no: {reason}" if reason else "works")
    versions = (f"{name} {version or 'not installed'}" for name, version in found["libraries"].items())
    table.add_row("libraries", ", ".join(versions))
    return table


def _precision(device: torch.device) -> str:
    """Say what train.amp=auto, train.compile=auto and train.kernels=auto mean on a device."""
    amp = choose_amp("auto", device)
    name = str(amp).removeprefix("torch.") if amp else "float32"
    compiled = "compiled" if choose_compile("auto", device) else "not compiled"
    return f"trains in {name}, {compiled}, augments in {'kernels' if kernels_run('auto', device) else 'batched torch'}"
