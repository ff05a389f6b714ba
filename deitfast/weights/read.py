"""Weights of other programs and of finished runs, read under deitfast's names. Nothing in a file is ever executed."""

import hashlib
import math
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deitfast.config.choices import Arch, WhichCheckpoint
from deitfast.config.sections import HEAD_WIDTH, WIDTHS, TransformerShape
from deitfast.run_folder import RunFolder
from deitfast.weights import checkpoint
from deitfast.weights.layouts import ANCHORS, recognize
from deitfast.weights.sidecar import INPUT_FIELDS, STANDARD_FILES, Sidecar, read_sidecar
from deitfast.weights.state_dict import flatten, not_finite, select_network
from pipelines.errors import UserError

STANDARD_DEPTH = 12
"""Blocks of a transformer where nothing next to its weights tells them."""
EXPECTED = "a run's folder, a folder with a model.safetensors, a .safetensors or a .pth file"


@dataclass(frozen=True)
class Weights:
    """One network's weights."""

    path: Path
    """The file they were read from."""
    kind: str
    """Whose names the file has, human-readable."""
    tensors: dict[str, Tensor]
    """On the CPU, floating point in float32: transformers under timm's names, CNNs under torchvision's."""
    sidecar: Sidecar = field(default_factory=Sidecar)
    """Class names, and how images are fed to the network, as far as they are told."""
    epoch: int = 0
    """Epoch of a run, from 1, in which they were saved; 0 for other files."""
    described: str = "weights"
    """Which of a run's or file's weights they are, human-readable: "averaged weights", "best weights", ..."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the outputs; empty where nothing tells them."""
        return self.sidecar.classes

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
        """The network as its shapes tell it, a transformer of another width as deit_ti; None for an unknown CNN."""
        if self.transformer:
            size = next((size for size, width in WIDTHS.items() if width == self.shape.width), "ti")
            return cast(Arch, f"deit_{size}")
        return _cnn_arch(self.tensors)

    @property
    def shape(self) -> TransformerShape:
        """What the network is built of (transformers only); heads of 64 where nothing tells their number."""
        width = self.tensors["pos_embed"].shape[-1]
        depth = len({name.split(".")[1] for name in self.tensors if name.startswith("blocks.")})
        heads = self.sidecar.heads or max(1, width // HEAD_WIDTH)
        hidden = self.tensors.get("blocks.0.mlp.fc1.bias")
        return TransformerShape(width, depth, heads, 4 * width if hidden is None else len(hidden))

    @property
    def classifier(self) -> str:
        """Name of the class head's weight."""
        return "head.weight" if self.transformer else "fc.weight"

    @property
    def num_classes(self) -> int:
        """Outputs of the class head; 0 where there is none."""
        head = self.tensors.get(self.classifier)
        return 0 if head is None else len(head)

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
    side = math.isqrt(max(0, positions.shape[1] - prefix))
    if side**2 != positions.shape[1] - prefix:
        raise UserError(
            "position embeddings of an image that is not square",
            expected=f"{prefix} and a square number of them",
            found=str(positions.shape[1]),
        )
    return side


def read_weights(path: Path, *, ema: bool = False, which: WhichCheckpoint = "auto") -> Weights:
    """Read a run's folder, an export of ours, or a file of official DeiT, timm, Hugging Face or torchvision weights.

    Args:
        path: a run's folder; a folder with a model.safetensors; a .safetensors file; a file that torch.save wrote.
        ema: take the averaged weights (of a run's last checkpoint, or of another program's training checkpoint).
        which: of a run, the best or the last checkpoint; auto: the best where there is one, with `ema` the last.

    Raises:
        UserError: no such file, one that cannot be read without running code, names of no network that deitfast knows,
            weights that are not finite, no averaged weights, or a configuration next to them that does not fit.
        DeitfastError: a run's checkpoint is damaged.
    """
    run = RunFolder(path)
    if run.exists():
        file = checkpoint.choose(run, ema=ema, which=which)
        state = checkpoint.load(file, torch.device("cpu"))
        best = "best " if file == run.best else ""
        described = f"{best}averaged weights" if ema or state.get("averaged") else f"{best}weights"
        tensors = checkpoint.model_weights(state, file, ema=ema)
        recipe = run.recipe()
        told = {name: getattr(recipe.augment, name) for name in INPUT_FIELDS}
        origins = f"{run.path / 'run.json'}", f"{run.path / 'recipe.toml'}"
        heads, depth = (recipe.model.shape.heads, recipe.model.depth) if recipe.transformer else (None, None)
        side = Sidecar(run.info().classes, origins[0], told, origins[1], heads=heads, depth=depth)
        return _weights(file, "deitfast", tensors, side, state["epoch"] + 1, described)
    if which != "auto":
        raise UserError(f"--which {which} goes with a run's folder", found=str(path), remedy="leave --which out")
    file = weights_file(path)
    flat, metadata, ours = _contents(file)
    kind, tensors = recognize(select_network(flat, ANCHORS, file, ema=ema), file)
    side = read_sidecar(file, metadata)
    return _weights(file, "deitfast" if ours else kind, tensors, side, 0, "averaged weights" if ema else "weights")


def read_state(file: Path, names: Iterable[str]) -> tuple[dict[str, Tensor], Sidecar]:
    """Return one network's tensors in a file, without wrappers' prefixes, and what lies next to them.

    Args:
        file: a .safetensors file, or one that torch.save wrote.
        names: the network's own names of its tensors.

    Raises:
        UserError: no such file, one that cannot be read without running code, or values that are not finite.
    """
    if not file.is_file():
        raise UserError(f"weights file not found: {file}", expected="a .safetensors or a .pth file")
    flat, metadata, _ = _contents(file)
    there = [name for name in names if name in flat or any(other.endswith(f".{name}") for other in flat)]
    anchors = sorted(there, key=lambda name: (name.count("."), len(name)))[-1:]  # no name of another layer ends so
    state = select_network(flat, anchors, file, ema=False)
    _require_finite(state, file)
    return state, read_sidecar(file, metadata)


def weights_file(path: Path) -> Path:
    """Return the file of weights in a folder as timm and Hugging Face write it, or `path`.

    Raises:
        UserError: there is none.
    """
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"weights file not found: {path}", expected=EXPECTED)
        return path
    for name in STANDARD_FILES:
        if (path / name).is_file():
            return path / name
    if parts := sorted(path.glob("*.index.json")):
        raise UserError(
            f"{path} holds weights in several files",
            expected="one model.safetensors",
            found=parts[0].name,
            remedy="load it with transformers and save it again: save_pretrained(FOLDER, max_shard_size='100GB')",
        )
    raise UserError(f"there are no weights in {path}", expected=EXPECTED)


