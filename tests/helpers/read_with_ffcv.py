"""Reads .beton files with FFCV's own Loader, in a process of its own: FFCV and its compiled code leave warnings behind.

python read_with_ffcv.py OUTPUT.npz RAW.beton JPEG.beton
"""

import sys

import numpy as np
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption


def columns(path: str, decoder, os_cache: bool) -> dict[str, np.ndarray]:
    """Every sample's image and label, in order; copied out of FFCV's recycled memory."""
    loader = Loader(
        path, batch_size=6, num_workers=1, os_cache=os_cache, order=OrderOption.SEQUENTIAL, drop_last=False,
        pipelines={"image": [decoder], "label": [IntDecoder()]},
    )  # fmt: skip
    batches = [[np.array(column) for column in batch] for batch in loader]
    names = ("image", "label")
    return {name: np.concatenate(parts) for name, parts in zip(names, zip(*batches, strict=True), strict=True)}


if __name__ == "__main__":
    output, raw, jpeg = sys.argv[1:]
    found = {}
    for cache in ("os", "process"):
        for kind, path, decoder in (
            ("raw", raw, SimpleRGBImageDecoder()),
            ("jpeg", jpeg, CenterCropRGBImageDecoder((24, 24), 1.0)),
        ):
            for name, column in columns(path, decoder, cache == "os").items():
                found[f"{cache} {kind} {name}"] = column
    np.savez(output, **found)
