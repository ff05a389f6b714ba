"""From one image as it was found to one sample of a dataset: passed through, re-encoded as JPEG, or raw.

JPEGs that every decoder here reads (8-bit, three components, Huffman-coded) pass through byte for byte, unless
max_side or quality ask for less. Everything else becomes RGB as `convert("RGB")` makes it, which is what torchvision's
ImageFolder feeds to a model; EXIF orientation is ignored, as Pillow and FFCV ignore it.
"""

import io
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import numpy as np
from PIL import Image

from pipelines.errors import UserError
from pipelines.storage.jpeg import HUFFMAN_FRAMES, read_frame
from pipelines.storage.reader import JPEG, RAW

RAW_SIDE = 128
"""Images that were not JPEG and are no longer than this on either side are stored raw."""
FORCED_QUALITY = 95
"""JPEG quality, at full chroma resolution, of what must be re-encoded though nobody asked for smaller files."""
LONGEST_SIDE = 65500
"""What libjpeg can encode; the format itself ends at 65535."""
Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF")
    if name in Image.OPEN
)
"""What Pillow is asked to read: all that `source_tree` takes for images. AVIF came with Pillow 11.3."""
ORIENTATION = 0x0112  # EXIF tag


class Kind(IntFlag):
    """What was done to an image (one of the first three) and what was special about it."""

    PASSED = 1
    REENCODED = 2
    RAW = 4
    SHRUNK = 8
    GRAY = 16
    CMYK = 32
    DEEP = 64
    PALETTE = 128
    ALPHA = 256
    ROTATED = 512
    MISNAMED = 1024
    FRAMES = 2048


KIND_NAMES = {
    Kind.PASSED: "passed through",
    Kind.REENCODED: "re-encoded",
    Kind.RAW: "stored raw",
    Kind.SHRUNK: "shrunk",
    Kind.GRAY: "gray",
    Kind.CMYK: "CMYK",
    Kind.DEEP: "16-bit",
    Kind.PALETTE: "palette",
    Kind.ALPHA: "transparent",
    Kind.ROTATED: "EXIF-rotated",
    Kind.MISNAMED: "named JPEG but not one",
    Kind.FRAMES: "first of several frames",
}
"""How `DatasetSpec` and the summary call them."""


class BadImageError(Exception):
    """The file is not a whole image; the text says why, without naming it."""


