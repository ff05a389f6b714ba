"""Checkpoints: plain dicts of tensors and numbers, written whole or not at all, read without running code.

A run keeps two. `checkpoint.pt` is the last one: all that --resume needs, with the averaged weights where the run has
them. `checkpoint_best.pt` holds the weights, plain or averaged, of the best validation top-1 so far.
"""

import lzma
import pickle
import struct
import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deitfast.config.choices import WhichCheckpoint
from deitfast.run_folder import RunFolder
from pipelines.errors import DeitfastError, UserError
from pipelines.files import atomic_write, os_remedy

TAG = "deitfast_checkpoint"
"""Key that says whose a checkpoint is; its value is FORMAT."""
FORMAT = 2
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
    AssertionError,  # of torch's reader of files from before PyTorch 1.6
    ArithmeticError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    zipfile.BadZipFile,
    zlib.error,  # a header that says deflate, or LZMA, of an archive that is stored
    lzma.LZMAError,
    struct.error,
)
"""What `read` raises for files that torch.save did not write, or that are damaged."""
REMEDY = "copy it again from where it is whole, or start a new run with another --out"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that a crash at any moment leaves either the old file or the new one.

    Raises:
        DeitfastError: the disk is full or not writable; the old checkpoint stays as it was.
        KeyboardInterrupt: Ctrl-C came while this wrote; the old checkpoint stays as well.
    """
    before = sys.exception()  # a request to stop, where that is why a run saves
    try:
        with atomic_write(path) as file:
            torch.save({TAG: FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:
        cause: BaseException = error  # what came first: torch's writer and the file add complaints of their own
        while cause.__context__ not in (None, before):
            cause = cause.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        remedy = "free some space and continue with --resume"
        raise DeitfastError(
            f"cannot write checkpoint {path}",
            found=str(cause).splitlines()[0],
            remedy=os_remedy(cause, remedy) if isinstance(cause, OSError) else remedy,
        ) from error


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Return what `save` wrote, its tensors on `device`.

    Raises:
        UserError: there is no such file, or another version of deitfast wrote it.
        DeitfastError: the file is damaged, or holds something else than a checkpoint of a run does.
    """
    try:
        state = read(path, device)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}", remedy="name the folder of a run that got that far") from None
    except UNREADABLE as error:
        raise DeitfastError(f"checkpoint {path} is damaged", found=reason(error), remedy=REMEDY) from error
    if not is_ours(state):
        found = str(state.get(TAG, "none")) if isinstance(state, dict) else type(state).__name__
        raise UserError(
            f"checkpoint {path} has another format",
            expected=f"format {FORMAT}",
            found=found,
            remedy="read it with the version of deitfast that wrote it",
        )
    if problem := _malformed(state):
        raise DeitfastError(f"checkpoint {path} is damaged or was edited", found=problem, remedy=REMEDY)
    return state


def is_ours(tree: Any) -> bool:
    """Whether what was read is a checkpoint of this version of deitfast."""
    return isinstance(tree, dict) and type(tree.get(TAG)) is int and tree[TAG] == FORMAT


def _malformed(state: dict[str, Any]) -> str:
    """Return what is not as `TrainStep.state`, `TrainState.state` and `save_best` write it; "" where all is."""
    kinds = {
        "epoch": int, "steps": int, "skipped": int, "seconds": int | float, "waited": int | float, "losses": list,
        "model": dict, "ema": dict | None, "optimizer": dict, "scaler": dict, "averaged": bool, "top1": int | float,
    }  # fmt: skip
    for name, kind in kinds.items():
        if name in state and not isinstance(state[name], kind):
            return f"{name} is a {type(state[name]).__name__}"
    if "model" not in state or "epoch" not in state:
        return "no model" if "epoch" in state else "no epoch"
    for name, weights in (("model", state["model"]), ("ema.model", (state.get("ema") or {"model": {}}).get("model"))):
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            return f"{name} is not a dict of tensors"
    return ""


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged files, which then fail or not
        return torch.load(path, map_location=device, weights_only=True)


def reason(error: BaseException) -> str:
    """Return what `read`'s error says is wrong, without torch's advice to run what is in the file."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return text.splitlines()[0].partition(". Please use")[0]


def choose(run: RunFolder, *, ema: bool = False, which: WhichCheckpoint = "auto") -> Path:
    """Return the checkpoint of a run that is meant.

    Args:
        run: the run.
        ema: the averaged weights are wanted, which the last checkpoint has.
        which: best or last; auto: the best where there is one and `ema` is not given, else the last.

    Raises:
        UserError: the best is wanted and the run has none, or is wanted together with the averaged weights.
    """
    if which == "best" and ema:
        raise UserError(
            "--which best and --ema exclude each other", remedy="give one of them: the best says what it is"
        )
    if which == "best" and not run.best.exists():
        raise UserError(
            f"there is no best checkpoint in {run.path}",
            expected=run.best.name,
            found="a run that was not evaluated yet, or has no validation split",
            remedy="take --which last",
        )
    return run.best if which != "last" and not ema and run.best.exists() else run.checkpoint


def model_weights(state: dict[str, Any], path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Return a loaded checkpoint's weights, plain or averaged.

    Raises:
        UserError: it has no averaged weights.
    """
    if not ema:
        return state["model"]
    if not state.get("ema"):
        raise UserError(f"checkpoint {path} has no averaged weights", remedy="train with train.ema above 0")
    return state["ema"]["model"]


def best_before(path: Path, epoch: int) -> float:
    """Return the validation top-1 of a run's best checkpoint, if it was saved before `epoch` (from 0); else -1.

    Raises:
        DeitfastError: it is damaged.
    """
    if not path.exists():
        return -1.0
    best = load(path, torch.device("cpu"))
    return float(best["top1"]) if best["epoch"] < epoch else -1.0


def save_best(path: Path, epoch: int, top1: float, weights: dict[str, Tensor], *, averaged: bool) -> None:
    """Write the weights of the best validation top-1 so far.

    Args:
        path: `RunFolder.best`.
        epoch: from 0.
        top1: of the published prediction, a share.
        weights: the model's state.
        averaged: whether they are the averaged ones.

    Raises:
        DeitfastError: as `save`.
    """
    save(path, {"epoch": epoch, "top1": top1, "averaged": averaged, "model": weights})
