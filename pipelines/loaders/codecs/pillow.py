"""The reference loader's codec: PIL, slow and right. Tests compare the other loaders' pixels with its."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError


class PillowCodec:
    """PIL's decoder and its resize, "bicubic" or "bilinear"."""

    def __init__(self, interpolation: str = "bicubic") -> None:
        self._filter = Image.Resampling[interpolation.upper()]

    def decode(self, data: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Decode the whole JPEG and cut the window out; see `host.Codec`."""
        try:
            image = Image.open(io.BytesIO(data.tobytes()))
            return np.asarray(image.convert("RGB").crop((left, top, left + width, top + height)))
        except UnidentifiedImageError as error:
            raise ValueError("no image that PIL knows") from error

    def resize(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """Resize, width first, then height.

        Pillow before 13 always took this order; since 13 it starts with the height where that is less work, and
        the pixels between the passes are rounded, so that the result differs by up to .3/255 (on average, in one
        image). Two calls of one pass each give DeiT's pixels with every Pillow.
        """
        height, width = out.shape[:2]
        image = Image.fromarray(np.ascontiguousarray(pixels))
        image = image.resize((width, image.height), self._filter)
        out[:] = np.asarray(image.resize((width, height), self._filter))
