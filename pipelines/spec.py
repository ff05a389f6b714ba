"""What a dataset is and how batches are made from it, as frozen data. Does not import torch."""

import hashlib
import json
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from pipelines.choices import LoaderName

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
"""Every spec refuses unknown keys by name and numbers that are not finite; the text under a field documents it."""


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"must be two numbers in rising order, found {pair[0]:g}, {pair[1]:g}")
    return pair


Probability = float
AreaShare = Annotated[float, Field(gt=0, le=1)]
AspectRatio = Annotated[float, Field(ge=1 / 64, le=64)]
Areas = Annotated[tuple[AreaShare, AreaShare], AfterValidator(_rising)]
Ratios = Annotated[tuple[AspectRatio, AspectRatio], AfterValidator(_rising)]
Mean = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[float, Field(ge=1e-3, le=1)]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def digest(spec: Any) -> str:
    """Return a 16-hex-digit blake2b digest of a spec's canonical JSON: equal values, equal digest."""
    text = json.dumps(asdict(spec), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, config=STRICT)
class SplitSpec:
    """One split of a dataset on disk."""

    file: str
    """Name of the .beton file, or of the .wds folder of shards, inside the dataset's folder."""
    samples: int
    """Number of images."""
    counts: tuple[int, ...]
    """Images of each class, in class order."""
    size: int
    """Size of the file, or of all shards, in bytes."""
    index_crc32: int
    """CRC32 of what is not image data: of header, fields, metadata and allocation table, or of the shards' index."""
    fingerprint: str
    """blake2b over (label, height, width, mode, crc32) of every sample in order: names the content."""
    converted: dict[str, int] = Field(default_factory=dict)
    """What was done to how many images: passed through, stored raw, gray, CMYK, ... and skipped."""


@dataclass(frozen=True, config=STRICT)
class DatasetSpec:
    """What `dataset.json` holds: the identity of a converted dataset."""

    format: int
    """Version of this file's layout."""
    name: str
    """Kind of source: imagenet, cifar10, cifar100, folder, wds, demo."""
    classes: tuple[str, ...]
    """Class names in label order."""
    splits: dict[str, SplitSpec]
    """train, and val and test where the source has them."""
    codec: dict[str, int]
    """max_side (0: untouched) and quality of re-encoding; for shards also shard_size, their bytes at most."""
    source: str
    """Where the images came from, human-readable."""
    fingerprint: str
    """Digest of class names and of every split's fingerprint: equal for equal content in equal order."""
    val_fraction: float = 0.0
    """Share of each training class that was drawn as val; 0: val is the source's own."""
    val_seed: int = 0
    """Seed of that draw."""


@dataclass(frozen=True, config=STRICT)
class AugmentSpec:
    """What is done to a training image, as in DeiT. Every default is the paper's."""

    size: int = Field(default=224, ge=8, le=4096)
    """Side of the model's square input in pixels."""
    crop: Literal["resized", "padded"] = "resized"
    """resized: random resized crop; padded: random crop of the zero-padded image (DeiT's rule at 32 px or less)."""
    scale: Areas = (0.08, 1.0)
    """Area of a random resized crop as a share of the image's."""
    ratio: Ratios = (3 / 4, 4 / 3)
    """Width over height of a random resized crop, drawn log-uniformly."""
    padding: int = Field(default=4, ge=0, le=1024)
    """Black pixels around the image for crop = padded."""
    flip: Probability = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    policy: Literal["randaugment", "autoaugment", "none"] = "randaugment"
    """Operations after the flip: timm's rand-m9-mstd0.5-inc1, AutoAugment's policy for ImageNet, or none."""
    magnitude: float = Field(default=9.0, ge=0, le=10)
    """RandAugment's mean magnitude."""
    magnitude_std: float = Field(default=0.5, ge=0, le=10)
    """Standard deviation of the magnitude."""
    operation_probability: Probability = Field(default=0.5, ge=0, le=1)
    """Probability that each of RandAugment's two drawn operations is applied."""
    color_jitter: float = Field(default=0.3, ge=0, le=1)
    """Brightness, contrast, saturation in random order, each blended by U(1 - j, 1 + j); with policy = none only."""
    erasing: Probability = Field(default=0.25, ge=0, le=1)
    """Probability of random erasing."""
    erasing_area: Areas = (0.02, 1 / 3)
    """Area of the erased box as a share of the input's."""
    erasing_ratio: Ratios = (0.3, 1 / 0.3)
    """Height over width of the erased box, drawn log-uniformly."""
    mixup: float = Field(default=0.8, ge=0, le=1000)
    """MixUp's Beta parameter; 0 switches MixUp off."""
    cutmix: float = Field(default=1.0, ge=0, le=1000)
    """CutMix's Beta parameter; 0 switches CutMix off."""
    mix_probability: Probability = Field(default=1.0, ge=0, le=1)
    """Probability that a group is mixed at all."""
    mix_switch: Probability = Field(default=0.5, ge=0, le=1)
    """Probability of CutMix where both are on."""
    mixup_off_epoch: int = Field(default=0, ge=0, le=100_000)
    """Epoch, from 0, from which nothing is mixed, as timm's --mixup-off-epoch; with repeated augmentation from the next
    multiple of `repeats` on, so that all views of a pass are alike. 0: never."""
    mix_group: int = Field(default=64, ge=2, le=65_536, multiple_of=2)
    """Views that share one mode, lambda and box, and are mixed with each other (DeiT's batch per GPU)."""
    repeats: int = Field(default=3, ge=1, le=16)
    """Views of an image in one epoch (repeated augmentation); an epoch then visits 1/repeats of the images."""
    mean: tuple[Mean, Mean, Mean] = IMAGENET_MEAN
    """Mean of the normalization, in [0, 1]."""
    std: tuple[Std, Std, Std] = IMAGENET_STD
    """Standard deviation of the normalization, in [0, 1]."""
    eval_crop: float = Field(default=0.875, ge=0.01, le=1)
    """Evaluation resizes the short side to int(size / eval_crop) and takes the center; unused with crop = padded."""
    eval_resize: Literal["shorter", "squash"] = "shorter"
    """shorter: evaluation resizes the short side and keeps the aspect ratio; squash: both sides, whatever the ratio."""
    eval_interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Antialiased filter of that resize (the ffcv loader has its own). Training always uses bicubic."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Key of every augmentation draw; apart from the seed of the initialization."""


@dataclass(frozen=True, config=STRICT)
class LoaderSpec:
    """How batches are made; never what they contain."""

    name: LoaderName = "auto"
    """auto: resident for small images that fit in memory, else dali on CUDA, else cpu, else reference."""
    workers: int = Field(default=0, ge=0, le=1024)
    """Decoding threads; 0: the cores that may be used, divided by the processes of the run on this machine."""
    prefetch: int = Field(default=2, ge=1, le=64)
    """Batches made ahead of the step."""
    check: bool = True
    """Compare each image's CRC32 before it is decoded."""
    skip_bad: bool = False
    """Leave damaged images out, naming them in the log and counting them in the metrics, instead of ending the run."""
    hw_decoder_load: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = "auto"
    """Share of the JPEGs that the GPU's own JPEG decoder takes (dali on CUDA); auto: measured once for a machine: the
    highest share with which batches come 1.3 times as fast as `step_rate`."""
    step_rate: float = Field(default=28_000, gt=0, le=1e9)
    """Views/s that the training step consumes at most; the default is DeiT-Ti's rate at 224 px on an H200."""
