"""One comparison and its outcome: a line of the table."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Check:
    """How far something of ours is from its reference."""

    name: str
    worst: float
    """Largest absolute difference."""
    mean: float
    """Mean absolute difference."""
    allowed: float
    """What `by` may be at most."""
    by: Literal["worst", "mean"] = "worst"
    absent: str = ""
    """Why there was nothing to compare on this machine; such a line neither passes nor fails."""

    @property
    def passed(self) -> bool:
        """Whether the difference is as small as it must be (NaN is not)."""
        return bool(self.absent) or (self.worst if self.by == "worst" else self.mean) <= self.allowed


def compare(
    name: str, ours: Any, theirs: Any, allowed: float, *, by: Literal["worst", "mean"] = "worst", unit: float = 1.0
) -> Check:
    """Compare two arrays (or lists of arrays, joined), in multiples of `unit`; another shape is infinitely far."""
    one, other = (_joined(values) for values in (ours, theirs))
    if one.shape != other.shape:
        return Check(name, float("inf"), float("inf"), allowed, by)
    difference = np.abs(one - other) / unit
    return Check(name, float(difference.max()), float(difference.mean()), allowed, by)


def absent(name: str, reason: str) -> Check:
    """Return a line that says why there was nothing to compare."""
    return Check(name, float("nan"), float("nan"), 0.0, absent=reason)


def _joined(values: Any) -> np.ndarray:
    parts = values if isinstance(values, list | tuple) else [values]
    return np.concatenate([np.asarray(part, np.float64).ravel() for part in parts])