def file_digest(file: Path) -> str:
    """Return 32 hex digits of blake2b over a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _weights(file: Path, kind: str, tensors: dict[str, Tensor], side: Sidecar, epoch: int, described: str) -> Weights:
    """Return weights in float32, checked against what is told of them.

    Raises:
        UserError: they are not finite, or what is told belongs to another network.
    """
    _require_finite(tensors, file)
    floats = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    weights = Weights(file, kind, floats, side, epoch, described)
    if weights.transformer:
        _check_shape(weights)
    side.named(weights.num_classes, file)
    return weights


def _check_shape(weights: Weights) -> None:
    """Check a transformer's blocks, some of which a damaged file may lack, and its heads, which no tensor tells.

    Raises:
        UserError: they are others than are told; where nothing tells how many blocks, they must be 12.
    """
    side, shape = weights.sidecar, weights.shape
    expected = found = ""
    if shape.depth != (side.depth or STANDARD_DEPTH):
        expected = f"{side.depth} blocks, as {side.input_from} says" if side.depth else f"{STANDARD_DEPTH} blocks"
        found = f"{shape.depth} blocks"
    elif shape.width % shape.heads:
        expected = f"a number of attention heads that divides its width, {shape.width}"
        found = f"{shape.heads}" + (f" in {side.input_from}" if side.heads else "")
    if found:
        raise UserError(
            f"{weights.path} holds a transformer that deitfast cannot build",
            expected=expected,
            found=found,
            remedy="as a teacher it may work through timm: --teacher timm/NAME --teacher-weights FILE",
        )


def _require_finite(tensors: dict[str, Tensor], file: Path) -> None:
    if bad := not_finite(tensors):
        raise UserError(
            f"{file} has weights that are not finite (NaN or infinite)",
            found=bad,
            remedy="take weights from before training diverged",
        )


def _cnn_arch(tensors: dict[str, Tensor]) -> Arch | None:
    """Return which of deitfast's CNNs has these tensors, by the shapes of its stages; None for another."""
    stages = {
        "resnet18": {"layer4.1.conv2.weight": (512, 512, 3, 3), "layer1.1.conv2.weight": (64, 64, 3, 3)},
        "resnet20": {"layer1.2.conv2.weight": (16, 16, 3, 3), "layer3.2.conv2.weight": (64, 64, 3, 3)},
        "resnet50": {"layer3.5.conv3.weight": (1024, 256, 1, 1), "layer4.2.conv3.weight": (2048, 512, 1, 1)},
        "regnet_y_4gf": {"trunk_output.block4.block4-1.f.c.0.weight": (1088, 1088, 1, 1)},
        "regnet_y_8gf": {"trunk_output.block4.block4-0.f.c.0.weight": (2016, 2016, 1, 1)},
        "regnet_y_16gf": {"trunk_output.block4.block4-0.f.c.0.weight": (3024, 3024, 1, 1)},
    }
    deeper = {"resnet18": "layer1.2.conv1.weight", "resnet20": "layer1.3.conv1.weight"}
    deeper["resnet50"] = "layer3.6.conv1.weight"
    for arch, shapes in stages.items():
        if all(name in tensors and tensors[name].shape == shape for name, shape in shapes.items()):
            return None if deeper.get(arch) in tensors else cast(Arch, arch)
    return None


def _contents(file: Path) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """Return all tensors in a file under dotted names, its metadata, and whether deitfast wrote it."""
    if file.suffix == ".safetensors":
        tensors, metadata = _safetensors(file)
        return tensors, metadata, "deitfast" in metadata
    tree = _torch_file(file)
    return flatten(tree), {}, checkpoint.is_ours(tree)


def _safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a .safetensors file's tensors and metadata."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        raise UserError(
            f"{file} is not a whole .safetensors file",
            found=str(error),
            remedy="copy it again from where it is whole",
        ) from None


def _torch_file(file: Path) -> dict[Any, Any]:
    """Return what torch.save wrote, as far as it is data."""
    try:
        with torch.serialization.safe_globals([Namespace]):  # the reference keeps its options next to the weights
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
