"""Every loader's crops against the reference loader's, and that against torchvision's crop and resize on PIL images."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional

from deitfast.bench.baseline_loaders import stored_image
from pipelines.batch import Batch
from pipelines.choices import LoaderName
from pipelines.loaders.factory import available, open_loader
from pipelines.rng.sampler import EvalSampler, SamplerSpec, TrainSampler
from pipelines.spec import AugmentSpec, LoaderSpec
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.dataset import Dataset
from pipelines.storage.entry import Entry, InMemory
from pipelines.storage.reader import Reader
from tools.parity.check import Check, absent, compare

pillow: Any = functional  # annotated for tensors; takes images as well
BICUBIC = functional.InterpolationMode.BICUBIC
SMALL = 32
ALLOWED = {"resident": 0.0, "dali": 0.3, "cpu": 0.1, "ffcv": 4.0}
"""Largest mean difference from `reference` in levels of 255; FFCV's own decoder and INTER_AREA are not PIL's."""
PIL_ALLOWED = 0.3
"""Pillow 13 may resize the height first where that is less work; the reference always takes the width first."""
EPOCHS = 3
BATCH = 8


def store(files: list[bytes], folder: Path) -> Reader:
    """Convert encoded images to a data set in `folder` and open it."""
    entries = [Entry(f"image {number}", 0, data, len(data)) for number, data in enumerate(files)]
    convert(InMemory("folder", "images to compare", ("image",), {"train": entries}), folder, ConvertOptions(workers=1))
    return Dataset.open(folder).split("train")


def shrunk(files: list[bytes]) -> list[bytes]:
    """Return the images as PNGs of 32 x 32 pixels, which are stored raw: what the resident loader takes."""
    small = []
    for data in files:
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB").resize((SMALL, SMALL), Image.Resampling.BICUBIC).save(buffer, "PNG")
        small.append(buffer.getvalue())
    return small


def loaders(reader: Reader, small: Reader, size: int) -> Iterator[Check]:
    """Compare loaders over training windows and evaluation's centers, of the images and of small copies."""
    spec = AugmentSpec(size=size, repeats=1, mix_group=2)
    padded = replace(spec, size=SMALL, crop="padded")
    for train, what in ((True, "random resized crops"), (False, "evaluation")):
        reference = batches("reference", reader, spec, train)
        ours = [batch.images.numpy()[batch.valid.numpy()] for batch in reference]
        theirs = [
            _torchvisions(reader, batch, row, size)
            for batch in reference
            for row in np.flatnonzero(batch.valid).tolist()
        ]
        yield compare(f"reference, {what}, against torchvision", ours, theirs, PIL_ALLOWED, by="mean")
    cases = [
        (reader, spec, True, "random resized crops"),
        (reader, spec, False, "evaluation"),
        (small, padded, True, "padded crops"),
    ]
    for name, reason in available().items():
        if name == "reference":
            continue
        if reason:
            yield absent(name, reason)
            continue
        for source, spec_, train, what in cases if name != "resident" else cases[2:]:
            ours, theirs = (
                [batch.images.numpy() for batch in batches(loader, source, spec_, train)]
                for loader in (name, "reference")
            )
            yield compare(f"{name}, {what}", ours, theirs, ALLOWED[name], by="mean")


def one_batch(reader: Reader, spec: AugmentSpec) -> Batch:
    """Return the reference loader's first training batch, of all images (but the last of an odd number)."""
    sampler = TrainSampler(
        SamplerSpec(
            samples=reader.num_samples,
            batch=reader.num_samples // 2 * 2,
            seed=spec.seed,
            repeats=spec.repeats,
            group=spec.mix_group,
        )
    )
    plan = LoaderSpec(name="reference")
    return next(iter(open_loader(reader, spec, plan, sampler, train=True, device=torch.device("cpu")).epoch(0)))


def batches(name: str, reader: Reader, spec: AugmentSpec, train: bool) -> list[Batch]:
    """Return a loader's batches: several epochs of training, or evaluation's one."""
    count = reader.num_samples
    if train:
        sampler = TrainSampler(
            SamplerSpec(
                samples=count,
                batch=min(BATCH, count // 2 * 2),
                seed=spec.seed,
                repeats=spec.repeats,
                group=spec.mix_group,
            )
        )
    else:
        sampler = EvalSampler(count, BATCH)
    loader = open_loader(
        reader, spec, LoaderSpec(name=cast(LoaderName, name)), sampler, train=train, device=torch.device("cpu")
    )
    try:
        return [batch for epoch in range(EPOCHS if train else 1) for batch in loader.epoch(epoch)]
    finally:
        loader.close()


def _torchvisions(reader: Reader, batch: Batch, row: int, size: int) -> np.ndarray:
    """Return a row's crop as torchvision's functions make it of a PIL image: uint8 [S, S, 3]."""
    image = stored_image(reader, int(batch.params.sample[row]))
    top, left, height, width = batch.params.crop_box[row].tolist()
    if batch.params.resized[row].tolist() == [size, size]:
        return np.asarray(pillow.resized_crop(image, top, left, height, width, [size, size], BICUBIC))
    short = int(batch.params.resized[row].min())
    return np.asarray(pillow.center_crop(pillow.resize(image, [short], BICUBIC), [size, size]))
