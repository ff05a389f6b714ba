"""What a process computes on: device, autocast dtype, and whether the model is compiled. One probe, at the start."""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from pipelines.batch.place import kernels_missing
from pipelines.errors import UserError

log = logging.getLogger("deitfast")
DRIVERS = {13: "580", 12: "525", 11: "450"}
"""Oldest NVIDIA driver for each generation of CUDA (NVIDIA's table of minor version compatibility)."""
STEP_PRIORITY = -1
"""Of the step's CUDA stream; the loader's, DALI's and torch's other streams have 0, and lower numbers go first."""
DRIVER_FILE, DEVICE_FILE = Path("/proc/driver/nvidia/version"), Path("/dev/nvidia0")


def choose_device(device: str, local_rank: int) -> torch.device:
    """Return the device of that name; auto: this rank's GPU where there is one, else the CPU.

    Raises:
        UserError: no such device, or a GPU that is there and that this PyTorch cannot use: training on the CPU
            instead would be hundreds of times slower, so that only `cpu` asks for it.
    """
    if device == "auto":
        if not torch.cuda.is_available() and (reason := unusable_gpu()):
            raise UserError(
                "this machine has an NVIDIA GPU that PyTorch cannot use",
                expected=reason[0],
                found=reason[1],
                remedy="mend that, or train on the CPU with --device cpu",
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device {device}", expected="auto, cpu, cuda or cuda:N") from None
    if chosen.type != "cuda":
        return chosen
    if not torch.cuda.is_available():
        expected, found = unusable_gpu() or ("an NVIDIA GPU with its driver", "none")
        raise UserError(f"--device {device}: PyTorch sees no CUDA device", expected=expected, found=found,
                        remedy="run `deitfast doctor`, or take --device cpu")  # fmt: skip
    chosen = torch.device("cuda", local_rank) if chosen.index is None else chosen
    if chosen.index >= torch.cuda.device_count():
        raise UserError(
            f"there is no {chosen}",
            found=f"{torch.cuda.device_count()} CUDA devices",
            remedy="start as many processes as there are GPUs (torchrun --nproc-per-node)",
        )
    require_kernels_for(chosen)
    return chosen


def unusable_gpu() -> tuple[str, str] | None:
    """Return what a GPU that is there would need, and what was found; None: there is none, or it is hidden on purpose.

    Call it where PyTorch sees no CUDA device: it gives no reason of its own.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "none"):
        return None
    driver = driver_version()
    if driver is None and not DEVICE_FILE.exists():
        return None
    cuda = torch.version.cuda
    if cuda is None:
        return "a PyTorch that is built for CUDA", f"PyTorch {torch.__version__}, built without"
    oldest = DRIVERS.get(int(cuda.split(".")[0]))
    expected = f"a driver from {oldest} on, for PyTorch's CUDA {cuda}" if oldest else f"a driver for CUDA {cuda}"
    expected += ", or a PyTorch and deitfast[cuda12] for an older driver" if cuda.startswith("13") else ""
    return expected, f"driver {driver}" if driver else "a device, and no driver"


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver that is loaded; None: none is."""
    try:
        words = DRIVER_FILE.read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and word.count(".") in (1, 2)), "of unknown version")


def require_kernels_for(device: torch.device) -> None:
    """Make sure that PyTorch has kernels for a GPU's compute capability: the first step would die without a reason.

    Raises:
        UserError: it has none; names what it has.
    """
    major, minor = torch.cuda.get_device_capability(device)
    architectures = torch.cuda.get_arch_list()
    if any(_runs(architecture, major, minor) for architecture in architectures):
        return
    raise UserError(
        f"PyTorch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)}",
        expected=f"one of {', '.join(architectures)}",
        found=f"sm_{major}{minor}",
        remedy="install a PyTorch that is built for this GPU (V100: one for CUDA 12), or take --device cpu",
    )


def _runs(architecture: str, major: int, minor: int) -> bool:
    """Whether code for `architecture` (sm_86: machine code; compute_90: PTX) runs on compute capability major.minor."""
    kind, _, version = architecture.partition("_")
    digits = "".join(filter(str.isdigit, version))
    built = int(digits[:-1] or 0), int(digits[-1:] or 0)
    return built <= (major, minor) and (kind == "compute" or built[0] == major)


def step_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a process's main thread works on its device: on CUDA, on a stream of high priority.

    Where its kernels and those of the loader's streams are both ready, its go first: the loader works ahead, and
    nothing waits for the step's kernels but the run.
    """
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device, priority=STEP_PRIORITY))


def choose_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype for `train.amp` on a device."""
    if amp == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if amp == "auto" and device.type == "cpu":
        return None if emulated(torch.bfloat16, device) else torch.bfloat16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def emulated(amp: torch.dtype | None, device: torch.device) -> bool:
    """Whether a CPU has no instructions for an autocast dtype, and so takes longer in it than in float32."""
    names = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
    if device.type != "cpu" or amp not in names:
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.11
    return not any(capabilities.get(name) for name in names[amp])


def choose_compile(compile_: str, device: torch.device) -> bool:
    """Return whether `train.compile` means torch.compile on a device.

    auto: on CUDA, where Triton has what it compiles with; without, training is slower and the same.

    Raises:
        UserError: `compile_` is on or graphs, and there is nothing to compile with.
    """
    if compile_ == "off" or (compile_ == "auto" and device.type != "cuda"):
        return False
    missing = kernels_missing(device) if device.type == "cuda" else ""
    if missing and compile_ != "auto":
        raise UserError(
            f"train.compile is {compile_}, and torch.compile does not work here",
            found=missing,
            remedy="install what is missing, or set train.compile=off",
        )
    if missing:
        log.warning("not compiled, and augmented without kernels, which is slower: %s", missing)
    return not missing
