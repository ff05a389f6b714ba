"""What a process computes on: device, autocast dtype, and whether the model is compiled."""

import torch

from pipelines.errors import UserError


def choose_device(device: str, local_rank: int) -> torch.device:
    """Return the device of that name; auto: this rank's GPU where there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device} is no device", expected="auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch sees no CUDA device", remedy="run `deitfast doctor`, or use cpu")
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", local_rank)
    if chosen.type == "cuda" and chosen.index >= torch.cuda.device_count():
        raise UserError(f"there is no {chosen}", found=f"{torch.cuda.device_count()} CUDA devices")
    return chosen


def choose_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype for `train.amp` on a device."""
    if amp == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if amp == "auto" and device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.11
        fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        return torch.bfloat16 if fast else None  # elsewhere bf16 is emulated, slower than float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def choose_compile(compile_: str, device: torch.device) -> bool:
    """Return whether `train.compile` means torch.compile on a device."""
    return compile_ in ("on", "graphs") or (compile_ == "auto" and device.type == "cuda")
