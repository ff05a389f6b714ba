"""The paper's six ways to distill as overrides of a recipe: `deitfast train --method NAME`.

Touvron et al., 2021, table 3: DeiT on ImageNet-1k, top-1 of Ti, S and B at 224 px and of B at 384 px. The last three
rows are one network, trained alike, of which another head's prediction is reported.
"""

from dataclasses import dataclass
from typing import Any

from deitfast.config.choices import MethodName


@dataclass(frozen=True)
class Method:
    """One row."""

    name: MethodName
    changes: dict[str, Any]
    """Fields by full name, with their value in place of the recipe's."""
    paper: tuple[float, float, float, float]
    """Top-1 in the paper, per cent: Ti, S, B, and B at 384 px."""
    note: str


_TOKEN = {"distill.mode": "hard", "distill.head": "distillation", "distill.alpha": 0.5}

METHODS = (
    Method(
        "no-distillation",
        {"distill.mode": "none"},
        (72.2, 79.8, 81.8, 83.1),
        "labels only",
    ),
    Method(
        "usual-distillation",
        {"distill.mode": "soft", "distill.head": "class", "distill.alpha": 0.1, "distill.tau": 3.0},
        (72.2, 79.8, 81.8, 83.2),
        "soft targets on the class token",
    ),
    Method(
        "hard-distillation",
        {"distill.mode": "hard", "distill.head": "class", "distill.alpha": 0.5},
        (74.3, 80.9, 83.0, 84.0),
        "the teacher's labels on the class token",
    ),
    Method(
        "class-embedding",
        {**_TOKEN, "model.prediction": "class"},
        (73.9, 80.9, 83.0, 84.2),
        "distillation token; the class head predicts",
    ),
    Method(
        "distillation-embedding",
        {**_TOKEN, "model.prediction": "distillation"},
        (74.6, 81.1, 83.1, 84.4),
        "distillation token; its head predicts",
    ),
    Method(
        "class+distillation",
        {**_TOKEN, "model.prediction": "joint"},
        (74.5, 81.2, 83.4, 84.5),
        "distillation token; both heads predict: DeiT",
    ),
)


def method_fields(name: MethodName) -> dict[str, Any]:
    """Return the fields that a row sets, by full name."""
    return next(dict(row.changes) for row in METHODS if row.name == name)
