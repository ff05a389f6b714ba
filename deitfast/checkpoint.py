"""Checkpoints: plain dicts of tensors and numbers, written whole or not at all, read without running code."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.errors import Failure, Mistake
from pipelines.files import whole_file

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
)
"""What torch.load raises for files that are none of its own, or damaged."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that a crash at any moment leaves either the old file or the new one.

    Raises:
        Failure: the disk is full or not writable; the old checkpoint stays as it was.
    """
    try:
        with whole_file(path) as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:
        raise Failure(
            f"cannot write checkpoint {path}",
            found=str(error).splitlines()[0],
            remedy="free some space and continue with --resume",
        ) from error


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Return what `save` wrote, its tensors on `device`.

    Raises:
        Mistake: there is no such file, or another version of deitfast wrote it.
        Failure: the file is damaged.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise Mistake(f"there is no checkpoint {path}", remedy="name the folder of a run that got that far") from None
    except UNREADABLE as error:
        raise Failure(f"checkpoint {path} is damaged", found=str(error).splitlines()[0]) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise Mistake(f"checkpoint {path} has another format", expected=str(FORMAT), found=str(found))
    return state


def restore_model(model: nn.Module, state: dict[str, Any], path: Path, *, ema: bool = False) -> None:
    """Load a checkpoint's weights, plain or averaged, into `model`.

    Raises:
        Mistake: it has no averaged weights, or was written by another model.
    """
    if ema and state["ema"] is None:
        raise Mistake(f"checkpoint {path} has no averaged weights", remedy="train with train.ema above 0")
    try:
        model.load_state_dict(state["ema"]["model"] if ema else state["model"])
    except (RuntimeError, KeyError) as error:
        found = str(error).splitlines()[-1].strip()
        raise Mistake(f"checkpoint {path} belongs to another model", found=found) from None