@dataclass(frozen=True)
class EncodeOptions:
    """How images are stored.

    Args:
        max_side: longer images are shrunk to this longest side in pixels, with Pillow's antialiased bicubic, the
            filter that the recipe resizes with; 0 shrinks nothing.
        quality: JPEG quality. None: 95, and only where an image must be re-encoded. Given: every JPEG is re-encoded,
            and the original kept where that is no smaller.
    """

    max_side: int = 0
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.max_side != 0 and not 16 <= self.max_side <= LONGEST_SIDE:
            raise UserError(
                "max_side is out of range", expected=f"16 to {LONGEST_SIDE}, or 0", found=str(self.max_side)
            )
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError("quality is out of range", expected="1 to 100", found=str(self.quality))

    def encode(self, image: Image.Image) -> bytes:
        """Return an RGB image as JPEG: 4:2:0 as photographs usually are where smaller files were asked for."""
        smaller = self.max_side > 0 or self.quality is not None
        return _save(image, quality=self.quality or FORCED_QUALITY, subsampling="4:2:0" if smaller else "4:4:4")

    def shrinks(self, size: tuple[int, int]) -> bool:
        """Return whether an image of this (width, height) is too long."""
        return 0 < self.max_side < max(size)

    def shrink(self, image: Image.Image) -> Image.Image:
        """Return the image with its longest side at max_side at most."""
        if not self.shrinks(image.size):
            return image
        longest = max(image.size)
        width, height = (max(1, round(side * self.max_side / longest)) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class EncodedImage:
    """One image as it goes into the dataset."""

    mode: int
    """JPEG or RAW."""
    width: int
    height: int
    data: bytes
    crc32: int
    kind: Kind


def transcode(content: bytes | np.ndarray, name: str, codec: EncodeOptions) -> EncodedImage:
    """Turn a file's bytes, or pixels uint8 [H, W, 3], into a sample, having decoded all of it.

    Raises:
        BadImageError: empty, cut short, not an image, or an image that cannot be stored.
    """
    if isinstance(content, np.ndarray):
        if content.dtype != np.uint8 or content.ndim != 3 or content.shape[2] != 3 or content.size == 0:
            raise BadImageError(f"pixels of type {content.dtype} and shape {content.shape} instead of uint8 [H, W, 3]")
        return _store(Image.fromarray(content), Kind(0), codec, lossless=True)
    if not content:
        raise BadImageError("the file is empty")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return _transcode(image, content, name, codec)
    except (BadImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError(f"not an image that Pillow reads (it starts with {content[:12]!r})") from None
    except Exception as error:  # on damaged files Pillow's plugins raise nearly anything
        raise BadImageError(str(error) or type(error).__name__) from None


def stored_size(data: bytes) -> tuple[int, int]:
    """Decode a stored JPEG sample and return its (height, width). Raises BadImageError."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            width, height = image.size
            _check_decodes(image, data)
    except BadImageError:
        raise
    except Exception as error:  # as above
        raise BadImageError(str(error) or type(error).__name__) from None
    return height, width


def count_kinds(kinds: np.ndarray) -> dict[str, int]:
    """Count the names of Kind over uint16 [n], leaving out zeros."""
    counts = {name: int(np.count_nonzero(kinds & kind)) for kind, name in KIND_NAMES.items()}
    return {name: count for name, count in counts.items() if count}


def _transcode(image: Image.Image, content: bytes, name: str, codec: EncodeOptions) -> EncodedImage:
    kind = _image_attributes(image, name)
    if image.format not in ("JPEG", "MPO"):  # MPO: a JPEG with further ones behind it
        image.load()
        return _store(_to_rgb(image), kind, codec, lossless=True)
    size = image.size
    passable = image.mode == "RGB" and read_frame(content).marker in HUFFMAN_FRAMES
    as_it_is = codec.quality is None and not codec.shrinks(size)
    if passable and as_it_is:
        _check_decodes(image, content)
        return _encoded_image(JPEG, size, content, kind | Kind.PASSED)
    _check_end(content)
    image.load()
    if image.mode == "L" and as_it_is:
        return _encoded_image(JPEG, size, _gray_to_rgb(image), kind | Kind.REENCODED)
    sample = _store(_to_rgb(image), kind, codec, lossless=False)
    if passable and (sample.width, sample.height) == size and len(sample.data) >= len(content):
        return _encoded_image(JPEG, size, content, kind | Kind.PASSED)
    return sample


def _store(image: Image.Image, kind: Kind, codec: EncodeOptions, *, lossless: bool) -> EncodedImage:
    """Shrink an RGB image if asked and store it: raw if it is small and was lossless, else as JPEG."""
    shrunk = codec.shrink(image)
    if shrunk is not image:
        kind |= Kind.SHRUNK
    if max(shrunk.size) > LONGEST_SIDE:
        raise BadImageError(f"a side of {max(shrunk.size)} pixels; at most {LONGEST_SIDE} can be stored")
    if lossless and max(shrunk.size) <= RAW_SIDE:
        return _encoded_image(RAW, shrunk.size, shrunk.tobytes(), kind | Kind.RAW)
    return _encoded_image(JPEG, shrunk.size, codec.encode(shrunk), kind | Kind.REENCODED)


def _encoded_image(mode: int, size: tuple[int, int], data: bytes, kind: Kind) -> EncodedImage:
    return EncodedImage(mode, size[0], size[1], data, zlib.crc32(data), kind)


def _save(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _gray_to_rgb(image: Any) -> bytes:
    """Return a gray JPEG as a color one: its luma requantized by its own table, which changes next to nothing."""
    table = image.quantization[image.layer[0][3]]
    return _save(image.convert("RGB"), qtables=[table], subsampling="4:2:0")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the pixels as 8-bit RGB, 16-bit grays scaled by 255 / 65535 (Pillow would clip them)."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise BadImageError(f"integer pixels from {pixels.min()} to {pixels.max()}; 0 to 65535 can be converted")
        image = Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise BadImageError("floating-point pixels, which have no white")
    return image if image.mode == "RGB" else image.convert("RGB")


def _image_attributes(image: Image.Image, name: str) -> Kind:
    """Return what is special about an image, from its header."""
    kind = Kind(0)
    mode = image.mode
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        kind |= Kind.GRAY
    if mode == "CMYK":
        kind |= Kind.CMYK
    if mode.startswith("I") or any(str(raw)[-4:-1] == ";16" for raw in _raw_modes(image)):
        kind |= Kind.DEEP
    if mode in ("P", "PA"):
        kind |= Kind.PALETTE
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        kind |= Kind.ALPHA
    if "exif" in image.info and _orientation(image) in range(2, 9):
        kind |= Kind.ROTATED
    if image.format not in ("JPEG", "MPO") and name.lower().endswith((".jpg", ".jpeg")):
        kind |= Kind.MISNAMED
    if image.format not in ("JPEG", "MPO") and _has_more_frames(image):
        kind |= Kind.FRAMES
    return kind


def _raw_modes(image: Any) -> Iterable[object]:
    """Return the decoder's arguments of each tile: Pillow names the file's own depth nowhere else."""
    for _, _, _, arguments in image.tile:
        yield arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")


def _has_more_frames(image: Image.Image) -> bool:
    """Say whether there are further frames, or pages of a TIFF."""
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # the second one is damaged, which is no reason to refuse the first
        return True


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF is no reason to refuse an image whose orientation nobody uses
        return None


def _check_decodes(image: Image.Image, content: bytes) -> None:
    """Decode all of a JPEG's coefficients, at an eighth of its size: 1.4 times as fast, and nothing else could fail.

    Every cut is found. Bits flipped inside the compressed data, or an end marker added after a cut, mostly are not:
    libjpeg only warns of them, and Pillow does not pass its warnings on.
    """
    _check_end(content)
    image.draft("L", (1, 1))
    image.load()


def _check_end(content: bytes) -> None:
    """Refuse a JPEG without its end marker: cut inside the last rows, Pillow would let it pass.

    Inside compressed data FF is always followed by 00 or a restart marker, so FF D9 is the end wherever it stands.
    """
    if content.find(b"\xff\xd9", read_frame(content).scan) < 0:
        raise BadImageError("the JPEG stops before its end marker")
