"""What one call of `deitfast bench` found, every sample of it. Table, JSON and HTML are made from this alone.

This file is the schema of `--json`: a `Record` as a JSON object, fields by their names here, seconds and bytes without
prefixes. `load` reads a file back and refuses anything else. A change that older readers would misread raises FORMAT.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pipelines.errors import DeitfastError
from pipelines.files import write_text
from pipelines.spec import STRICT


class Versioned(Protocol):
    """A record that says which version of its schema it is."""

    @property
    def format(self) -> int:
        """The version."""
        ...


T = TypeVar("T", bound=Versioned)
FORMAT = 1
"""Version of the schema."""
OURS = "deitfast"
"""Our own name among the peers."""
Lane = Literal["disk", "loader", "copy", "device"]
"""What a stage occupies. Stages of one lane take turns; lanes work at the same time."""

Kind = Literal["loader", "step"]
"""What a peer takes the place of."""


@dataclass(frozen=True, config=STRICT)
class Sample:
    """One measurement."""

    images: int
    """Training images (views, where an image is used several times)."""
    seconds: float
    """By the wall clock, or by the device's events where the stage runs on CUDA."""
    cpu_seconds: float
    """Processor time of all threads, and of worker processes where there are any."""
    waited_seconds: float = 0.0
    """Of `seconds`, those in which the step had no batch to work on (loader and step together only)."""


