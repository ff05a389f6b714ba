"""Photographs, drawn, and a split, in either format, of exactly the given bytes."""

import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.storage.formats.beton_writer import RECORD
from pipelines.storage.formats.format import beton, shards
from pipelines.storage.image_kinds import Kind
from pipelines.storage.reader import Reader
from pipelines.storage.transcode import EncodedImage
from tools.parity.pictures import photograph


def photo(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Draw something with the spectrum of a photograph."""
    return Image.fromarray(photograph(rng, height, width))


def jpeg(image: Image.Image, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def write_split(path: Path, images: list[tuple[Image.Image, bytes | None]], shard_size: int = 30_000) -> Reader:
    """Write (image, its JPEG, or None to store it raw) with label 100 + index, in the format of the path's suffix."""
    form = {".beton": beton(), ".wds": shards(shard_size)}[path.suffix]
    writer = form.writer(path, [], np.zeros(0, RECORD))
    records = np.zeros(len(images), RECORD)
    for position, index in enumerate(form.order(len(images)).tolist()):
        image, encoded = images[index]
        data, mode = (encoded, 0) if encoded is not None else (image.tobytes(), 1)
        sample = form.stored(EncodedImage(mode, image.width, image.height, data, zlib.crc32(data), Kind(0)))
        place = writer.append(sample, 100 + index)
        records[position] = (
            True,
            mode,
            0,
            image.width,
            image.height,
            100 + index,
            sample.crc32,
            len(sample.data),
            place,
        )
    writer.finish(records)
    writer.close()
    return form.reader(path)
