"""What one call of tools/gpu_check found: its JSON, of which table and verdict are made.

This file is the schema: a `Record` as a JSON object, fields by their names here.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic import dataclasses as checked

from deitfast.bench.record import read_record
from pipelines.files import write_text
from pipelines.spec import STRICT

FORMAT = 1
"""Version of the schema."""
Unit = Literal["images/s", "crops/s", "ms", "s", "share", "GB", "levels", "count"]
"""levels: of 255; share: of 1."""
Outcome = Literal["done", "failed", "left out"]


@checked.dataclass(frozen=True, config=STRICT)
class Figure:
    """One thing measured, every sample of it."""

    name: str
    unit: Unit
    samples: tuple[float, ...]
    what: str = ""
    """What was done, in a few words."""
    least: float | None = None
    """The median is to be no less."""
    most: float | None = None
    """The median is to be no more."""

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.samples)

    @property
    def lowest(self) -> float:
        """The smallest sample."""
        return min(self.samples)

    @property
    def highest(self) -> float:
        """The largest sample."""
        return max(self.samples)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.least is None and self.most is None:
            return None
        over = self.least is None or self.median >= self.least
        return over and (self.most is None or self.median <= self.most)


@dataclass(frozen=True)
class Note:
    """Something found that is no figure: goes into the JSON under its name."""

    name: str
    value: Any


@checked.dataclass(frozen=True, config=STRICT)
class Section:
    """What one section came to."""

    name: str
    outcome: Outcome
    reason: str = ""
    """Why it was left out, or the traceback of what it failed with."""
    seconds: float = 0.0
    figures: tuple[Figure, ...] = ()
    notes: dict[str, Any] = Field(default_factory=dict)
    torch_bytes: int = 0
    """Most GPU memory that torch held at once; 0 on a CPU."""
    device_bytes: int = 0
    """Most GPU memory in use by everybody, DALI included, as seen between figures; 0 on a CPU."""


@checked.dataclass(frozen=True, config=STRICT)
class Record:
    """One call."""

    format: int
    made: str
    """When, ISO 8601 with the time zone."""
    command: tuple[str, ...]
    dry: bool
    """Whether it was a dry run, whose figures mean nothing."""
    device: str
    machine: dict[str, Any]
    """Processor, devices and versions, as in a run's environment.json."""
    data: dict[str, str]
    """What was measured on."""
    missing: tuple[str, ...]
    """Modules that were not to be had."""
    sections: tuple[Section, ...] = ()
    """Finished ones, in order, and the one that was under way when this was written."""

    @property
    def failed(self) -> bool:
        """Whether any section failed."""
        return any(section.outcome == "failed" for section in self.sections)


def save(record: Record, path: Path) -> None:
    """Write a record as JSON, whole or not at all. Raises DeitfastError where the disk is full or not writable."""
    write_text(path, json.dumps(asdict(record), indent=1) + "\n")  # pyright: ignore[reportArgumentType]


def load(path: Path) -> Record:
    """Read what `save` wrote.

    Raises:
        DeitfastError: the file is missing, damaged, or of another version.
    """
    return read_record(Record, path, "tools/gpu_check", FORMAT)
