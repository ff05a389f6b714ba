"""The result of `deitfast bench` and of tools/gpu_check, with every measurement. Table, JSON and HTML are made of it.

This file is the schema of `--json`: a `BenchRecord` as a JSON object, fields by their names here, seconds and bytes
without prefixes. `load` reads a file back and refuses anything else. FORMAT is raised with every change of the schema.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from deitfast.environment import environment
from pipelines.errors import DeitfastError
from pipelines.files import write_text
from pipelines.spec import STRICT

FORMAT = 3
"""Version of the schema."""
OURS = "deitfast"
"""Our own name among the baselines."""
Resource = Literal["disk", "loader", "copy", "device"]
"""What a stage occupies. Stages of one resource run one after another; resources work at the same time."""
BaselineKind = Literal["loader", "crops", "step"]
"""What a baseline replaces; crops: a loader's decoding and resizing alone."""
Unit = Literal["images/s", "crops/s", "ms", "s", "share", "GB", "levels", "count"]
"""Unit of a figure; levels: of 255; share: of 1."""
Outcome = Literal["done", "failed", "left out"]


@dataclass(frozen=True, config=STRICT)
class Measurement:
    """One measurement."""

    images: int
    """Training images (views, where an image is used several times)."""
    seconds: float
    """By the wall clock, or by the device's events where the stage runs on CUDA."""
    cpu_seconds: float
    """Processor time of all threads, and of worker processes where there are any."""
    waited_seconds: float = 0.0
    """Part of `seconds` in which the step had no batch to work on (loader and step together only)."""


@dataclass(frozen=True, config=STRICT)
class Measured:
    """All measurements of a stage, or of several at once."""

    name: str
    what: str
    """What was done, in a few words."""
    resource: Resource | None
    """None where stages of several resources run together."""
    threaded: bool
    """Whether the loader's threads share this work; it was measured on one thread."""
    samples: tuple[Measurement, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """images/s of each measurement."""
        return tuple(sample.images / sample.seconds for sample in self.samples)

    @property
    def rate(self) -> float:
        """Median rate in images/s: the figure to quote."""
        return statistics.median(self.rates)

    @property
    def seconds(self) -> float:
        """Seconds per image, median."""
        return self._median(lambda sample: sample.seconds / sample.images)

    @property
    def cpu_seconds(self) -> float:
        """Processor time per image in seconds, median."""
        return self._median(lambda sample: sample.cpu_seconds / sample.images)

    @property
    def waiting(self) -> float:
        """Share of the time in which the step waited, median."""
        return self._median(lambda sample: sample.waited_seconds / sample.seconds)

    def _median(self, value: Callable[[Measurement], float]) -> float:
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
    """Longest side that the data set was converted with; 0: images as they were."""
    loader: str
    workers: int
    """The loader's threads."""
    cores: int
    """That this process may use."""
    repeats: int
    """Views of an image in an epoch (repeated augmentation): a batch decodes each of its images once."""


@dataclass(frozen=True, config=STRICT)
class Verdict:
    """What limits training."""

    bottleneck: str
    """Name of the stage that takes most of the limiting resource."""
    limit: str
    """The limiting resource: a key of `limits`."""
    limits: dict[str, float]
    """images/s that each resource, and the cores that all share (cores), allow at most."""
    predicted: float
    """images/s of everything together: the least of `limits`."""
    advice: str
    """What would make it faster."""


@dataclass(frozen=True, config=STRICT)
class Change:
    """A change of recipe, data or machine, and what it is expected to bring."""

    change: str
    predicted: float | None
    """images/s of everything together; None where nothing measured tells."""
    basis: str
    """What the prediction is computed from."""
    measured: Measured | None = None
    """Everything together with the change in place (`--try`)."""


@dataclass(frozen=True, config=STRICT)
class Disk:
    """Reading the data set from the disk."""

    cold: Measured | None
    """Images read in a training order after their file was dropped from the page cache; None: it could not be."""
    note: str
    """Why nothing was measured, "" where it was."""
    fits: bool
    """Whether the split fits in the memory that is free: then only the first epoch reads the disk."""


@dataclass(frozen=True, config=STRICT)
class Arithmetic:
    """The step's arithmetic compared with the device's own matrix product."""

    flops_per_image: float
    """Forward and backward, as torch.utils.flop_counter counts them: a multiplication and an addition are two."""
    step_flops: float
    """FLOP/s of the step."""
    product_flops: float
    """FLOP/s of one large matrix product of the same dtype, on the same device."""
    product_size: int
    """Rows and columns of its matrices."""

    @property
    def utilization(self) -> float:
        """Share of the matrix product's rate that the step reaches."""
        return self.step_flops / self.product_flops


@dataclass(frozen=True, config=STRICT)
class FullRun:
    """What the recipe's whole run would take at the measured rate."""

    epochs: int
    images: int
    """Views trained on in all epochs."""
    seconds: float
    """Of training; evaluation comes on top."""
    cache_bytes: int
    """Of a teacher's hard labels for all of them, two bytes a view."""


@dataclass(frozen=True, config=STRICT)
class ClusterJob:
    """A part of a recipe's work, and how fast some machines do it."""

    name: str
    images: int
    """Images to convert, or views to train on or to ask the teacher of."""
    rate: float
    """images/s of all machines that work on it."""
    limit: str
    """What limits it, as in `Scaling.limits`."""

    @property
    def seconds(self) -> float:
        """Time for all of them."""
        return self.images / self.rate


@dataclass(frozen=True, config=STRICT)
class Scaling:
    """Prediction for more GPUs and nodes, from what one process measured."""

    nodes: int
    gpus: int
    """Of each node."""
    network_gbits: float
    """Bandwidth between two nodes, in Gbit/s."""
    limits: dict[str, float]
    """images/s of the whole that the step with its gradient exchange, and each other resource, allow at most."""
    limit: str
    """The limiting one: a key of `limits`."""
    predicted: float
    """images/s of all processes together."""
    efficiency: float
    """`predicted` as a share of what as many processes would reach without losing anything to each other."""
    gradient_bytes: int
    """That each process sends to all others in a step."""
    exchange_seconds: float
    """Of exchanging the gradients of one step."""
    assumptions: tuple[str, ...]
    jobs: tuple[ClusterJob, ...] = ()
    """Conversion, the teacher's targets and training on these machines."""


@dataclass(frozen=True, config=STRICT)
class LoaderScaling:
    """The cpu loader on more threads, predicted from the time in which it holds Python's lock."""

    python: Measured
    """The loader with its codec left out: what one thread at a time does, whatever the cores."""
    measured: tuple[Measured, ...]
    """On one thread, and on two where there are two cores."""
    free_seconds: float
    """Processor time for a view that any number of threads spend at once."""
    predicted: dict[int, float]
    """images/s by threads, each on a core of its own."""
    bend: int
    """Threads from which a fifth and more of the cores is lost to waiting for the lock."""


@dataclass(frozen=True, config=STRICT)
class Baseline:
    """Another project's loader or step on the same work, or the reason why it was not measured."""

    name: str
    kind: BaselineKind
    measured: Measured | None
    skipped: str = ""
    version: str = ""
    """Name and version of the package that it comes from."""
    stored: str = ""
    """How the images were stored, where a few of them were converted for it (`--sizes`)."""
    difference: float | None = None
    """Of crops: mean difference of the pixels from the reference loader's (Pillow's, width first), in levels of 255."""


@dataclass(frozen=True, config=STRICT)
class Figure:
    """One figure of tools/gpu_check with all of its samples, and its target."""

    name: str
    unit: Unit
    samples: tuple[float, ...]
    what: str = ""
    """What was done, in a few words."""
    least: float | None = None
    """Target: the median is to be no less."""
    most: float | None = None
    """Target: the median is to be no more."""

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.samples)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.median >= self.least) and (self.most is None or self.median <= self.most)


