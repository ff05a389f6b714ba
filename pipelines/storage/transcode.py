"""From one image as it was found to one sample of a dataset: passed through, re-encoded as JPEG, or raw.

JPEGs that every loader's decoder reads alike (8-bit, three components, Huffman-coded; see `decoders`) pass through byte
for byte, unless max_side or quality ask for less. Everything else becomes RGB as `convert("RGB")` makes it, which is
what torchvision's ImageFolder feeds to a model; EXIF orientation is ignored, as Pillow and FFCV ignore it.
"""

import io
import math
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from pipelines.errors import UserError
from pipelines.storage.decoders import objection
from pipelines.storage.image_kinds import Kind, image_attributes
from pipelines.storage.jpeg import HUFFMAN_FRAMES, read_frame
from pipelines.storage.reader import JPEG, RAW

RAW_SIDE = 128
"""Images that were not JPEG and are no longer than this on either side are stored raw."""
FORCED_QUALITY = 95
"""JPEG quality, at full chroma resolution, of what must be re-encoded though no option asks for smaller files."""
FALLBACK_QUALITIES = (90, 80, 60, 40)
LONGEST_SIDE = 65500
"""What libjpeg can encode; the format itself ends at 65535."""
USUAL_PIXELS = 178_956_970
"""Pixels above which an image is refused, or shrunk where huge ones are allowed: Pillow's own limit against bombs, and
the most that nvImageCodec's libjpeg-turbo decodes, half a GiB of RGB (DALI then takes another decoder)."""
HUGE_PIXELS = 500_000_000
"""Pixels above which an image is refused in any case: Pillow takes 4 bytes a pixel, twice where it has to convert."""
BAND_PIXELS = 1 << 20
"""Gray pixels of more than 8 bits that are scaled at a time."""
_LIMIT = threading.Lock()
"""Held while Pillow's limit is lifted."""


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
        allow_huge: read images of more than USUAL_PIXELS, up to HUGE_PIXELS, and shrink them to USUAL_PIXELS; max_side
            reads them as well.
    """

    max_side: int = 0
    quality: int | None = None
    allow_huge: bool = False

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

    @property
    def max_pixels(self) -> int:
        """Pixels of the largest image that is read."""
        return HUGE_PIXELS if self.allow_huge or self.max_side else USUAL_PIXELS

    def shrunk_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (width, height) at which an image of this one is stored."""
        longest, shortest = max(size), min(size)
        most = min(longest, self.max_side or longest)
        if longest * shortest > USUAL_PIXELS:
            most = min(most, math.isqrt((USUAL_PIXELS - longest) * longest // shortest))
        width, height = (max(1, round(side * most / longest)) for side in size)
        return width, height

    def shrink(self, image: Image.Image) -> Image.Image:
        """Return the image at the size at which it is stored."""
        size = self.shrunk_size(image.size)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


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
    objection: str = ""
    """Why a JPEG that Pillow reads was not passed through: what another decoder says of it."""


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
        with open_image(content, image_formats()) as image:
            _check_pixels(image.size, codec)
            return _transcode(image, content, name, codec)
    except (BadImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError(f"not an image that Pillow reads (it starts with {content[:12]!r})") from None
    except Exception as error:  # on damaged files Pillow's plugins raise nearly anything
        raise BadImageError(str(error) or type(error).__name__) from None


def stored_size(data: bytes) -> tuple[int, int]:
    """Decode a stored JPEG sample and return its (height, width).

    Raises:
        BadImageError: it does not decode, or not alike in every loader.
    """
    try:
        with open_image(data, ("JPEG",)) as image:
            width, height = image.size
            _check_end(data)
            if reason := objection(data, np.asarray(image.convert("RGB"))):
                raise BadImageError(f"not every loader reads it: {reason}")
    except BadImageError:
        raise
    except Exception as error:  # as above
        raise BadImageError(str(error) or type(error).__name__) from None
    return height, width


def open_image(data: bytes | memoryview, formats: tuple[str, ...]) -> Image.Image:
    """Open an image of any size; Pillow's own limit is lifted meanwhile. Raises whatever Pillow raises."""
    with _LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = before


@cache
def image_formats() -> tuple[str, ...]:
    """Return what Pillow is asked to read: all that `image_folder` takes for images. AVIF came with Pillow 11.3."""
    Image.init()
    wanted = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF")
    return tuple(name for name in wanted if name in Image.OPEN)


def _check_pixels(size: tuple[int, int], codec: EncodeOptions) -> None:
    """Refuse an image too large to be read in the memory that is allowed. Raises BadImageError."""
    if size[0] * size[1] > codec.max_pixels:
        more = f"; `deitfast convert` with --max-side or --allow-huge reads up to {HUGE_PIXELS:,}"
        remedy = "" if codec.max_pixels == HUGE_PIXELS else more
        raise BadImageError(f"{size[0]:,} x {size[1]:,} pixels; at most {codec.max_pixels:,} are read{remedy}")


def _transcode(image: Image.Image, content: bytes, name: str, codec: EncodeOptions) -> EncodedImage:
    kind = image_attributes(image, name)
    if image.format not in ("JPEG", "MPO"):  # MPO: a JPEG with further ones behind it
        image.load()
        rgb, more = _to_rgb(image, kind)
        return _store(rgb, kind | more, codec, lossless=True)
    size, shrunk = image.size, codec.shrunk_size(image.size)
    passable = image.mode == "RGB" and read_frame(content).marker in HUFFMAN_FRAMES
    as_it_is = codec.quality is None and shrunk == size
    _check_end(content)
    if size[0] * size[1] > USUAL_PIXELS:
        image.draft(None, (2 * shrunk[0], 2 * shrunk[1]))  # decoded smaller: a 64th of the memory at best
    image.load()
    if image.mode == "L" and as_it_is:
        return _encoded_image(JPEG, size, _gray_to_rgb(image), kind | Kind.REENCODED)
    reason = ""
    if passable and shrunk == size and (reason := objection(content, np.asarray(image))):
        passable, kind = False, kind | Kind.DISPUTED
    if passable and as_it_is:
        return _encoded_image(JPEG, size, content, kind | Kind.PASSED)
    sample = _store(_to_rgb(image, kind)[0], kind, codec, lossless=False)
    if passable and shrunk == size and len(sample.data) >= len(content):
        return _encoded_image(JPEG, size, content, kind | Kind.PASSED)
    return replace(_undisputed(image, sample, codec) if reason else sample, objection=reason)


def _undisputed(image: Image.Image, sample: EncodedImage, codec: EncodeOptions) -> EncodedImage:
    """Return a re-encoded JPEG at the first quality that every decoder reads alike: noise needs less than 95.

    Raises:
        BadImageError: there is none, and the image is too large to be stored raw.
    """
    rgb = image.convert("RGB")
    for quality in (None, *(q for q in FALLBACK_QUALITIES if q < (codec.quality or FORCED_QUALITY))):
        if quality is not None:
            sample = _store(rgb, sample.kind, replace(codec, quality=quality), lossless=False)
        with open_image(sample.data, ("JPEG",)) as written:
            if not objection(sample.data, np.asarray(written)):
                return sample
    sample = _store(rgb, sample.kind & ~Kind.REENCODED, codec, lossless=True)
    if sample.mode != RAW:
        raise BadImageError("damage or noise of which no JPEG is read alike by every decoder")
    return sample


def _store(image: Image.Image, kind: Kind, codec: EncodeOptions, *, lossless: bool) -> EncodedImage:
    """Shrink an RGB image if asked and store it: raw if it is small and was lossless, else as JPEG."""
    shrunk = codec.shrink(image)
    if shrunk is not image:
        kind |= Kind.SHRUNK
    if max(shrunk.size) > LONGEST_SIDE:
        found = f"a side of {max(shrunk.size)} pixels"
        raise BadImageError(f"{found}; at most {LONGEST_SIDE} can be stored; --max-side shrinks it")
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


def _to_rgb(image: Image.Image, kind: Kind) -> tuple[Image.Image, Kind]:
    """Return the pixels as 8-bit RGB, and what only they could tell of the image.

    Integers of more than 8 bits are scaled by 255 / white (Pillow would clip them), white being what REMARKS says;
    where the file states its range (16-bit PGM) it is 65535.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        white, more = _white(image, kind)
        gray = np.empty((image.height, image.width), np.uint8)
        for rows, pixels in _bands(image):
            whole = pixels.dtype == np.int64
            gray[rows] = (pixels * 255 + white // 2) // white if whole else np.rint(pixels * (255 / white))
        return Image.fromarray(gray).convert("RGB"), more
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    narrow = kind & Kind.DEEP and np.asarray(rgb).max() < 16  # Pillow kept the upper 8 bits
    return rgb, Kind.NARROW if narrow else Kind(0)


def _white(image: Image.Image, kind: Kind) -> tuple[int, Kind]:
    """Return the value of a gray image that becomes 255, and NARROW where few bits are used."""
    extremes = []
    for _, pixels in _bands(image):
        if not np.isfinite(pixels).all():
            raise BadImageError("floating-point pixels that are not finite")
        extremes += [pixels.min(), pixels.max()]
    low, high, floats = min(extremes), max(extremes), image.mode == "F"
    allowed = (1, 255) if floats else (65535,) if image.format == "PPM" else (255, 4095, 65535)
    if low < 0 or high > allowed[-1]:
        what = "floating-point" if floats else "integer"
        raise BadImageError(f"{what} pixels from {low:g} to {high:g}; 0 to {allowed[-1]} can be converted")
    white = next(value for value in allowed if high <= value)
    narrow = not floats and white < 65535 and not kind & Kind.LONG
    return white, Kind.NARROW if narrow else Kind(0)


def _bands(image: Image.Image) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield a gray image's pixels, some rows after another: int64 or float64 of all would take 4 GB of a huge one."""
    step = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        pixels = np.asarray(image.crop((0, top, image.width, bottom)))
        yield slice(top, bottom), pixels.astype(np.float64 if pixels.dtype.kind == "f" else np.int64)


def _check_end(content: bytes) -> None:
    """Refuse a JPEG without its end marker: cut inside the last rows, Pillow would let it pass.

    Inside compressed data FF is always followed by 00 or a restart marker, so FF D9 is the end wherever it stands.
    """
    if content.find(b"\xff\xd9", read_frame(content).scan) < 0:
        raise BadImageError("the JPEG stops before its end marker")
