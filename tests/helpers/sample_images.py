"""Small drawn images in every shape that conversion has to deal with, and a source that holds them in memory."""

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.storage.entry import Entry, Source


@dataclass(frozen=True)
class MemorySource(Source):
    """Images held by the entries themselves: `where` is an encoded file, pixels, or an exception to raise."""

    kind: str = "folder"
    origin: str = "memory"
    classes: tuple[str, ...] = ("a", "b")
    splits: dict[str, list[Entry]] = field(default_factory=dict)

    def read(self, entry: Entry) -> bytes | np.ndarray:
        if isinstance(entry.where, Exception):
            raise entry.where
        return entry.where


def entries(
    contents: list, *, labels: list[int] | None = None, classes: int = 2, names: str = "{}.JPEG"
) -> list[Entry]:
    """Entries of these contents; without labels, classes take turns."""
    given = labels or [number % classes for number in range(len(contents))]
    sizes = [0 if isinstance(c, Exception) else c.nbytes if isinstance(c, np.ndarray) else len(c) for c in contents]
    numbered = zip(contents, given, sizes, strict=True)
    return [Entry(names.format(n), label, content, size) for n, (content, label, size) in enumerate(numbered)]


def drawn(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: smooth colors with some grain, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return np.clip(smooth + rng.integers(-6, 7, (height, width, 1)), 0, 255).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, form: str = "JPEG", **options) -> bytes:
    """Return an image as a file's bytes."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(height: int, width: int, seed: int = 0, **options) -> bytes:
    return encoded(drawn(height, width, seed), quality=options.pop("quality", 90), **options)


def rotated_jpeg(height: int, width: int, seed: int = 0, orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(height, width, seed, exif=exif.tobytes())


def pixels(data: bytes) -> np.ndarray:
    """Decode a file as torchvision's ImageFolder does: uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def odd_images() -> dict[str, bytes]:
    """One file of each kind by name."""
    rgb = Image.fromarray(drawn(67, 143, 5))
    deep = (np.arange(150 * 160).reshape(150, 160) * 2).astype(np.uint16)
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(drawn(67, 143, 6)[..., 0]))
    return {
        "color.JPEG": jpeg(101, 77, 1),
        "progressive.JPEG": jpeg(150, 133, 2, progressive=True),
        "full_chroma.JPEG": jpeg(55, 39, 3, subsampling=0),
        "rotated.JPEG": rotated_jpeg(40, 90, 4),
        "gray.JPEG": encoded(Image.fromarray(drawn(120, 91, 7)).convert("L"), quality=80),
        "cmyk.JPEG": encoded(rgb.convert("CMYK"), quality=90),
        "really_png.JPEG": encoded(drawn(140, 60, 8), "PNG"),
        "small.png": encoded(drawn(32, 32, 9), "PNG"),
        "small_gray.png": encoded(rgb.resize((30, 20)).convert("L"), "PNG"),
        "palette.png": encoded(rgb.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "alpha.png": encoded(alpha, "PNG"),
        "deep.png": encoded(Image.fromarray(deep), "PNG"),
        "bitmap.bmp": encoded(drawn(21, 34, 10), "BMP"),
    }


def mixed_source(odd: dict[str, bytes], copies: int = 3) -> MemorySource:
    contents = [content for _ in range(copies) for content in odd.values()] + [drawn(32, 32, 3)]
    splits = {"train": entries(contents), "val": entries(contents[:4])}
    return MemorySource(splits=splits)


def contents_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