@dataclass(frozen=True, config=STRICT)
class Section:
    """Result of one section of tools/gpu_check."""

    name: str
    outcome: Outcome
    reason: str = ""
    """Why it was left out, or the traceback of its failure."""
    seconds: float = 0.0
    figures: tuple[Figure, ...] = ()
    notes: dict[str, Any] = Field(default_factory=dict)
    torch_bytes: int = 0
    """Most GPU memory that torch held at once; 0 on a CPU."""
    device_bytes: int = 0
    """Most GPU memory in use by all programs, DALI included, as seen between figures; 0 on a CPU."""


@dataclass(frozen=True, config=STRICT)
class BenchRecord:
    """One call of `deitfast bench` or of tools/gpu_check."""

    format: int
    made: str
    """When, ISO 8601 with the time zone."""
    part: str
    """all, loader, step or train; gpu_check."""
    command: tuple[str, ...]
    machine: dict[str, Any]
    """Processor, devices and versions, as in a run's environment.json."""
    setting: Setting | None
    """None in a record of tools/gpu_check, whose sections have settings of their own."""
    stages: tuple[Measured, ...] = ()
    """Each alone."""
    loader: Measured | None = None
    """The loader's stages at work together, on all its threads."""
    together: Measured | None = None
    """The whole of training: loader, augmentation and step."""
    loader_scaling: LoaderScaling | None = None
    disk: Disk | None = None
    verdict: Verdict | None = None
    arithmetic: Arithmetic | None = None
    full_run: FullRun | None = None
    suggestions: tuple[Change, ...] = ()
    trials: tuple[Change, ...] = ()
    scaling: Scaling | None = None
    baselines: tuple[Baseline, ...] = ()
    sections: tuple[Section, ...] = ()
    """Of tools/gpu_check: finished ones in order, and the one that was under way when this was written."""
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether a section of tools/gpu_check failed."""
        return any(section.outcome == "failed" for section in self.sections)


def new_record(part: str, command: tuple[str, ...], setting: Setting | None = None) -> BenchRecord:
    """Return a record made now on this machine, without any measurement yet."""
    made, machine = datetime.now().astimezone().isoformat(timespec="seconds"), json.loads(json.dumps(environment()))
    return BenchRecord(FORMAT, made, part, command, machine, setting)


def save(record: BenchRecord, path: Path) -> None:
    """Write a record as JSON. Raises DeitfastError where the disk is full or not writable."""
    write_text(path, json.dumps(asdict(record), indent=1) + "\n")


def load(path: Path) -> BenchRecord:
    """Read what `save` wrote.

    Raises:
        DeitfastError: the file is missing, damaged, or of another version.
    """
    try:
        text = path.read_text()
        tree = json.loads(text)
        found = tree.get("format") if isinstance(tree, dict) else None
        if found is not None and found != FORMAT:
            raise DeitfastError(
                f"{path} is a benchmark record of another version",
                expected=f"format {FORMAT}",
                found=f"format {found}",
                remedy="run the benchmark again",
            )
        return TypeAdapter(BenchRecord).validate_json(text)
    except (OSError, ValueError) as error:  # a ValidationError is a ValueError
        raise DeitfastError(
            f"{path} is not a record of `deitfast bench --json`", found=str(error), remedy="run the benchmark again"
        ) from error


def versions(machine: dict[str, Any]) -> str:
    """Return the libraries of a record's machine in one line."""
    return ", ".join(f"{name} {version}" for name, version in machine["libraries"].items() if version)
