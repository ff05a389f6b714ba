"""The teacher in the loop: a trained run that looks at the very tensor the student sees."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.model import joint
from deitfast.recipe import Recipe
from deitfast.runtime import Runtime
from deitfast.trained import load_run
from pipelines.errors import Mistake


class Teacher:
    """A frozen model in evaluation mode.

    The student's input is cropped, augmented, erased and mixed once; where the teacher was trained on another size or
    normalisation, that same tensor is resized and normalised over for it.
    """

    def __init__(self, recipe: Recipe, classes: tuple[str, ...], runtime: Runtime) -> None:
        """Load the teacher that the student's `recipe` names.

        Raises:
            Mistake: there is no run, or it was trained on other classes than `classes`.
        """
        folder, student = Path(recipe.distill.teacher), recipe.augment
        trained = load_run(folder, runtime.device)
        require_classes(f"teacher {folder}", trained.classes, classes)
        self.model = trained.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.runtime, self.mode = runtime, recipe.distill.mode
        own = trained.recipe.augment
        self.size = own.size
        # own normalisation of student pixels x: (x * std + mean - own mean) / own std
        to = {"device": runtime.device, "dtype": torch.float32}
        std = torch.tensor(own.std, **to)
        self.scale = (torch.tensor(student.std, **to) / std).view(1, 3, 1, 1)
        self.shift = ((torch.tensor(student.mean, **to) - torch.tensor(own.mean, **to)) / std).view(1, 3, 1, 1)
        self.same = own.mean == student.mean and own.std == student.std
        if runtime.compile:
            self.model.compile()

    @torch.no_grad()
    def targets(self, pixels: Tensor) -> Tensor:
        """Return what the student is to learn for normalised pixels [B, 3, S, S].

        Returns:
            hard: int64 [B], the teacher's labels; soft: float32 [B, C], its logits.
        """
        if not self.same:
            pixels = (pixels.float() * self.scale + self.shift).to(pixels.dtype)
        if pixels.shape[-1] != self.size:
            pixels = F.interpolate(pixels, size=self.size, mode="bicubic", antialias=True)
        with self.runtime.autocast():
            logits = joint(self.model(pixels)).float()
        return logits.argmax(-1) if self.mode == "hard" else logits


def require_classes(owner: str, found: tuple[str, ...], expected: tuple[str, ...]) -> None:
    """Check that a model's classes are the data set's, in the same order.

    Raises:
        Mistake: they are not; the message names the first difference.
    """
    if found == expected:
        return
    if len(found) != len(expected):
        what = (f"{len(expected)} classes", f"{len(found)}")
    else:
        first = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        what = (f"class {first} to be {expected[first]}", found[first])
    raise Mistake(
        f"{owner} was trained on other classes than this data set has",
        expected=what[0],
        found=what[1],
        remedy="take a model that was trained on the same classes",
    )