@dataclass(frozen=True, config=STRICT)
class Measured:
    """A stage, or several at once: all of its measurements."""

    name: str
    what: str
    """What was done, in a few words."""
    lane: Lane | None
    """None where the stages of several lanes run together."""
    threaded: bool
    """Whether the loader's threads share this work; it was measured on one thread."""
    samples: tuple[Sample, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """images/s of each measurement."""
        return tuple(sample.images / sample.seconds for sample in self.samples)

    @property
    def rate(self) -> float:
        """The figure to quote: the median, in images/s."""
        return statistics.median(self.rates)

    @property
    def seconds(self) -> float:
        """Seconds an image, median."""
        return self._median(lambda sample: sample.seconds / sample.images)

    @property
    def cpu_seconds(self) -> float:
        """Processor time an image, median, in seconds."""
        return self._median(lambda sample: sample.cpu_seconds / sample.images)

    @property
    def waiting(self) -> float:
        """Share of the time in which the step waited, median."""
        return self._median(lambda sample: sample.waited_seconds / sample.seconds)

    def _median(self, value: Callable[[Sample], float]) -> float:
        return statistics.median(map(value, self.samples))


@dataclass(frozen=True, config=STRICT)
class Setting:
    """What was measured."""

    arch: str
    size: int
    """Side of the model's input in pixels."""
    batch: int
    precision: str
    """float32, bfloat16 or float16."""
    compiled: bool
    device: str
    device_name: str
    data: str
    """The data set's folder."""
    images: int
    """In its training split."""
    data_bytes: int
    """Of its training split's file."""
    max_side: int
    """What the data set was converted with; 0: untouched."""
    loader: str
    workers: int
    """The loader's threads."""
    cores: int
    """That this process may use."""
    repeats: int
    """Views of an image in an epoch (repeated augmentation): a batch decodes each of its images once."""


@dataclass(frozen=True, config=STRICT)
class Verdict:
    """What holds the whole back."""

    bottleneck: str
    """Name of the stage that takes most of the binding limit."""
    limit: str
    """The binding limit: a key of `limits`."""
    limits: dict[str, float]
    """images/s that each lane, and the cores all share (cores), allow at most."""
    predicted: float
    """images/s of everything together: the least of `limits`."""
    advice: str
    """What follows for somebody who wants more."""


@dataclass(frozen=True, config=STRICT)
class Change:
    """Something to change, and what is expected of it."""

    change: str
    predicted: float | None
    """images/s of everything together; None where nothing measured tells."""
    how: str
    """What the prediction rests on."""
    measured: Measured | None = None
    """Everything together with the change in place (`--try`)."""


@dataclass(frozen=True, config=STRICT)
class Disk:
    """Reading the data set from the disk and from the page cache."""

    cold: Measured | None
    """Images read in a training order after their file was dropped from the page cache; None: it could not be."""
    note: str
    """How much of the file the kernel gave up, or why nothing was measured."""
    fits: bool
    """Whether the split fits in the memory that is free: only the first epoch reads the disk then."""


@dataclass(frozen=True, config=STRICT)
class Arithmetic:
    """How far the step is from what the device can multiply."""

    flops_per_image: float
    """Forward and backward, as torch.utils.flop_counter counts them: a multiplication and an addition are two."""
    step_flops: float
    """FLOP/s of the step."""
    product_flops: float
    """FLOP/s of one large matrix product of the same dtype, there and then."""
    product_size: int
    """Rows and columns of its matrices."""

    @property
    def utilization(self) -> float:
        """Share of the matrix product's rate that the step reaches."""
        return self.step_flops / self.product_flops


@dataclass(frozen=True, config=STRICT)
class Outlook:
    """What the recipe's whole run would take at the measured rate."""

    epochs: int
    images: int
    """Views trained on in all epochs."""
    seconds: float
    """Of training; evaluation comes on top."""
    cache_bytes: int
    """Of a teacher's hard labels for all of them, two bytes a view."""


@dataclass(frozen=True, config=STRICT)
class Peer:
    """Somebody else's way of doing the same, or a reason why it was not measured."""

    name: str
    kind: Kind
    measured: Measured | None
    left_out: str = ""
    version: str = ""
    """Of the package it comes from."""


@dataclass(frozen=True, config=STRICT)
class Record:
    """One call of `deitfast bench`."""

    format: int
    made: str
    """When, ISO 8601 with the time zone."""
    part: str
    command: tuple[str, ...]
    machine: dict[str, Any]
    """Processor, devices and versions, as in a run's environment.json."""
    setting: Setting
    stages: tuple[Measured, ...]
    """Each alone."""
    loader: Measured | None = None
    """The loader's stages at work together, on all its threads."""
    together: Measured | None = None
    """Loader and step."""
    disk: Disk | None = None
    verdict: Verdict | None = None
    arithmetic: Arithmetic | None = None
    outlook: Outlook | None = None
    remedies: tuple[Change, ...] = ()
    trials: tuple[Change, ...] = ()
    peers: tuple[Peer, ...] = ()
    notes: tuple[str, ...] = ()


def save(record: Record, path: Path) -> None:
    """Write a record as JSON. Raises DeitfastError where the disk is full or not writable."""
    write_text(path, json.dumps(asdict(record), indent=1) + "\n")


def load(path: Path) -> Record:
    """Read what `save` wrote.

    Raises:
        DeitfastError: the file is missing, damaged, or of another version.
    """
    return read_record(Record, path, "a bench", FORMAT)


def read_record(kind: type[T], path: Path, of: str, version: int) -> T:
    """Read a JSON file that is a pydantic dataclass with a `format`.

    Args:
        kind: the dataclass.
        path: the file.
        of: whose record it is, for messages.
        version: the format that this program reads.

    Raises:
        DeitfastError: the file is missing, damaged, or of another version.
    """
    try:
        record = TypeAdapter(kind).validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise DeitfastError(f"{path} holds no record of {of}", found=str(error)) from error
    if record.format != version:
        raise DeitfastError(f"{path} is of another version", expected=f"format {version}", found=str(record.format))
    return record


def versions(machine: dict[str, Any]) -> str:
    """Return the libraries of a record's machine in one line."""
    return ", ".join(f"{name} {version}" for name, version in machine["libraries"].items() if version)


def counted(count: int, thing: str) -> str:
    """Return a number of threads or processes in words."""
    plural = "es" if thing.endswith("s") else "s"
    return f"{count} {thing}{plural if count != 1 else ''}"
