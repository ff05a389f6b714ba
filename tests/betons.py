"""Photographs, drawn, and a .beton file of exactly the given bytes."""

import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from oracle.pictures import photograph
from pipelines.storage.beton import BetonReader
from pipelines.storage.writer import RECORD, BetonWriter


def photo(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Draw something with the spectrum of a photograph."""
    return Image.fromarray(photograph(rng, height, width))


def jpeg(image: Image.Image, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def write_beton(path: Path, images: list[tuple[Image.Image, bytes | None]]) -> BetonReader:
    """Write (image, its JPEG, or None to store it raw) with label 100 + index."""
    writer = BetonWriter(path, len(images), 1, np.zeros(0, RECORD))
    records = np.zeros(len(images), RECORD)
    for index, (image, encoded) in enumerate(images):
        data, mode = (encoded, 0) if encoded is not None else (image.tobytes(), 1)
        offset = writer.append(data)
        records[index] = (
            *(True, mode, 0, image.width, image.height),
            *(100 + index, zlib.crc32(data), len(data), offset),
        )
    writer.finish(records)
    writer.close()
    return BetonReader(path)
