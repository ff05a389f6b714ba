"""Weights of other programs and of finished runs, read into timm's names. Nothing in a file is ever executed."""

import hashlib
import json
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deitfast.config.choices import Arch
from deitfast.run_folder import RunFolder
from deitfast.weights import checkpoint
from deitfast.weights.huggingface import is_hugging_face, to_timm
from pipelines.errors import UserError

WIDTHS = {192: "deit_ti", 384: "deit_s", 768: "deit_b"}
WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
PLAIN, AVERAGED = ("model", "state_dict"), ("model_ema", "state_dict_ema")
"""Where the reference's and timm's training checkpoints keep their weights."""
INPUT_FIELDS = ("size", "crop", "eval_crop", "mean", "std")
"""Fields of `AugmentSpec` that evaluation needs beside the weights."""
METADATA = "deitfast"
"""Key of our own entry in a .safetensors file's metadata."""


@dataclass(frozen=True)
class Weights:
    """One network's weights."""

    path: Path
    """The file they were read from."""
    kind: str
    """Whose names the file has, for people."""
    tensors: dict[str, Tensor]
    """On the CPU, floating point in float32: transformers under timm's names, CNNs under torchvision's."""
    classes: tuple[str, ...] = ()
    """Class names in label order; empty where the file does not say."""
    input: dict[str, Any] = field(default_factory=dict)
    """`INPUT_FIELDS` of the recipe that they were trained with, where the file says."""

    @property
    def transformer(self) -> bool:
        """Whether these are a ViT's or DeiT's."""
        return "pos_embed" in self.tensors

    @property
    def distilled(self) -> bool:
        """Whether there is a distillation token."""
        return "dist_token" in self.tensors

    @property
    def arch(self) -> Arch | None:
        """The network as its width tells it: deit_ti, deit_s or deit_b; None for a CNN and for other widths."""
        width = self.tensors["pos_embed"].shape[-1] if self.transformer else 0
        return cast(Arch | None, WIDTHS.get(width))

    @property
    def outputs(self) -> int:
        """Number of classes of the class head."""
        return len(self.tensors["head.weight" if self.transformer else "fc.weight"])

    @property
    def patch(self) -> int:
        """Side of a patch in pixels (transformers only)."""
        return self.tensors["patch_embed.proj.weight"].shape[-1]

    @property
    def size(self) -> int:
        """Side of the input in pixels that the position embeddings are for (transformers only)."""
        return self.patch * grid_side(self.tensors["pos_embed"], 2 if self.distilled else 1)


def grid_side(positions: Tensor, prefix: int) -> int:
    """Return the patches along a side that position embeddings [1, prefix + side^2, width] are for.

    Raises:
        UserError: they are for no square.
    """
    side = math.isqrt(positions.shape[1] - prefix)
    if side**2 != positions.shape[1] - prefix:
        raise UserError(
            "position embeddings of an image that is no square",
            expected=f"{prefix} and a square number of them",
            found=str(positions.shape[1]),
        )
    return side


def read_weights(path: Path, *, ema: bool = False) -> Weights:
    """Read a run's folder, an export of ours, or a file of official DeiT, timm, Hugging Face or torchvision weights.

    Args:
        path: a run's folder; a folder with a model.safetensors; a .safetensors file; a file that torch.save wrote.
        ema: take the averaged weights (of a run, or of the reference's and timm's training checkpoints).

    Raises:
        UserError: no such file, one that cannot be read without running code, names of no network that deitfast knows,
            or no averaged weights.
    """
    file = weights_file(path)
    tree, metadata = _safetensors(file) if file.suffix == ".safetensors" else (_torch_file(file), {})
    tensors = _unwrapped(tree, file, ema)
    run = RunFolder(path)
    classes, input_ = tuple(metadata.get("classes", ())), metadata.get("input", {})
    if run.exists():
        classes = run.info().classes
        input_ = {name: getattr(run.recipe().augment, name) for name in INPUT_FIELDS}
    kind, tensors = _recognized(tensors, file)
    if run.exists() or metadata or "optimizer" in tree:
        kind = "deitfast"
    floats = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    return Weights(file, kind, floats, classes, input_)


def read_state(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file or of one that torch.save wrote, under the names that it has.

    Raises:
        UserError: no such file, or one that cannot be read without running code.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}", expected="a .safetensors or a .pth file")
    return _unwrapped(_safetensors(file)[0] if file.suffix == ".safetensors" else _torch_file(file), file, ema=False)


def weights_file(path: Path) -> Path:
    """Return the file that holds the weights of a run, of a folder as timm and Hugging Face write it, or `path`.

    Raises:
        UserError: there is none.
    """
    run = RunFolder(path)
    file = run.checkpoint if run.exists() else path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"there are no weights in {path}" if path.is_dir() else f"there is no file {path}",
            expected="a run's folder, a folder with a model.safetensors, a .safetensors or a .pth file",
        )
    return file


def file_digest(file: Path) -> str:
    """Return 32 hex digits of blake2b over a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _safetensors(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a .safetensors file's tensors and our own metadata."""
    try:
        with safe_open(file, "pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{file} is no whole .safetensors file", found=str(error)) from None


def _torch_file(file: Path) -> dict[str, Any]:
    """Return what torch.save wrote, as far as it is data."""
    try:
        with torch.serialization.safe_globals([Namespace]):  # the reference keeps its options beside the weights
            tree = checkpoint.read(file, "cpu")
    except checkpoint.UNREADABLE as error:
        raise UserError(
            f"{file} cannot be read as weights",
            expected="a whole file of tensors, written by torch.save",
            found=checkpoint.reason(error),
            remedy="files that would run code are refused; save the state_dict alone, or as .safetensors",
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} holds no weights", expected="a state_dict", found=type(tree).__name__)
    return tree


def _unwrapped(tree: dict[str, Any], file: Path, ema: bool) -> dict[str, Tensor]:
    """Return the state_dict inside a training checkpoint, without wrappers' prefixes."""
    inner: Any = tree if not ema else None
    if "optimizer" in tree:  # our own checkpoint
        inner = tree["model"] if not ema else (tree["ema"] or {}).get("model")
    else:
        inner = next((tree[key] for key in (AVERAGED if ema else PLAIN) if isinstance(tree.get(key), Mapping)), inner)
    if inner is None:
        raise UserError(f"{file} has no averaged weights", remedy="leave --ema out")
    for prefix in WRAPPERS:
        if inner and all(str(name).startswith(prefix) for name in inner):
            inner = {name.removeprefix(prefix): value for name, value in inner.items()}
    return {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}


def _recognized(tensors: dict[str, Tensor], file: Path) -> tuple[str, dict[str, Tensor]]:
    """Return whose names these are, and the tensors under the names that our models have."""
    kind = "DeiT and timm"
    if is_hugging_face(tensors):
        kind, tensors = "Hugging Face", to_timm(tensors)
    if {"cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight"} <= tensors.keys():
        return kind, tensors
    if "fc.weight" in tensors and ("conv1.weight" in tensors or "stem.0.weight" in tensors):
        return "torchvision", tensors
    raise UserError(
        f"{file} holds no network that deitfast knows",
        expected="names as in the official DeiT files, timm, Hugging Face's DeiT and ViT, or torchvision's CNNs",
        found=listed(sorted(tensors)) or "no tensors",
    )


def listed(names: list[str], most: int = 4) -> str:
    """Return names in one line, the first few of them where they are many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
