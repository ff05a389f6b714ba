"""Checkpoints: plain dicts of tensors and numbers, written whole or not at all, read without running code."""

import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.errors import DeitfastError, UserError
from pipelines.files import atomic_write

FORMAT = 1
"""Version of the dict's layout."""
UNREADABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    zipfile.BadZipFile,
    struct.error,
)
"""What `read` raises for files that torch.save did not write, or that are damaged."""
REMEDY = "copy it again from where it is whole, or start the run anew with another --out"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that a crash at any moment leaves either the old file or the new one.

    Raises:
        DeitfastError: the disk is full or not writable; the old checkpoint stays as it was.
        KeyboardInterrupt: Ctrl-C came while this wrote; the old checkpoint stays as well.
    """
    before = sys.exception()  # a request to stop, where that is why a run saves
    try:
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:
        cause: BaseException = error  # what came first: torch's writer and the file add complaints of their own
        while cause.__context__ not in (None, before):
            cause = cause.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise DeitfastError(
            f"cannot write checkpoint {path}",
            found=str(cause).splitlines()[0],
            remedy="free some space and continue with --resume",
        ) from error


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Return what `save` wrote, its tensors on `device`.

    Raises:
        UserError: there is no such file, or another version of deitfast wrote it.
        DeitfastError: the file is damaged.
    """
    try:
        state = read(path, device)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}", remedy="name the folder of a run that got that far") from None
    except UNREADABLE as error:
        raise DeitfastError(f"checkpoint {path} is damaged", found=reason(error), remedy=REMEDY) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"checkpoint {path} has another format", expected=str(FORMAT), found=str(found))
    return state


def read(path: Path, device: torch.device | str) -> Any:
    """Return what torch.save wrote, its tensors on `device`, once it has the checksums that were written with it.

    torch.load compares none. Files from before PyTorch 1.6 have none, and are not zip archives.

    Raises:
        FileNotFoundError: there is no such file.
        Exception: one of UNREADABLE, where the file is damaged, or would run code.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if (part := file.testzip()) is not None:
                raise zipfile.BadZipFile(f"{part} in it does not have the CRC32 that was written with it")
    return torch.load(path, map_location=device, weights_only=True)


def reason(error: BaseException) -> str:
    """Return what `read`'s error says is wrong, without torch's advice to run what is in the file."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return text.splitlines()[0].partition(". Please use")[0]


def restore_model(model: nn.Module, state: dict[str, Any], path: Path, *, ema: bool = False) -> None:
    """Load a checkpoint's weights, plain or averaged, into `model`.

    Raises:
        UserError: it has no averaged weights, or was written by another model.
    """
    if ema and state["ema"] is None:
        raise UserError(f"checkpoint {path} has no averaged weights", remedy="train with train.ema above 0")
    try:
        model.load_state_dict(state["ema"]["model"] if ema else state["model"])
    except (RuntimeError, KeyError) as error:
        found = str(error).splitlines()[-1].strip()
        raise UserError(f"checkpoint {path} belongs to another model", found=found) from None
