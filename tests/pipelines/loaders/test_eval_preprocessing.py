"""Evaluation as other programs write it down: pixels are those of torchvision's transforms on the same images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from pipelines.spec import AugmentSpec
from pipelines.storage.reader import RAW, Reader
from tests.helpers.loader_contract import open_eval

TOLERANCE = {"reference": 0.05, "resident": 0.05, "cpu": 0.1, "dali": 0.5}
"""Mean absolute difference allowed, in levels of 255; Pillow 13 may resize the height first, which rounds otherwise."""


def image_of(reader: Reader, sample: int) -> Image.Image:
    data = reader.sample(sample)
    if reader.modes[sample] == RAW:
        return Image.fromarray(data.reshape(reader.heights[sample], reader.widths[sample], 3))
    return Image.open(io.BytesIO(data.tobytes())).convert("RGB")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shorter", "squash"])
@pytest.mark.parametrize("name", TOLERANCE)
def test_resizing_and_cropping_are_torchvisions(
    name: str, resize: str, interpolation: str, photos: Reader, small: Reader
) -> None:
    reader = small if name == "resident" else photos
    spec = AugmentSpec(size=24, eval_crop=0.75, eval_resize=resize, eval_interpolation=interpolation)
    theirs = transforms.Compose(
        [
            transforms.Resize((32, 32) if resize == "squash" else 32, InterpolationMode(interpolation)),
            transforms.CenterCrop(24),
        ]
    )
    if name == "resident":  # of 32 px, which 32 would leave as they are
        spec = AugmentSpec(size=24, eval_crop=24 / 40, eval_resize=resize, eval_interpolation=interpolation)
        theirs.transforms[0] = transforms.Resize((40, 40), InterpolationMode(interpolation))
    differences = []
    for batch in open_eval(name, reader, spec).epoch(0):
        for row in np.flatnonzero(batch.valid):
            expected = torch.from_numpy(np.asarray(theirs(image_of(reader, int(batch.params.sample[row])))).copy())
            differences.append((batch.images[row].float() - expected.float()).abs().mean())
    assert len(differences) == reader.num_samples
    assert max(differences) <= 0.25 + 3 * TOLERANCE[name]
    assert torch.stack(differences).mean() <= TOLERANCE[name]
