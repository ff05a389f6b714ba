"""Teachers: a trained run, a file of weights, or a pretrained classifier of torchvision's or timm's."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deitfast.config.recipe import DistillSpec, Recipe
from deitfast.models.class_names import match_classes
from deitfast.models.vit import joint
from deitfast.runtime import Runtime
from deitfast.weights.load import describe_input, load_model
from deitfast.weights.zoo import is_zoo_model, load_zoo_model
from pipelines.errors import DeitfastError, UserError

log = logging.getLogger("deitfast")


FINGERPRINT = ("network", "digest", "size", "mean", "std", "class_index")
"""What a teacher's targets depend on."""


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher's network and how images are fed to it."""

    network: str
    """Name of its architecture."""
    model: nn.Module
    """In evaluation mode, on the CPU; gives a tuple of heads."""
    size: int
    """Side of its input in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_index: tuple[int, ...]
    """Index of its output for each of the data set's classes."""
    identity_mapping: bool
    """Whether the classes are all its outputs, in that order."""

    def fingerprint(self) -> dict[str, Any]:
        """Return what its targets depend on, for a cache's manifest: teacher.network, ... (FINGERPRINT)."""
        index = "identity"
        if not self.identity_mapping:
            index = hashlib.blake2b(repr(self.class_index).encode()).hexdigest()[:16]
        values = (self.network, self._digest(), self.size, self.mean, self.std, index)
        return {f"teacher.{name}": value for name, value in zip(FINGERPRINT, values, strict=True)}

    def _digest(self) -> str:
        """Return 16 hex digits of blake2b over names, shapes, types and bytes of all weights and statistics."""
        digest = hashlib.blake2b(digest_size=8)
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def load_teacher(spec: DistillSpec, classes: tuple[str, ...]) -> LoadedTeacher:
    """Load the teacher that a recipe names, for a data set of `classes`, on the CPU.

    Raises:
        UserError: there is none of that name, or it does not know the classes.
        DeitfastError: its weights are damaged, or cannot be fetched.
    """
    name, path, owner = spec.teacher, Path(spec.teacher), f"teacher {spec.teacher}"
    if is_zoo_model(name) and not path.exists():
        zoo = load_zoo_model(name, Path(spec.teacher_weights) if spec.teacher_weights else None)
        match = match_classes(owner, zoo.classes, zoo.num_classes, classes, assume_order=spec.assume_class_order)
        log.info("%s: %d px, mean %s, std %s; classes %s", owner, zoo.size, zoo.mean, zoo.std, match)
        return LoadedTeacher(name, zoo.model, zoo.size, zoo.mean, zoo.std, match.index, match.is_identity)
    if spec.teacher_weights:
        raise UserError(
            f"--teacher-weights requires a network of torchvision's or timm's as --teacher, which is {name!r}",
            remedy="give the weights file itself as --teacher",
        )
    if not name or not path.exists():
        raise UserError(
            f"teacher {name!r} not found" if name else "no teacher is given",
            expected="a run folder, a weights file, a torchvision network (regnet_y_16gf, ...) or timm/NAME",
        )
    trained = load_model(path, torch.device("cpu"), which=spec.teacher_checkpoint)
    own = trained.recipe.augment
    match = match_classes(owner, trained.classes, trained.num_classes, classes, assume_order=spec.assume_class_order)
    log.info("%s (%s): %s; %s", owner, trained.weights, describe_input(trained), match)
    arch = trained.recipe.model.arch
    return LoadedTeacher(arch, trained.model, own.size, own.mean, own.std, match.index, match.is_identity)


class Teacher:
    """A frozen model in evaluation mode, on the device.

    The student's input is cropped, augmented, erased and mixed once; where the teacher was trained on another size or
    normalization, that same tensor is resized and normalized over for it.
    """

    def __init__(self, loaded: LoadedTeacher, recipe: Recipe, runtime: Runtime) -> None:
        """Take the loaded network to the device, for students of `recipe`."""
        student, device = recipe.augment, runtime.device
        self.model = loaded.model.to(device).to(memory_format=torch.channels_last)  # pyright: ignore
        self.network, self.size, self._runtime = loaded.network, loaded.size, runtime
        # own normalization of student pixels x: (x * std + mean - own mean) / own std
        to = {"device": device, "dtype": torch.float32}
        std = torch.tensor(loaded.std, **to)
        self._scale = (torch.tensor(student.std, **to) / std).view(1, 3, 1, 1)
        self._shift = ((torch.tensor(student.mean, **to) - torch.tensor(loaded.mean, **to)) / std).view(1, 3, 1, 1)
        self._normalized_alike = (tuple(loaded.mean), tuple(loaded.std)) == (tuple(student.mean), tuple(student.std))
        self._class_index = None if loaded.identity_mapping else torch.tensor(loaded.class_index, device=device)
        self._views, self._not_finite = 0, torch.zeros((), dtype=torch.int64, device=device)
        if runtime.compile:
            # each batch size by itself: a spot check's, smaller than training's, must not make them all dynamic
            self.model.compile(dynamic=False)

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Return float32 [B, C], in the order of the data set's classes, for normalized pixels [B, 3, S, S]."""
        if not self._normalized_alike:
            pixels = (pixels.float() * self._scale + self._shift).to(pixels.dtype)
        if pixels.shape[-1] != self.size:
            # in half precision torch's antialiased resize does not exist on a CPU, and rounds its weights on a GPU
            resized = F.interpolate(pixels.float(), size=self.size, mode="bicubic", antialias=True)
            pixels = resized.to(pixels.dtype)
        with self._runtime.autocast():
            logits = joint(self.model(pixels)).float()
        if self._class_index is not None:
            logits = logits.index_select(1, self._class_index)
        self._views += len(logits)
        self._not_finite += (~logits.isfinite()).any(1).sum()  # on the device: nothing waits for it here
        return logits

    def require_finite(self) -> None:
        """Check all logits since the last time. Waits for the device.

        Raises:
            DeitfastError: some were NaN or infinite.
        """
        views, count = self._views, int(self._not_finite)
        self._views = 0
        self._not_finite.zero_()
        if count:
            raise DeitfastError(
                f"the logits of teacher {self.network} are not finite",
                expected="finite logits for every view",
                found=f"NaN or infinity for {count:,} of the last {views:,} views, in {self._runtime.precision}",
                remedy="evaluate it (deitfast eval) to see whether its weights are sound; if they are, its numbers "
                "overflow half precision: --set train.amp=off",
            )
