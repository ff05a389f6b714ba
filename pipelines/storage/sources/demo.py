"""The demo data set: ten classes of small JPEGs, drawn by the program as they are read.

Six classes are shapes (cross, disc, ring, square, star, triangle) somewhere on a cluttered ground, four are textures
(checks, dots, stripes, waves). Colors, size, place, turn, light, clutter and noise are drawn and say nothing about the
class, so a model has to learn what things look like. Each image is a function of (seed, split, index). One training
image in five has a wrong label, no validation image has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from pipelines.storage.entry import Entry
from pipelines.storage.sources.opened_source import OpenedSource

SIDES = (32, 64)
"""Smallest and largest side of an image in pixels; few are square."""
QUALITY = 90
TURN = 0.3
"""Largest turn of what is drawn, in radians. With any turn, DeiT-Ti got to 72 % in as many epochs, not to 92 %."""
SPLITS = ("train", "val")
WRONG = 5
"""Every so many tens of training images have wrong labels, as collections from the web have some. Without them a
teacher could tell no more than the labels do."""
Plane = np.ndarray
"""float32 [H, W]."""


def _disc(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - 0.9


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.hypot(x, y) - 0.75) - 0.2


def _square(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - 0.75


def _triangle(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x) * 0.866 + y * 0.5, -y) - 0.5


def _cross(x: Plane, y: Plane) -> Plane:
    bars = np.minimum(np.abs(x), np.abs(y)) - 0.22
    return np.maximum(bars, np.maximum(np.abs(x), np.abs(y)) - 0.95)


def _star(x: Plane, y: Plane) -> Plane:
    fifth = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, y) + fifth / 2) % fifth - fifth / 2)  # from the nearest tip, 0 to 36 degrees
    radius = np.hypot(x, y)
    across, along = radius * np.sin(angle), radius * np.cos(angle)
    return across * 0.84 + (along - 1.1) * 0.54  # the straight edge from a tip to the notch beside it


def _stripes(x: Plane, y: Plane) -> Plane:
    return np.sin(x)


def _waves(x: Plane, y: Plane) -> Plane:
    return np.sin(x + 1.6 * np.sin(y * 0.8))


def _checks(x: Plane, y: Plane) -> Plane:
    return np.sin(x * 0.8) * np.sin(y * 0.8) * 1.5


def _dots(x: Plane, y: Plane) -> Plane:
    return np.hypot((x + np.pi) % (2 * np.pi) - np.pi, (y + np.pi) % (2 * np.pi) - np.pi) - 1.9


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "cross": _cross, "disc": _disc, "ring": _ring, "square": _square, "star": _star, "triangle": _triangle,
}  # fmt: skip
"""Negative inside, in units of the shape's radius; the gradient's length is about one."""
TEXTURES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "checks": _checks, "dots": _dots, "stripes": _stripes, "waves": _waves,
}  # fmt: skip
"""Negative in one color, positive in the other; the period is about 2 pi."""
CLASSES = tuple(sorted(SHAPES | TEXTURES))


@dataclass(frozen=True, slots=True)
class Drawing:
    """An image of the demo set, before it is drawn."""

    seed: int
    split: int
    index: int
    shows: int
    """Index of the class that is drawn, which is not always the label."""

    def read(self) -> bytes:
        """Return the JPEG; equal bytes for equal values, with one version of Pillow."""
        pixels = draw(CLASSES[self.shows], np.random.default_rng((self.seed, self.split, self.index)))
        file = BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
        return file.getvalue()


def open_demo(train: int = 4000, val: int = 1000, seed: int = 0) -> OpenedSource:
    """Return the demo set with `train` and `val` images, the classes taking turns; nothing is drawn yet.

    An image depends on seed, split and its own index only: a larger set begins with the smaller one.
    """
    splits = {}
    for split, (name, number) in enumerate(zip(SPLITS, (train, val), strict=True)):
        splits[name] = []
        for index in range(number):
            shows = index % len(CLASSES)
            label = _filed_under(index) if name == "train" else shows
            path = f"{name}/{CLASSES[label]}/{index:06d}.jpg"
            splits[name].append(Entry(path, label, Drawing(seed, split, index, shows), 8192))
    return OpenedSource("demo", f"drawn by deitfast from seed {seed}", CLASSES, splits)


def _filed_under(index: int) -> int:
    """Return the label of a training image: of ten in a row, one of every class, all are right or all are wrong."""
    ten, shows = divmod(index, len(CLASSES))
    classes_off = 1 + ten // WRONG % (len(CLASSES) - 1) if ten % WRONG == WRONG - 1 else 0
    return (shows + classes_off) % len(CLASSES)


def draw(class_name: str, rng: np.random.Generator) -> np.ndarray:
    """Draw one image of a class: uint8 [H, W, 3], sides from SIDES."""
    height = int(rng.integers(SIDES[0], SIDES[1] + 1))
    width = int(np.clip(round(height * rng.uniform(0.85, 1.18)), *SIDES))
    side = min(height, width)
    paper, ink = _two_colors(rng)
    share = rng.uniform(0.1, 0.35)
    canvas = share * _ground(height, width, rng) + (1 - share) * paper
    if class_name in TEXTURES:
        scale = 2 * np.pi / (side * rng.uniform(0.24, 0.4))
        x, y = _turned(height, width, rng.uniform(0, 1, 2), scale, rng)
        inside = _coverage(TEXTURES[class_name](x, y) / scale)
    else:
        canvas = _clutter(canvas, rng)
        radius = side * rng.uniform(0.36, 0.46)
        margin = radius / np.array([height, width])
        x, y = _turned(height, width, rng.uniform(margin, 1 - margin), 1 / radius, rng)
        inside = _coverage(SHAPES[class_name](x, y) * radius)
    canvas += inside[..., None] * (ink - canvas)
    canvas += _light(height, width, rng)[..., None]
    canvas += rng.normal(0, rng.uniform(1, 5), canvas.shape)
    return canvas.clip(0, 255).astype(np.uint8)


def _turned(height: int, width: int, center: np.ndarray, scale: float, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Return coordinates about `center` (shares of height and width), turned at random, times `scale`."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    y, x = (y - center[0] * height) * scale, (x - center[1] * width) * scale
    turn = rng.uniform(-TURN, TURN)
    return x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)


def _coverage(distance: Plane) -> Plane:
    """Return how much of each pixel is inside, 0 to 1, given its distance from the edge in pixels (negative inside)."""
    return (0.5 - distance).clip(0, 1)


def _two_colors(rng: np.random.Generator) -> np.ndarray:
    """Return a dark and a light color in 0..255 that are easy to tell apart: float64 [2, 3]."""
    while True:
        colors = rng.uniform(10, 245, (2, 3))
        luma = colors @ (0.299, 0.587, 0.114)
        if luma[1] - luma[0] > 70:
            return colors


def _ground(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return soft patches of color: float64 [H, W, 3]."""
    coarse = rng.uniform(0, 255, (3, 3, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float64)


def _light(height: int, width: int, rng: np.random.Generator) -> Plane:
    """Return a slope of brightness across the image."""
    x, _ = _turned(height, width, np.array([0.5, 0.5]), 1 / max(height, width), rng)
    return x * rng.uniform(0, 40)


def _clutter(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scatter a few small specks and bars over the ground."""
    height, width, _ = canvas.shape
    for _ in range(rng.integers(0, 3)):
        x, y = _turned(height, width, rng.uniform(0, 1, 2), 1.0, rng)
        long, wide = rng.uniform(1, 5), rng.uniform(0.8, 2)
        inside = _coverage(np.maximum(np.abs(x) - long, np.abs(y) - wide)) * rng.uniform(0.3, 0.8)
        canvas = canvas + inside[..., None] * (rng.uniform(0, 255, 3) - canvas)
    return canvas
